"""Tables and plots of results: in the terminal, and in README.md from the committed JSON files.

python -m benchmarks report benchmarks/results --readme README.md [--check]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.quantized import compared

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
PLOT = "share.svg"

Result = dict[str, Any]


STYLE: dict[str, Any] = {
    "box": box.SIMPLE_HEAD,
    "title_justify": "left",
    "caption_justify": "left",
}
CACHED = "* the input sets fit in a cache, whose ceiling is another"


def duration(timing: Result) -> str:
    """The median, and half the way from p20 to p80 as a share of it."""
    return f"{length(timing)} ±{(timing['p80_us'] - timing['p20_us']) / 2 / timing['us']:.0%}"


def length(timing: Result) -> str:
    us = timing["us"]
    return f"{us:.1f} µs" if us < 1000 else f"{us / 1000:.2f} ms"


def rate(op: Result, timing: Result) -> str:
    if op["bound"] == "memory":
        return f"{timing['gb_per_s']:.4g} GB/s"
    return f"{timing['tflop_per_s']:.3g} TFLOP/s"


def share(op: Result, timing: Result) -> str:
    return f"{timing['share']:.0%}" + ("*" if op["in_cache"] else "")


def speedup(op: Result) -> str:
    if op["speedup"] is None:
        return "no peer"
    return f"{op['speedup']:.2f}x {op['best_peer']}"


def op_table(results: list[Result]) -> Table:
    """Everybody's times in the cases of one op, for the terminal."""
    table = Table(title=results[0]["op"], **STYLE)
    graph = any("graph" in c for op in results for c in op["contenders"])
    for name in ("case", "who"):
        table.add_column(name)
    for name in ("eager", *(["in a graph"] if graph else []), "rate", "of ceiling", "vs best peer"):
        table.add_column(name, justify="right")
    notes = [CACHED] if any(op["in_cache"] for op in results) else []
    for op in results:
        for i, contender in enumerate(op["contenders"]):
            row = [op["label"] if i == 0 else "", contender["name"]]
            if "note" in contender:
                notes.append(f"{op['label']}, {contender['name']}: {contender['note']}")
            if "eager" not in contender:
                table.add_row(*row, f"[red]{contender['status']}")
                continue
            row.append(duration(contender["eager"]))
            if graph:
                row.append(duration(contender["graph"]) if "graph" in contender else "none")
            best = contender.get("graph", contender["eager"])
            row += [rate(op, best), share(op, best), speedup(op) if i == 0 else ""]
            table.add_row(*row, style="bold" if i == 0 else "")
        table.add_section()
    table.caption = "\n".join(notes)
    return table


MODEL_COLUMNS = ("what", "batch", "tokens", "tokens/s", "of roofline", "first token", "peak")


def model_table(model: Result) -> Table:
    table = Table(*MODEL_COLUMNS, title=model_name(model), **STYLE)
    for row in model_rows(model):
        table.add_row(*row)
    table.caption = "\n".join(f"skipped: {reason}" for reason in model["skipped"])
    return table


def model_name(model: Result) -> str:
    layers = "" if model["all_layers"] else f", {model['layers']} layers only"
    return f"{model['model']}{layers}, {model['dtype']}, {model['weights']} weights"


def model_rows(model: Result) -> Iterator[tuple[str, ...]]:
    for row in model["decode"]:
        drawn = ", drawn" if row.get("drawn") else ""
        for mode, name in (("graph", "decode step in a CUDA graph"), ("eager", "decode step")):
            if mode in row:
                tokens = f"{row['context']:,} cached"
                speed, share = f"{row[mode]['tokens_per_s']:.1f}", f"{row[mode]['share']:.0%}"
                yield name + drawn, str(row["batch"]), tokens, speed, share, "", peak(row)
    for row in model.get("first_token", ()):
        speed, share = f"{row['tokens_per_s']:.0f}", f"{row['share']:.0%}"
        yield "prompt, glm4", "1", f"{row['prompt']:,}", speed, share, first_token(row), peak(row)
    for row in model["generate"]:
        tokens = f"{row['prompt']:,} + {row['new_tokens']:,}"
        speed, who = f"{row['tokens_per_s']:.1f}", f"generate, {row['engine']}"
        yield who, str(row["batch"]), tokens, speed, "", first_token(row), peak(row)


