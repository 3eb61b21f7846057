"""The command line, `glm4 ...`: text or a report on stdout, everything else on stderr.

Exit codes: 0; 1 after an error, told in one line; 2 after a wrong command line; 130 after Ctrl-C;
141 when the reader of stdout has gone. torch is imported only once a command needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from glm4.env import environment, report, version

# Without these an error is a bug of ours, and its line says how to get the traceback.
EXPECTED = (ValueError, TypeError, OSError, IndexError, FloatingPointError)

EXAMPLES = """\
examples:
  glm4 generate --prompt "In the beginning"
  glm4 generate --model zai-org/GLM-4-9B-0414 --temperature 0.8 --top-p 0.8 < prompt.txt
  glm4 quantize zai-org/GLM-4-9B-0414 GLM-4-9B-0414-int4 --bits 4 --group-size 128
  glm4 env
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("\nglm4: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Else the interpreter's own flush at exit complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            raise
        print(f"glm4: {_one_line(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="glm4",
        description="GLM-4 on one machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("generate", help="continue a text", description=generate.__doc__)
    command.set_defaults(run=generate, error=command.error)
    command.add_argument(
        "--model", default="demo", metavar="PATH_OR_REPO", help="default: the bundled demo model"
    )
    command.add_argument("--prompt", metavar="TEXT", help="default: read from stdin")
    command.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: 256, or what the context leaves"
    )
    command.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy"
    )
    command.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that reach P"
    )
    command.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="over 1 repeats less"
    )
    command.add_argument("--seed", type=int, metavar="N", help="makes a drawn text repeatable")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    command.add_argument("--dtype", default="auto", help="auto, bfloat16, float32 or float16")
    command.add_argument("--quantize", choices=("int8", "int4"), help="weights, as they are loaded")
    command.add_argument(
        "--rope-theta", type=float, metavar="X", help="overrides the one in config.json"
    )
    command.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of the CPU; default: all, and fewer while other processes need the processors",
    )

    command = commands.add_parser(
        "quantize", help="write a smaller checkpoint", description=quantize.__doc__
    )
    command.set_defaults(run=quantize)
    command.add_argument("source", metavar="SRC", help="a folder or Hub repository")
    command.add_argument("target", metavar="DST", help="a folder that does not exist yet")
    command.add_argument(
        "--bits", type=int, choices=(4, 8), default=4, help="of the linear layers; default: 4"
    )
    command.add_argument(
        "--group-size",
        choices=("32", "64", "128", "channel"),
        help="weights that share a scale; default: 128, with --bits 8 channel",
    )
    command.add_argument(
        "--asymmetric", action="store_true", help="a zero point per group, beside its scale"
    )
    command.add_argument(
        "--head-bits",
        type=int,
        choices=(4, 8, 16),
        default=8,
        help="of lm_head; 16 leaves it as it is; default: 8",
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    command.add_argument(
        "--rope-theta", type=float, metavar="X", help="written in place of the source's"
    )

    command = commands.add_parser(
        "env", help="what is installed, built and found here", description=env.__doc__
    )
    command.set_defaults(run=env)
    command.add_argument("--json", action="store_true", help="for programs")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"glm4: {message} (see `{self.prog} --help`)\n")


def _version() -> str:
    return f"glm4-kernels {version() or 'from a source tree, not installed'}"


def env(args: argparse.Namespace) -> None:
    """Shows versions, the CPU, GPUs, what the extension was built with, and what is missing."""
    found = environment()
    print(json.dumps(found, indent=2) if args.json else report(found))


def generate(args: argparse.Namespace) -> None:
    """Continues a text, as it comes, on stdout; then says on stderr how fast that was."""
    from glm4.checkpoint import load
    from glm4.config_json import read_config
    from glm4.generation import stream
    from glm4.hub import find_folder
    from glm4.progress import progress_bar
    from glm4.sampling import Sampling
    from glm4.threads import check_threads
    from glm4.tokenizer import TextStream, Tokenizer

    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        args.error(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    chosen = (args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed)
    try:
        Sampling(*chosen)
    except ValueError as error:
        args.error(str(error))
    try:
        check_threads("generate", args.threads)
    except ValueError as error:
        args.error(str(error))
    text = _read_stdin() if args.prompt is None else args.prompt

    # What can be wrong with small files shows before gigabytes are read.
    folder = find_folder(args.model)
    config = read_config(folder, args.rope_theta)
    tokenizer = Tokenizer(folder)
    prompt = tokenizer.encode(text)
    left = config.max_positions - len(prompt)
    max_new_tokens = args.max_new_tokens or max(min(256, left), 1)
    model = load(
        folder,
        args.device,
        args.dtype,
        args.quantize,
        rope_theta=args.rope_theta,
        threads=args.threads,
    )

    times = [time.perf_counter()]
    warmups: list[float] = []
    pieces = TextStream(tokenizer)
    with progress_bar("Reading the prompt", len(prompt)) as show:
        on_prefill = lambda done, total: show(done)  # noqa: E731
        on_warmup = lambda what, seconds: warmups.append(seconds)  # noqa: E731
        tokens = stream(
            model, [prompt], max_new_tokens, *chosen, on_prefill=on_prefill, on_warmup=on_warmup
        )
        first = next(tokens)
    _write(pieces.push(first[1]))
    times.append(time.perf_counter())
    n_decoded = 0
    for _, token in tokens:
        _write(pieces.push(token))
        n_decoded += 1
    times.append(time.perf_counter())
    _write(pieces.end() + "\n")

    prefill, decode = times[1] - times[0], times[2] - times[1]
    speeds = f"prefill {_speed(len(prompt), prefill)}"
    if n_decoded:
        speeds += f", decode {_speed(n_decoded, decode)}"
    if warmups:
        speeds += f", {sum(warmups):.2f} s of it warm-up"
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"glm4: {speeds} on {model.device} in {dtype}", file=sys.stderr)


def quantize(args: argparse.Namespace) -> None:
    """Writes a checkpoint with its linear layers in 4 or 8 bits (compressed-tensors'
    pack-quantized), layer by layer: memory stays that of one layer."""
    from glm4.quantize import quantize_checkpoint

    named = args.group_size or ("128" if args.bits == 4 else "channel")
    target = quantize_checkpoint(
        args.source,
        args.target,
        args.bits,
        None if named == "channel" else int(named),
        not args.asymmetric,
        args.head_bits,
        args.device,
        args.rope_theta,
    )
    size = sum(path.stat().st_size for path in target.iterdir())
    gigabytes = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
    print(f"glm4: wrote {target}, {gigabytes}", file=sys.stderr)


def _speed(n_tokens: int, seconds: float) -> str:
    return f"{n_tokens} tokens in {seconds:.2f} s ({n_tokens / seconds:.1f} tokens/s)"


def _write(text: str) -> None:
    """To stdout at once; a terminal that cannot show a character gets a "?"."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _read_stdin() -> str:
    """All of stdin, without the newline at its end."""
    if sys.stdin.isatty():
        print("glm4: type the prompt, then Ctrl-D on a line of its own", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8: {error}") from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"glm4: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in message):
        return f"out of memory: {message or 'the system has none left'}"
    if isinstance(error, EXPECTED) or message.startswith("glm4_kernels was"):  # not built
        return message or type(error).__name__
    return f"{type(error).__name__}: {message} (unexpected; `glm4 --debug ...` shows where)"
