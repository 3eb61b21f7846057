"""`python -m benchmarks …`: runs from a clone. What it takes: commands.py."""

from __future__ import annotations

import sys

INTERRUPTED = 130  # what a shell makes of Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if something that was measured failed, 2 if nothing can be."""
    try:
        from benchmarks import commands  # imports torch, which takes a while

        return commands.main(arguments)
    except KeyboardInterrupt as stopped:
        print(f"benchmarks: interrupted{f': {stopped}' if str(stopped) else ''}", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