def first_token(row: Result) -> str:
    """And how much longer the first call took, which compiles and captures."""
    warmup = row.get("warmup_s", 0.0)
    cold = f" (first call {warmup:+.1f} s)" if warmup >= 0.1 else ""
    return f"{row['first_token_ms']:.0f} ms{cold}"


STEP_COLUMNS = (
    "op",
    "kernels a layer",
    "floor, µs a layer",
    "kernels, µs a layer",
    "gaps, µs a layer",
    "of floor",
    "of the step",
)
STEP_KERNEL_COLUMNS = ("kernel", "calls a step", "µs a step", "of the kernels")


def profile_section(profile: Result) -> str:
    """One captured decode step: a budget of its ops, then its kernels."""
    title = (
        f"Where a decode step of {profile['model']} goes: batch {profile['batch']}, "
        f"{profile['context']:,} tokens cached, {profile['us'] / 1e3:.3f} ms in kernels"
    )
    tables = [pipes(STEP_KERNEL_COLUMNS, step_kernel_rows(profile))]
    if "budget" in profile:
        tables.insert(0, pipes(STEP_COLUMNS, step_rows(profile)))
    joined = "\n\n".join(tables)
    return f"<details><summary>{title}</summary>\n\n{joined}\n\n</details>"


def step_rows(profile: Result) -> Iterator[tuple[str, ...]]:
    layers = profile["layers"]
    rows = profile["budget"]
    whole = sum(row["us"] + row["gap_us"] for row in rows)
    for row in rows:
        floor = row["floor_us"]
        took = row["us"] + row["gap_us"]
        yield (
            row["op"],
            f"{row['kernels'] / layers:.3g}",
            "" if floor is None else f"{floor / layers:.2f}",
            f"{row['us'] / layers:.2f}",
            f"{row['gap_us'] / layers:.2f}",
            "" if floor is None else f"{floor / took:.0%}",
            f"{took / whole:.1%}",
        )


def step_kernel_rows(profile: Result) -> Iterator[tuple[str, ...]]:
    for row in profile["kernels"]:
        name = row["kernel"].replace("|", "\\|")
        yield name, str(row["calls"]), f"{row['us']:.1f}", f"{row['us'] / profile['us']:.1%}"


HEAT_COLUMNS = (
    "who",
    "bits a weight",
    "GB a token",
    "decode, tokens/s",
    "GB/s",
    "of roofline",
    "prefill, tokens/s",
    "of the matmuls",
    "quantised, M/s",
    "peak",
)


def heat_table(heat: Result) -> Table:
    table = Table(title=heat_name(heat), **STYLE)
    for i, name in enumerate(HEAT_COLUMNS):
        table.add_column(name, justify="right" if i else "left")
    for row in heat_rows(heat):
        table.add_row(*row)
    table.caption = "\n".join(f"skipped: {reason}" for reason in heat["skipped"])
    return table


def threads_table(result: Result) -> Table:
    table = Table(title=f"{result['model']}, {result['layers']} layers: tokens/s", **STYLE)
    for i, name in enumerate(("", "contender", "tokens/s", "CPU ms/token", "others' processors")):
        table.add_column(name, justify="left" if i < 2 else "right")
    for condition in ("quiet", "crowded"):
        for entry in result[condition]:
            cpu = f"{1e3 * entry['cpu_s_per_token']:.2f}"
            speed = f"{entry['tokens_per_s']:.1f}"
            table.add_row(condition, entry["name"], speed, cpu, f"{entry['others']:.2f}")
    table.caption = (
        f"default / all threads, quiet: {result['quiet_default_of_all']:.2f}; "
        f"default / one thread, crowded: {result['crowded_default_of_one']:.2f}, "
        f"wanted {result['crowded_wanted']}"
    )
    return table


def heat_name(heat: Result) -> str:
    layers = "all" if heat["all_layers"] else heat["layers"]
    sizes = f"{layers} layers, vocabulary {heat['vocab']:,}"
    return f"{heat['model']}, {sizes}, {heat['prompt']} tokens of prompt, random weights"


