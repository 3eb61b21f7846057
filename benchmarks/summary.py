"""The README's one table, from the committed runs of whole models: ours beside the best peer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import device, every, load_results, markdown
from benchmarks.tables import pipes, present

COLUMNS = ("whole model", "decode, tokens/s", "best peer", "", "prefill, tokens/s", "best peer", "")


def pages(root: Path, readme: Path) -> dict[Path, str]:
    """What the files that `report` writes should hold: all results, and the README."""
    return {
        root / "README.md": markdown(root),
        readme: with_block(readme, "benchmarks", summary(root, readme)),
    }


def with_block(file: Path, name: str, block: str) -> str:
    """The text of `file` with `block` between `<!-- NAME:start -->` and `<!-- NAME:end -->`."""
    text, start, end = file.read_text(), f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"report: {file} must hold {start} … {end} once")
    head, rest = text.split(start)
    body = f"\n{block}\n\n" if block else ""
    return f"{head}{start}\n{body}{end}{rest.split(end)[1]}"


def summary(root: Path, readme: Path) -> str:
    """A row for each model and width of weights that a peer ran too."""
    parts = []
    for results in load_results(root).values():
        if rows := list(present(every(results, "heats"), rows_of)):
            parts.append(f"{device(results)}, batch 1:\n\n{pipes(COLUMNS, rows)}")
    if not parts:
        return ""
    where = Path(os.path.relpath(root / "README.md", readme.parent)).as_posix()
    return "\n\n".join([*parts, f"Everything that was measured: [{where}]({where})."])


def rows_of(heat: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    layers = f", {heat['layers']} layers"
    timed = [c for c in heat["contenders"] if "decode" in c and "prefill" in c]  # others died
    for width in (4, 8, 16):
        same = [c for c in timed if width_of(c) == width]
        ours = [c for c in same if c["name"].startswith("glm4 ")]
        peers = [c for c in same if c not in ours]
        if ours and peers:
            name = f"{heat['model']}{layers}, {ours[0]['name'].removeprefix('glm4 ')}"
            beside = (beside_best(ours[0], peers, stage) for stage in ("decode", "prefill"))
            yield name, *(cell for cells in beside for cell in cells)


def width_of(contender: dict[str, Any]) -> int:
    """The nominal bits of its weights: scales and zero points cost the rest."""
    return min((4, 8, 16), key=lambda width: abs(width - contender["linear_bits"]))


def beside_best(
    ours: dict[str, Any], peers: list[dict[str, Any]], stage: str
) -> tuple[str, str, str]:
    """Ours, the fastest peer and its name, and the ratio."""
    mine = ours[stage]["tokens_per_s"]
    best = max(peers, key=lambda peer: peer[stage]["tokens_per_s"])
    theirs = best[stage]["tokens_per_s"]
    return f"{mine:.3g}", f"{theirs:.3g} ({best['name']})", f"{mine / theirs:.2f}x"
