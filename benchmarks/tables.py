"""Tables of results: for the terminal, and in Markdown.

An interrupted run leaves parts of results, and older runs had fewer fields: what is not there has
no row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich import box
from rich.markup import escape
from rich.table import Table

from benchmarks.quantized import compared

Result = dict[str, Any]
Row = tuple[str, ...]
S = TypeVar("S")
T = TypeVar("T")

# What a field or a figure that is not there raises.
ABSENT = (KeyError, IndexError, TypeError, AttributeError, ValueError, ZeroDivisionError)


def present(items: Iterable[S], make: Callable[[S], Iterable[T]]) -> Iterator[T]:
    """What `make` makes of every item; nothing of those that lack what it needs."""
    for item in items:
        try:
            made = list(make(item))
        except ABSENT:
            continue
        yield from made


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


def model_rows(model: Result) -> Iterator[Row]:
    yield from present(model.get("decode", ()), decode_rows)
    yield from present(model.get("first_token", ()), prompt_rows)
    yield from present(model.get("generate", ()), generate_rows)


def decode_rows(row: Result) -> Iterator[Row]:
    drawn = ", drawn" if row.get("drawn") else ""
    for mode, name in (("graph", "decode step in a CUDA graph"), ("eager", "decode step")):
        if mode in row:
            tokens = f"{row['context']:,} cached"
            speed, share = f"{row[mode]['tokens_per_s']:.1f}", f"{row[mode]['share']:.0%}"
            yield name + drawn, str(row["batch"]), tokens, speed, share, "", peak(row)


def prompt_rows(row: Result) -> Iterator[Row]:
    speed, share = f"{row['tokens_per_s']:.0f}", f"{row['share']:.0%}"
    yield "prompt, glm4", "1", f"{row['prompt']:,}", speed, share, first_token(row), peak(row)


def generate_rows(row: Result) -> Iterator[Row]:
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


def model_section(model: Result) -> Iterator[str]:
    yield f"**{model_name(model)}**\n\n{pipes(MODEL_COLUMNS, model_rows(model))}"


def profile_section(profile: Result) -> Iterator[str]:
    """One captured decode step: a budget of its ops, then its kernels."""
    title = (
        f"Where a decode step of {profile['model']} goes: batch {profile['batch']}, "
        f"{profile['context']:,} tokens cached, {profile['us'] / 1e3:.3f} ms in kernels"
    )
    tables = [pipes(STEP_KERNEL_COLUMNS, step_kernel_rows(profile))]
    if "budget" in profile:
        tables.insert(0, pipes(STEP_COLUMNS, step_rows(profile)))
    joined = "\n\n".join(tables)
    yield f"<details><summary>{title}</summary>\n\n{joined}\n\n</details>"


def step_rows(profile: Result) -> Iterator[Row]:
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


def step_kernel_rows(profile: Result) -> Iterator[Row]:
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
        table.add_row(*map(escape, row))
    table.caption = escape("\n".join(heat_notes(heat)))
    return table


def heat_name(heat: Result) -> str:
    layers = "all" if heat["all_layers"] else heat["layers"]
    sizes = f"{layers} layers, vocabulary {heat['vocab']:,}"
    return f"{heat['model']}, {sizes}, {heat['prompt']} tokens of prompt, random weights"


def heat_rows(heat: Result) -> Iterator[Row]:
    """Medians; for the speeds half the way from p20 to p80 too."""
    yield from present(heat["contenders"], contender_rows)


def contender_rows(who: Result) -> Iterator[Row]:
    """One row, empty where a contender did nothing."""
    decode, prefill = who.get("decode"), who.get("prefill")
    of_matmuls = (prefill or {}).get("of_matmuls")
    quantised = who.get("quantised_weights_per_s")
    n_bytes = who.get("bytes_per_token")
    yield (
        who["name"],
        f"{who['linear_bits']:.2f}" if "linear_bits" in who else "",
        f"{n_bytes / 1e9:.2f}" if n_bytes else "",
        speed(decode) if decode else who.get("note", ""),
        f"{decode['gb_per_s']:.1f}" if decode else "",
        f"{decode['share']:.0%}" if decode else "",
        speed(prefill) if prefill else "",
        "" if of_matmuls is None else f"{of_matmuls:.0%}",
        "" if quantised is None else f"{quantised / 1e6:.0f}",
        peak(who),
    )


def heat_notes(heat: Result) -> list[str]:
    """Who was left out, and who fell out."""
    fell = [f"{who['name']}: {who['note']}" for who in heat["contenders"] if "note" in who]
    return [f"skipped: {reason}" for reason in heat.get("skipped", ())] + fell


def speed(timing: Result) -> str:
    median = timing["tokens_per_s"]
    return f"{median:.4g} ±{(timing['p80'] - timing['p20']) / 2 / median:.0%}"


def heat_section(heat: Result) -> Iterator[str]:
    notes = "".join(f"\n\n{note[0].upper()}{note[1:]}." for note in heat_notes(heat))
    yield f"**{heat_name(heat)}**\n\n{pipes(HEAT_COLUMNS, heat_rows(heat))}{notes}"
    budgets = list(budget_rows(heat))
    if budgets:
        table, summary = pipes(BUDGET_COLUMNS, budgets), "Where the time goes, op by op"
        yield f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>"


BUDGET_COLUMNS = ("who", "pass", "op", "calls a layer", "µs a layer", "share")


def budget_rows(heat: Result) -> Iterator[Row]:
    """Each op of our passes, largest first, and Python between them."""
    layers = heat["layers"]

    def rows(who: Result) -> Iterator[Row]:
        for name, budget in who["budgets"].items():
            whole = budget["ms"] * 1e3
            for op, row in budget["ops"].items():
                us = row["us"] * row["calls"]
                calls = f"{row['calls'] / layers:.3g}"
                if us >= 0.001 * whole:
                    yield who["name"], name, op, calls, f"{us / layers:.0f}", f"{us / whole:.1%}"
            rest = budget["rest_us"]
            yield who["name"], name, "rest", "", f"{rest / layers:.0f}", f"{rest / whole:.1%}"

    yield from present(heat["contenders"], rows)


def peak(row: Result) -> str:
    return "" if row.get("peak_gib") is None else f"{row['peak_gib']:.1f} GiB"


THREADS_COLUMNS = ("", "contender", "tokens/s", "CPU ms/token", "others' processors")


def threads_table(result: Result) -> Table:
    table = Table(title=threads_name(result), caption=threads_ratios(result), **STYLE)
    for i, name in enumerate(THREADS_COLUMNS):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in threads_rows(result):
        table.add_row(*row)
    return table


def threads_section(result: Result) -> Iterator[str]:
    table = pipes(THREADS_COLUMNS, threads_rows(result))
    yield f"**Threads: {threads_name(result)}**\n\n{table}\n\n{threads_ratios(result)}"


def threads_name(result: Result) -> str:
    return f"{result['model']}, {result['layers']} layers"


def threads_rows(result: Result) -> Iterator[Row]:
    for condition in ("quiet", "crowded"):
        for entry in result.get(condition, ()):
            cpu, speed = 1e3 * entry["cpu_s_per_token"], entry["tokens_per_s"]
            yield condition, entry["name"], f"{speed:.1f}", f"{cpu:.2f}", f"{entry['others']:.2f}"


def threads_ratios(result: Result) -> str:
    if "crowded_default_of_one" not in result:
        return ""
    return (
        f"default / all threads, quiet: {result['quiet_default_of_all']:.2f}; default / one "
        f"thread, crowded: {result['crowded_default_of_one']:.2f}, wanted "
        f"{result['crowded_wanted']}"
    )


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


def quantized_rows(stages: dict[str, Result]) -> Iterator[Row]:
    def rows(named: tuple[str, Result]) -> Iterator[Row]:
        name, stage = named
        for key in dict.fromkeys(key for c in stage["contenders"] for key in c["tokens"]):
            row = [matrix(name, stage), key]
            for bits in (4, 8):
                ours, peer = compared(stage, bits, key)
                mine = ours and ours["tokens"][key]
                best = peer and peer["tokens"][key]
                row += [length(mine) if mine else "none"]
                row += [peer["name"], length(best)] if peer and best else ["none", ""]
                row += [f"{best['us'] / mine['us']:.2f}x" if mine and best else ""]
                row += [f"{mine['share']:.0%}" if mine else ""]
            yield tuple(row)

    yield from present(stages.items(), rows)


def accuracy_rows(stages: dict[str, Result]) -> Iterator[Row]:
    """From the stage that most contenders took part in, with the most tokens."""

    def size(stage: Result) -> tuple[int, int]:
        keys = [list(map(int, c["tokens"])) for c in stage["contenders"] if c["tokens"]]
        return len(keys), max((max(key) for key in keys), default=0)

    def rows(c: Result) -> Iterator[Row]:
        if c["tokens"]:
            bits = f"{8 * c['bytes'] / stage['n'] / stage['k']:.2f}"
            yield c["name"], bits, accuracy(c), c["what"]

    stage = max(stages.values(), key=size)
    yield from present(sorted(stage["contenders"], key=lambda c: c["bits"]), rows)


def quantized_section(stages: dict[str, Result]) -> Iterator[str]:
    stages = {name: stage for name, stage in stages.items() if stage.get("contenders")}
    if not stages:
        return
    turns = [t for s in stages.values() for c in s["contenders"] for t in c["tokens"].values()]
    died = {f"{name}, {line}" for name, s in stages.items() for line in s.get("died", ())}
    reads = sorted(r for t in turns for r in t.get("read_beside_gb_per_s", ()))
    peaks = sorted(p for t in turns for p in t.get("peak_beside_gop_per_s", ()))
    versions = {name: v for s in stages.values() for name, v in s.get("versions", {}).items() if v}
    skipped = sorted({line for s in stages.values() for line in s.get("skipped", ())})
    lines = [
        f"Beside {', '.join(f'{name} {version}' for name, version in versions.items())}, one "
        "interleaved run; weights int4 in groups of 128, int8 per channel."
    ]
    if reads and peaks:
        lines.append(
            f"Sampled beside the turns: read {at(reads, 0.5):.0f} GB/s (quartiles "
            f"{at(reads, 0.25):.0f} to {at(reads, 0.75):.0f}), 8-bit peak "
            f"{at(peaks, 0.5) / 1000:.2f} Top/s."
        )
    lines += [f"Skipped: {line}." for line in skipped]
    lines += [f"Died: {line}." for line in sorted(died)]
    times = pipes(QUANTIZED_COLUMNS, quantized_rows(stages))
    errors = pipes(ACCURACY_COLUMNS, accuracy_rows(stages))
    yield (
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


def quality_rows(quality: Result) -> Iterator[Row]:
    def rows(who: Result) -> Iterator[Row]:
        rises = (who[text] for text in ("en", "es", "prose", "all"))
        kl, ratio = who["kl_nats"], next(iter(who["kl_share"].values()))
        yield (
            who["name"],
            f"{who['bits_per_weight']:.2f}",
            *(f"{100 * rise['mean']:.2f} ± {100 * rise['half']:.2f} %" for rise in rises),
            f"{1000 * kl['mean']:.2f} ± {1000 * kl['half']:.2f}",
            f"{ratio['mean']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
        )

    yield from present(quality["contenders"], rows)


def quality_section(quality: Result) -> Iterator[str]:
    draws = f"the mean of {quality['draws']} draws of the rounding" if quality["draws"] > 1 else ""
    title = f"**Quantisation of the demo model: relative rise of held-out perplexity** {draws}"
    yield f"{title.strip()}\n\n{pipes(QUALITY_COLUMNS, quality_rows(quality))}"
    layers = quality["layers"]
    who = list(layers[0]["relative_squared_error"])
    errors = (
        (row["weights"], *(f"{row['relative_squared_error'][name]:.4f}" for name in who))
        for row in layers
    )
    title = "Squared error of int4 weights in groups of 128, over their square:"
    yield f"{title}\n\n{pipes(('weights', *who), errors)}"


OP_COLUMNS = ("op", "case", "time", "rate", "of ceiling", "vs best peer")


def op_rows(op: Result) -> Iterator[Row]:
    """One row."""
    ours = op["contenders"][0]
    if "eager" not in ours:
        yield op["op"], op["label"], f"{ours['status']}: {ours['note']}", "", "", ""
        return
    mode = op["compared_in"] or ("graph" if "graph" in ours else "eager")
    timing = ours[mode]
    where = ", in a graph" if mode == "graph" else ""
    yield (
        op["op"],
        op["label"],
        duration(timing) + where,
        rate(op, timing),
        share(op, timing),
        speedup(op),
    )


def pipes(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = tuple(columns)
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