def heat_rows(heat: Result) -> Iterator[tuple[str, ...]]:
    """Medians; for the speeds half the way from p20 to p80 too."""
    for who in heat["contenders"]:
        decode, prefill = who["decode"], who["prefill"]
        of_matmuls = prefill.get("of_matmuls")
        quantised = who.get("quantised_weights_per_s")
        yield (
            who["name"],
            f"{who['linear_bits']:.2f}",
            f"{who['bytes_per_token'] / 1e9:.2f}",
            speed(decode),
            f"{decode['gb_per_s']:.1f}",
            f"{decode['share']:.0%}",
            speed(prefill),
            "" if of_matmuls is None else f"{of_matmuls:.0%}",
            "" if quantised is None else f"{quantised / 1e6:.0f}",
            peak(who),
        )


def speed(timing: Result) -> str:
    median = timing["tokens_per_s"]
    return f"{median:.4g} ±{(timing['p80'] - timing['p20']) / 2 / median:.0%}"


BUDGET_COLUMNS = ("who", "pass", "op", "calls a layer", "µs a layer", "share")


def budget_rows(heat: Result) -> Iterator[tuple[str, ...]]:
    """Each op of our passes, largest first, and Python between them."""
    for who in heat["contenders"]:
        for name, budget in who.get("budgets", {}).items():
            layers, whole = heat["layers"], budget["ms"] * 1e3
            for op, row in budget["ops"].items():
                us = row["us"] * row["calls"]
                calls = f"{row['calls'] / layers:.3g}"
                if us >= 0.001 * whole:
                    yield who["name"], name, op, calls, f"{us / layers:.0f}", f"{us / whole:.1%}"
            rest = budget["rest_us"]
            yield who["name"], name, "rest", "", f"{rest / layers:.0f}", f"{rest / whole:.1%}"


def peak(row: Result) -> str:
    return "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f} GiB"


# Quantised linear layers beside every peer (quantized.py)

QUANTIZED_COLUMNS = ("matrix", "M") + 2 * ("ours", "best peer", "its time", "ratio", "of ceiling")
ACCURACY_COLUMNS = ("contender", "bits per weight", "relative L2", "what is quantised")


def quantized_table(name: str, stage: Result) -> Table:
    """Everybody's times in one stage, for the terminal."""
    keys = list(dict.fromkeys(key for c in stage["contenders"] for key in c["tokens"]))
    table = Table(title=matrix(name, stage), **STYLE)
    table.add_column("who")
    for column in ("bits", "relative L2", *(f"M = {key}" for key in keys)):
        table.add_column(column, justify="right")
    notes = [f"skipped: {line}" for line in stage["skipped"]]
    for c in stage["contenders"]:
        if "note" in c:
            notes.append(f"{c['name']}: {c['note']}")
            continue
        notes += [
            f"{c['name']}, M = {k}: {t['note']}" for k, t in c["tokens"].items() if "note" in t
        ]
        cells = [
            f"{length(t)} {t['share']:.0%}" if "us" in t else f"[red]{t['status']}"
            for t in c["tokens"].values()
        ]
        bits = f"{8 * c['bytes'] / stage['n'] / stage['k']:.2f}"
        style = "bold" if c["peer"] == "ours" else ""
        table.add_row(c["name"], bits, accuracy(c), *cells, style=style)
    table.caption = "\n".join(["shares are of the ceiling sampled beside the turn", *notes])
    return table


def matrix(name: str, stage: Result) -> str:
    return f"{name} {stage['n']} x {stage['k']}" + (", from L3" if stage["in_cache"] else "")


def accuracy(contender: Result) -> str:
    errors = [t["relative_l2"] for t in contender["tokens"].values() if "relative_l2" in t]
    return f"{errors[-1]:.4f}" if errors else ""  # of the most rows


def quantized_rows(stages: dict[str, Result]) -> Iterator[tuple[str, ...]]:
    for name, stage in stages.items():
        for key in dict.fromkeys(key for c in stage["contenders"] for key in c["tokens"]):
            row = [matrix(name, stage), key]
            for bits in (4, 8):
                ours, peer = compared(stage, bits, key)
                mine = ours and ours["tokens"][key]
                best = peer and peer["tokens"][key]
                row += [length(mine) if mine else "none"]
                row += [peer["name"], length(best)] if best else ["none", ""]
                row += [f"{best['us'] / mine['us']:.2f}x" if mine and best else ""]
                row += [f"{mine['share']:.0%}" if mine else ""]
            yield tuple(row)


