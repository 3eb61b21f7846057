"""The report: README.md's tables, and plots, from the committed JSON files.

python -m benchmarks report benchmarks/results --readme README.md [--check]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import quality
from benchmarks.record import merged
from benchmarks.tables import (
    CACHED,
    OP_COLUMNS,
    heat_section,
    model_section,
    op_rows,
    pipes,
    present,
    profile_section,
    quality_section,
    quantized_section,
)

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
PLOT = "share.svg"

Result = dict[str, Any]


def load_results(root: Path) -> dict[str, list[Result]]:
    """The result files under `root` by folder, one folder a device; refuses those of --quick."""
    if not root.is_dir():
        raise ValueError(f"report: RESULTS_DIR must be a folder, got {root}")
    devices: dict[str, list[Result]] = {}
    for file in sorted(root.rglob("*.json")):
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"report: {file} must be JSON, got {error}") from None
        if not isinstance(found, dict) or not isinstance(found.get("provenance"), dict):
            continue
        if found["provenance"].get("quick"):
            raise ValueError(f"report: {file} must not come from --quick: its times mean nothing")
        devices.setdefault(str(file.parent.relative_to(root)), []).append(merged(found))
    return devices


def markdown(root: Path, readme: Path) -> str:
    """What stands between the markers of the README; nothing where there are no results."""
    parts: list[str] = []

    def add(key: str, section: Callable[[Result], Iterable[str]]) -> None:
        parts.extend(present(every(results, key), section))

    for folder, results in load_results(root).items():
        parts.append(f"### {device(results)}\n\n{origin(results)}")
        add("models", model_section)
        add("profiles", profile_section)
        parts.extend(
            present((r["quantized"] for r in results if "quantized" in r), quantized_section)
        )
        parts.extend(present(results, quality_of))
        add("heats", heat_section)
        ops = list(present(every(results, "ops"), op_rows))
        if ops:
            summary = f"{len(ops)} cases of {len({op for op, *_ in ops})} ops"
            table = pipes(OP_COLUMNS, ops)
            parts.append(
                f"<details><summary>{summary}</summary>\n\n{table}\n\n\\{CACHED}\n\n</details>"
            )
        plot = root / folder / PLOT
        if plot.exists():
            link = Path(plot.resolve()).relative_to(readme.resolve().parent).as_posix()
            parts.append(f"![Share of the measured ceiling]({link})")
    return "\n\n".join(parts)


def every(results: list[Result], key: str) -> list[Result]:
    """The lists of that name in all results, joined."""
    return [item for result in results for item in result.get(key) or ()]


def quality_of(result: Result) -> Iterator[str]:
    if "quality" in result:
        yield from quality_section(result["quality"])
    elif result.get("draws"):
        yield from quality_section(
            quality.summary(result["draws"]) | {"layers": result.get("layers", ())}
        )


def device(results: list[Result]) -> str:
    return next(r["provenance"].get("device", "a device that is not named") for r in results)


def origin(results: list[Result]) -> str:
    """One paragraph: versions, commits, dates, ceilings, tests, what failed or is missing."""
    versions = results[0]["provenance"].get("versions", {})
    packages = [f"{name} {version}" for name, version in versions.items() if version]

    def source(result: Result) -> Iterator[str]:
        p = result["provenance"]
        yield f"{(p['commit'] or '')[:9] or 'source ' + p['source_hash']} on {p['date'][:10]}"

    sources = sorted(set(present(results, source)))
    lines = [f"Measured at {', '.join(sources)}, with {', '.join(packages)}."]
    lines += list(present(results, ceilings))[:1]
    for result in results:
        if "tests" in result:
            counts = (f"{n} {outcome}" for outcome, n in result["tests"].items() if n)
            lines.append(f"Tests on this device: {', '.join(counts)}.")
        if result.get("error"):
            lines.append(f"Stage {result['stage']} failed: {result['error']}.")
        if missing := interrupted(result):
            lines.append(
                f"{result.get('run', 'cpu-model')} was interrupted: {missing} stages done."
            )
    return " ".join(lines)


def ceilings(result: Result) -> Iterator[str]:
    c = result["ceilings"]
    yield (
        f"Ceilings in the same run: copy {c['copy'] / 1e9:,.0f} GB/s (read + write), read "
        f"{c['read'] / 1e9:,.0f} GB/s, bf16 matmul {c['matmul'] / 1e12:.3g} TFLOP/s"
        + (f", int8 {c['int8'] / 1e12:.3g} Top/s." if c.get("int8") else ".")
    )


def interrupted(result: Result) -> str | None:
    """ "3 of 8", where stages are missing; older files tell it of heats alone."""
    heats = result.get("heats") or ()
    whole = sum("all_layers" in heat and bool(heat.get("contenders")) for heat in heats)
    former = f"{whole} of {len(heats)}" if whole < len(heats) else None
    return result.get("interrupted") or former


def with_block(text: str, block: str) -> str:
    """`text` with `block` between its markers."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"report: --readme must name a file that holds {START} … {END} once")
    head, rest = text.split(START)
    body = f"\n{block}\n\n" if block else ""
    return f"{head}{START}\n{body}{END}{rest.split(END)[1]}"


def plot(root: Path) -> list[Path]:
    """One bar chart per device: share of the ceiling by case, ours beside the best peer's."""
    import matplotlib

    matplotlib.use("svg")
    # The same file from the same results; text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "glm4-kernels", "svg.fonttype": "none"})
    from matplotlib import pyplot

    written = []
    for folder, results in load_results(root).items():
        ops = list(present(every(results, "ops"), plotted))
        if not ops:
            continue
        figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.28 * len(ops)))
        for offset, who in ((-0.2, "ours"), (0.2, "best peer")):
            bars = [bar(op, who) for op in ops]
            places = [i + offset for i in range(len(ops))]
            axes.barh(places, bars, 0.38, label=who)
        names = [f"{op['op']}: {op['label']}{'*' * op['in_cache']}" for op in ops]
        axes.set_yticks(range(len(ops)), names, fontsize=7)
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel(f"share of the ceiling measured in the same run\n{CACHED}")
        axes.legend()
        figure.tight_layout()
        written.append(root / folder / PLOT)
        figure.savefig(written[-1], metadata={"Date": None})
        pyplot.close(figure)
    return written


def plotted(op: Result) -> Iterator[Result]:
    """An op that has its row and a time."""
    if "eager" in op["contenders"][0] and list(op_rows(op)):
        yield op


def bar(op: Result, who: str) -> float:
    mode = op["compared_in"] or "eager"
    name = op["contenders"][0]["name"] if who == "ours" else op["best_peer"]
    return next((c[mode]["share"] for c in op["contenders"] if c["name"] == name), 0.0)