def accuracy_rows(stages: dict[str, Result]) -> Iterator[tuple[str, ...]]:
    """From the stage that most contenders took part in, with the most tokens."""

    def size(stage: Result) -> tuple[int, int]:
        keys = [list(map(int, c["tokens"])) for c in stage["contenders"] if c["tokens"]]
        return len(keys), max(max(key) for key in keys)

    stage = max(stages.values(), key=size)
    for c in sorted(stage["contenders"], key=lambda c: c["bits"]):
        if c["tokens"]:
            bits = f"{8 * c['bytes'] / stage['n'] / stage['k']:.2f}"
            yield c["name"], bits, accuracy(c), c["what"]


def quantized_section(stages: dict[str, Result]) -> str:
    turns = [t for s in stages.values() for c in s["contenders"] for t in c["tokens"].values()]
    reads = sorted(r for t in turns for r in t.get("read_beside_gb_per_s", ()))
    peaks = sorted(p for t in turns for p in t.get("peak_beside_gop_per_s", ()))
    versions = {name: v for s in stages.values() for name, v in s["versions"].items() if v}
    skipped = sorted({line for s in stages.values() for line in s["skipped"]})
    lines = [
        f"Beside {', '.join(f'{name} {version}' for name, version in versions.items())}, one "
        "interleaved run; weights int4 in groups of 128, int8 per channel."
    ]
    if reads:
        lines.append(
            f"Sampled beside the turns: read {at(reads, 0.5):.0f} GB/s (quartiles "
            f"{at(reads, 0.25):.0f} to {at(reads, 0.75):.0f}), 8-bit peak "
            f"{at(peaks, 0.5) / 1000:.2f} Top/s."
        )
    lines += [f"Skipped: {line}." for line in skipped]
    times = pipes(QUANTIZED_COLUMNS, quantized_rows(stages))
    errors = pipes(ACCURACY_COLUMNS, accuracy_rows(stages))
    return (
        f"**Quantised linear layers: ours beside the best peer, int4 then int8**\n\n"
        f"{' '.join(lines)}\n\n{times}\n\n<details><summary>Accuracy against fp64 and unrounded "
        f"weights</summary>\n\n{errors}\n\n</details>"
    )


def at(ascending: list[float], q: float) -> float:
    return ascending[min(int(q * len(ascending)), len(ascending) - 1)]


QUALITY_COLUMNS = ("weights", "bits", "en", "es", "prose", "all", "KL, mnat", "KL of max/7's")


def quality_table(quality: Result) -> Table:
    title = "held-out perplexity of the demo model: relative rise, 95 % interval"
    table = Table(*QUALITY_COLUMNS, title=title, **STYLE)
    for row in quality_rows(quality):
        table.add_row(*row)
    return table


def quality_rows(quality: Result) -> Iterator[tuple[str, ...]]:
    for who in quality["contenders"]:
        rises = (who[text] for text in ("en", "es", "prose", "all"))
        kl, ratio = who["kl_nats"], next(iter(who["kl_share"].values()))
        yield (
            who["name"],
            f"{who['bits_per_weight']:.2f}",
            *(f"{100 * rise['mean']:.2f} ± {100 * rise['half']:.2f} %" for rise in rises),
            f"{1000 * kl['mean']:.2f} ± {1000 * kl['half']:.2f}",
            f"{ratio['mean']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
        )


def quality_section(quality: Result) -> str:
    draws = f"the mean of {quality['draws']} draws of the rounding" if quality["draws"] > 1 else ""
    title = f"**Quantisation of the demo model: relative rise of held-out perplexity** {draws}"
    layers = quality["layers"]
    who = list(layers[0]["relative_squared_error"])
    errors = (
        (row["weights"], *(f"{row['relative_squared_error'][name]:.4f}" for name in who))
        for row in layers
    )
    return "\n\n".join(
        (
            title.strip(),
            pipes(QUALITY_COLUMNS, quality_rows(quality)),
            "Squared error of int4 weights in groups of 128, over their square:",
            pipes(("weights", *who), errors),
        )
    )


def load_results(root: Path) -> dict[str, list[Result]]:
    """The result files under `root` by folder, one folder a device; refuses those of --quick."""
    if not root.is_dir():
        raise ValueError(f"report: RESULTS_DIR must be a folder, got {root}")
    devices: dict[str, list[Result]] = {}
    for file in sorted(root.rglob("*.json")):
        try:
            result = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"report: {file} must be JSON, got {error}") from None
        if "provenance" not in result:
            continue
        if result["provenance"]["quick"]:
            raise ValueError(f"report: {file} must not come from --quick: its times mean nothing")
        devices.setdefault(str(file.parent.relative_to(root)), []).append(result)
    return devices


def markdown(root: Path, readme: Path) -> str:
    """What stands between the markers of the README; nothing where there are no results."""
    parts = []
    for folder, results in load_results(root).items():
        ops = [op for result in results for op in result.get("ops", ())]
        models = [model for result in results for model in result.get("models", ())]
        heats = [heat for result in results for heat in result.get("heats", ())]
        parts.append(f"### {results[0]['provenance']['device']}\n\n{origin(results)}")
        for model in models:
            parts.append(f"**{model_name(model)}**\n\n{pipes(MODEL_COLUMNS, model_rows(model))}")
        parts += [profile_section(p) for result in results for p in result.get("profiles", ())]
        parts += [quantized_section(r["quantized"]) for r in results if r.get("quantized")]
        parts += [quality_section(r["quality"]) for r in results if r.get("quality")]
        for heat in heats:
            parts.append(f"**{heat_name(heat)}**\n\n{pipes(HEAT_COLUMNS, heat_rows(heat))}")
            if any("budgets" in who for who in heat["contenders"]):
                table = pipes(BUDGET_COLUMNS, budget_rows(heat))
                summary = "Where the time goes, op by op"
                parts.append(f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>")
        if ops:
            columns = ("op", "case", "time", "rate", "of ceiling", "vs best peer")
            summary = f"{len(ops)} cases of {len({op['op'] for op in ops})} ops"
            table = pipes(columns, map(op_row, ops))
            parts.append(
                f"<details><summary>{summary}</summary>\n\n{table}\n\n\\{CACHED}\n\n</details>"
            )
        plot = root / folder / PLOT
        if plot.exists():
            link = Path(plot.resolve()).relative_to(readme.resolve().parent).as_posix()
            parts.append(f"![Share of the measured ceiling]({link})")
    return "\n\n".join(parts)


def op_row(op: Result) -> tuple[str, ...]:
    ours = op["contenders"][0]
    if "eager" not in ours:
        return op["op"], op["label"], f"{ours['status']}: {ours['note']}", "", "", ""
    mode = op["compared_in"] or ("graph" if "graph" in ours else "eager")
    timing = ours[mode]
    where = ", in a graph" if mode == "graph" else ""
    return (
        op["op"],
        op["label"],
        duration(timing) + where,
        rate(op, timing),
        share(op, timing),
        speedup(op),
    )


def origin(results: list[Result]) -> str:
    """One paragraph: versions, commits, dates, ceilings, tests, what failed."""
    versions = results[0]["provenance"]["versions"]
    packages = [f"{name} {version}" for name, version in versions.items() if version]
    sources = sorted(
        {
            f"{(p['commit'] or '')[:9] or 'source ' + p['source_hash']} on {p['date'][:10]}"
            for p in (r["provenance"] for r in results)
        }
    )
    lines = [f"Measured at {', '.join(sources)}, with {', '.join(packages)}."]
    ceilings = [r["ceilings"] for r in results if "ceilings" in r]
    if ceilings:
        c = ceilings[0]
        lines.append(
            f"Ceilings in the same run: copy {c['copy'] / 1e9:,.0f} GB/s (read + write), read "
            f"{c['read'] / 1e9:,.0f} GB/s, bf16 matmul {c['matmul'] / 1e12:.3g} TFLOP/s"
            + (f", int8 {c['int8'] / 1e12:.3g} Top/s." if c.get("int8") else ".")
        )
    for result in results:
        if "tests" in result:
            counts = (f"{n} {outcome}" for outcome, n in result["tests"].items() if n)
            lines.append(f"Tests on this device: {', '.join(counts)}.")
        if result.get("error"):
            lines.append(f"Stage {result['stage']} failed: {result['error']}.")
    return " ".join(lines)


def pipes(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = tuple(columns)
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
        ops = [op for r in results for op in r.get("ops", ()) if "eager" in op["contenders"][0]]
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


def bar(op: Result, who: str) -> float:
    mode = op["compared_in"] or "eager"
    name = op["contenders"][0]["name"] if who == "ours" else op["best_peer"]
    return next((c[mode]["share"] for c in op["contenders"] if c["name"] == name), 0.0)
