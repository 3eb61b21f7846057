"""The launches that GLM-4 makes: every Triton op at the models' real shapes, on meta tensors.

    python tests/launches.py --write               # compiles all of them for every architecture,
    python tests/launches.py --write --only rope   # or those of some ops, and commits the figures
                                                   # to tests/aot_resources/triton-<version>.json

Shapes are listed here; what is launched for them (kernels, tiles, warps, specialisations) is
captured from the launchers. test_ahead_of_time.py calls `measure` in a process of its own, since
under TRITON_INTERPRET=1 nothing compiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
FIGURES = Path(__file__).parent / "aot_resources"
if __name__ == "__main__":
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import torch  # noqa: E402
import triton  # noqa: E402
from kernels import TRITON_OPS as OPS  # noqa: E402
from offset_overflow import overflowing_products  # noqa: E402
from torch import Tensor  # noqa: E402

import glm4_kernels  # noqa: E402
from benchmarks.shapes import SHAPES, ModelShape  # noqa: E402
from glm4.cache import PAGE_SIZE  # noqa: E402
from glm4_kernels.add_rms_norm import launch_add_rms_norm, launch_add_rms_norm_quantized  # noqa: E402
from glm4_kernels.ahead_of_time import (  # noqa: E402
    MULTIPROCESSORS,
    Launch,
    all_figures,
    capture,
    compile_launch,
)
from glm4_kernels.decode_advance import launch_decode_advance  # noqa: E402
from glm4_kernels.decode_schedule import (  # noqa: E402
    launch_decode_schedule,
    programs_per_kv_head,
    schedule_rows,
)
from glm4_kernels.flash_decode import launch_flash_decode  # noqa: E402
from glm4_kernels.merge_attention import launch_merge_attention  # noqa: E402
from glm4_kernels.rms_norm import launch_rms_norm, launch_rms_norm_quantized  # noqa: E402
from glm4_kernels.rope import launch_rope  # noqa: E402
from glm4_kernels.rope_kv_write import launch_rope_kv_write  # noqa: E402
from glm4_kernels.sample import launch_sample  # noqa: E402
from glm4_kernels.sandwich_norm import launch_sandwich_norm, launch_sandwich_norm_quantized  # noqa: E402
from glm4_kernels.swiglu import launch_swiglu  # noqa: E402

EPS = 1.5625e-07
CONTEXT = 1 << 20  # the longest of the family
TOKENS = {"1 token": 1, "64 tokens": 64, "1M tokens": CONTEXT}
# One shape per group of query heads: 16, 8, 24, 6.
ATTENTION_MODELS = ("glm-4-9b", "glm-4-9b-chat-1m", "glm-4-32b-0414", "glm-z1-rumination-32b-0414")
EVERYWHERE = ("glm-4-9b", "glm-4-32b-0414")  # the two that the test compiles for every GPU
# (label, batch, queries a sequence, context): one sequence at the longest context, captured
# batches, and speculative verification.
DECODES = (
    ("1 x 1M", 1, 1, CONTEXT),
    ("8 x 32K", 8, 1, 32768),
    ("64 x 8K", 64, 1, 8192),
    ("1 x 4 queries x 128K", 1, 4, 1 << 17),
)
Identity = tuple[str, str, int]  # of a launch; equal for those that compile to the same binary
META = torch.device("meta")
BF16, FP16, INT8, FP8 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """One call of a launcher at a size that GLM-4 meets."""

    op: str
    label: str
    launch: Callable[[], Any]
    everywhere: bool  # the test compiles it for all architectures, not for sm_90 alone
    min_capability: int = 80
    # Launched with PDL: global accesses of one thread ahead of its wait, those to weights.
    before_wait: int | None = None


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases() -> Iterator[Case]:
    for dtype in (BF16, FP16):
        for model in EVERYWHERE:
            for length, n_tokens in TOKENS.items():
                label = f"{model}, {length}, {name(dtype)}"
                for op, launch in row_launches(SHAPES[model], n_tokens, dtype).items():
                    yield Case(op, label, launch, everywhere=dtype == BF16)

    for model in EVERYWHERE:
        yield from row_variants(model)
    for length in ("1 token", "1M tokens"):
        yield from dependent_launches("glm-4-9b", length)

    for model in ATTENTION_MODELS:
        for table_dtype in (BF16, torch.float32):
            yield from rope_cases(model, table_dtype)
        yield from merge_attention_cases(model)
        for cache_dtype in (BF16, INT8, FP8):
            yield from rope_kv_write_cases(model, BF16, cache_dtype)
            yield from flash_decode_cases(model, BF16, cache_dtype)
    yield from sample_cases("glm-4-9b")
    yield from rope_kv_write_cases("glm-4-9b", FP16, FP16)
    yield from flash_decode_cases("glm-4-9b", FP16, FP16)


def row_launches(
    shape: ModelShape, n_tokens: int, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """The ops over rows of one width."""
    x = meta(n_tokens, shape.hidden, dtype=dtype)
    weight = meta(shape.hidden, dtype=dtype)
    gate_up = meta(n_tokens, 2 * shape.ffn, dtype=dtype)
    return {
        "rms_norm": lambda: launch_rms_norm(x, weight, EPS),
        "add_rms_norm": lambda: launch_add_rms_norm(x, x, weight, EPS),
        "sandwich_norm": lambda: launch_sandwich_norm(x, x, weight, weight, EPS),
        "swiglu": lambda: launch_swiglu(gate_up),
    }


def row_variants(model: str) -> Iterator[Case]:
    """Quantised outputs and fp32 rounding, which the number of rows does not change."""
    shape, everywhere = SHAPES[model], model == "glm-4-9b"
    x, w = meta(1, shape.hidden), meta(shape.hidden)
    norms = {
        "rms_norm": (launch_rms_norm, launch_rms_norm_quantized, (x, w, EPS)),
        "add_rms_norm": (launch_add_rms_norm, launch_add_rms_norm_quantized, (x, x, w, EPS)),
        "sandwich_norm": (
            *(launch_sandwich_norm, launch_sandwich_norm_quantized),
            (x, x, w, w, EPS),
        ),
    }
    for op, (launch, launch_quantized, arguments) in norms.items():
        fp32 = partial(launch, *arguments, rounding="fp32")
        yield Case(op, f"{model}, fp32 rounding", fp32, everywhere)
        for dtype, group_size in ((INT8, None), (INT8, 64), (FP8, None)):
            label = f"{model}, {name(dtype)}, {f'groups of {group_size}' if group_size else 'rows'}"
            quantised = partial(launch_quantized, *arguments, dtype, group_size)
            yield Case(op, label, quantised, everywhere, 89 if dtype == FP8 else 80)
    fp32 = partial(launch_swiglu, meta(1, 2 * shape.ffn), "fp32")
    yield Case("swiglu", f"{model}, fp32 rounding", fp32, everywhere)


def dependent_launches(model: str, length: str) -> Iterator[Case]:
    """Programmatic dependent launch; a weight of 4096 is two loads of each thread."""
    shape, n_tokens = SHAPES[model], TOKENS[length]
    x, w = meta(n_tokens, shape.hidden), meta(shape.hidden)
    heads, index = packed_qkv(shape, n_tokens, BF16), meta(n_tokens, dtype=torch.int64)
    q, k, _ = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    pages, _ = cache(shape, 2 * CONTEXT // PAGE_SIZE, BF16)
    bias = meta(heads.shape[1] * shape.head_dim)
    write = (heads.flatten(1), index, table(BF16), pages, pages, index, shape.heads, bias)
    for op, launch, arguments, before_wait in (
        ("rms_norm", launch_rms_norm, (x, w, EPS), 2),
        ("add_rms_norm", launch_add_rms_norm, (x, x, w, EPS), 2),
        ("sandwich_norm", launch_sandwich_norm, (x, x, w, w, EPS), 4),
        ("swiglu", launch_swiglu, (meta(n_tokens, 2 * shape.ffn),), 0),
        ("rope", launch_rope, (q, k, index, table(BF16)), 0),
        ("rope_kv_write", launch_rope_kv_write, write, 1 if n_tokens == 1 else 2),
    ):
        dependent = partial(launch, *arguments, pdl=True)
        yield Case(op, f"{model}, {length}, PDL", dependent, True, 90, before_wait)


def rope_cases(model: str, table_dtype: torch.dtype) -> Iterator[Case]:
    shape = SHAPES[model]
    for length, n_tokens in TOKENS.items():
        q, k, _ = packed_qkv(shape, n_tokens, BF16).split(
            [shape.heads, shape.kv_heads, shape.kv_heads], dim=1
        )
        yield Case(
            "rope",
            f"{model}, {length}, {name(table_dtype)} table",
            partial(launch_rope, q, k, meta(n_tokens, dtype=torch.int64), table(table_dtype)),
            everywhere=model in EVERYWHERE and table_dtype == BF16,
        )


def rope_kv_write_cases(model: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> Iterator[Case]:
    shape = SHAPES[model]
    for length, n_tokens in TOKENS.items():
        qkv = packed_qkv(shape, n_tokens, dtype).flatten(1)
        pages, scale = cache(shape, 2 * CONTEXT // PAGE_SIZE, cache_dtype)
        index = meta(n_tokens, dtype=torch.int64)
        bias = meta(qkv.shape[1], dtype=dtype) if shape.qkv_bias else None
        yield Case(
            "rope_kv_write",
            f"{model}, {length}, {name(dtype)}, {name(cache_dtype)} cache",
            partial(
                launch_rope_kv_write,
                *(qkv, index, table(dtype), pages, pages, index, shape.heads, bias, scale, scale),
            ),
            everywhere=model in EVERYWHERE and length == "64 tokens" and dtype == BF16,
            min_capability=89 if cache_dtype == FP8 else 80,
        )


def flash_decode_cases(model: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> Iterator[Case]:
    shape = SHAPES[model]
    for sizes, batch, n_queries, context in DECODES:
        queries = (batch,) if n_queries == 1 else (batch, n_queries)
        q = meta(*queries, shape.heads, shape.head_dim, dtype=dtype)
        max_pages = context // PAGE_SIZE
        pages, scale = cache(shape, batch * max_pages, cache_dtype)
        block_table = meta(batch, max_pages, dtype=torch.int32)
        lengths = meta(batch, dtype=torch.int32)
        for schedule in ("shared", "batch-invariant"):
            invariant = schedule == "batch-invariant"
            group = shape.heads, shape.kv_heads, n_queries, invariant
            if dtype == cache_dtype == BF16:
                yield Case(
                    "decode_schedule",
                    f"{model}, {sizes}, {schedule}",
                    partial(launch_decode_schedule, lengths, *group),
                    everywhere=model in EVERYWHERE and context == CONTEXT,
                )
        # A layer's two kernels, as the model launches them; and with programmatic dependent launch.
        programs = programs_per_kv_head(n_queries * shape.group, shape.kv_heads, META)
        made = meta(schedule_rows(batch, programs, shape.kv_heads, False), 4, dtype=torch.int32)
        softmax_scale = shape.head_dim**-0.5
        first = (model, batch, cache_dtype) == ("glm-4-9b", 1, BF16)
        for pdl in (False, True) if first else (False,):
            yield Case(
                "flash_decode",
                f"{model}, {sizes}, {name(dtype)}, {name(cache_dtype)} cache{', PDL' * pdl}",
                partial(
                    launch_flash_decode,
                    *(q, pages, pages, block_table, lengths, softmax_scale, scale, scale, made),
                    pdl=pdl,
                ),
                everywhere=model in EVERYWHERE and batch == 1 and dtype == BF16,
                min_capability=90 if pdl else 89 if cache_dtype == FP8 else 80,
                before_wait=0 if pdl else None,
            )


def merge_attention_cases(model: str) -> Iterator[Case]:
    shape = SHAPES[model]
    for length, n_tokens in TOKENS.items():
        out = meta(n_tokens, shape.heads, shape.head_dim)
        lse = meta(n_tokens, shape.heads, dtype=torch.float32)
        yield Case(
            "merge_attention",
            f"{model}, {length}, bfloat16",
            partial(launch_merge_attention, out, lse, out, lse),
            everywhere=model in EVERYWHERE,
        )


def sample_cases(model: str) -> Iterator[Case]:
    """The end of a step: a token of each row, and the rows after it."""
    vocab = SHAPES[model].vocab
    for n_rows in (1, 64):
        logits = meta(n_rows, vocab)
        uniform = meta(n_rows, dtype=torch.float64)
        seen = meta(n_rows, vocab, dtype=torch.bool)
        for label, arguments in {
            "greedy": (),
            "greedy, penalty": (None, seen, 1.0, None, 1.0, 1.1),
            "drawn": (uniform, None, 0.8),
            "top-k": (uniform, None, 0.8, 50),
            "top-p": (uniform, None, 0.8, None, 0.8),
            "penalty, top-k, top-p": (uniform, seen, 0.8, 50, 0.8, 1.1),
        }.items():
            yield Case(
                "sample",
                f"{model}, {n_rows} rows, {label}",
                partial(launch_sample, logits, *arguments),
                everywhere=True,
            )
        counts = [meta(n_rows, dtype=torch.int64) for _ in range(4)]
        tokens, positions, slots, n_drawn = counts
        lengths = meta(n_rows, dtype=torch.int32)
        flags, results = meta(3, dtype=torch.int32), meta(3 + n_rows, dtype=torch.int64)
        table = meta(n_rows, CONTEXT // PAGE_SIZE, dtype=torch.int32)
        yield Case(
            "decode_advance",
            f"{model}, {n_rows} rows",
            partial(
                launch_decode_advance,
                *(tokens, flags, table, meta(n_rows, 1024, dtype=torch.float64), PAGE_SIZE),
                *(tokens, positions, lengths, slots, n_drawn, uniform, results),
            ),
            everywhere=True,
        )


def packed_qkv(shape: ModelShape, n_tokens: int, dtype: torch.dtype) -> Tensor:
    return meta(n_tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim, dtype=dtype)


def table(dtype: torch.dtype) -> Tensor:
    return meta(CONTEXT, 64, dtype=dtype)


def cache(shape: ModelShape, n_pages: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Pages of K or of V, and their scales where they are quantised."""
    sizes = (n_pages, shape.kv_heads, PAGE_SIZE)
    scale = meta(*sizes, dtype=torch.float32) if dtype in (INT8, FP8) else None
    return meta(*sizes, shape.head_dim, dtype=dtype), scale


def measure(op: str, capability: int, everything: bool = False) -> list[dict[str, Any]]:
    """A row for each launch of an op on one GPU: its figures, and the products that overflow; or
    the error. Launches that are equal are compiled once.

    Args:
        everything: also what test_ahead_of_time.py leaves out.
    """
    rows: list[dict[str, Any]] = []
    launches: list[Launch | None] = []  # of each row
    wanted: dict[Identity, Launch] = {}
    for case in cases():
        if case.op != op or capability < case.min_capability:
            continue
        row = {"op": op, "case": case.label, "arch": f"sm_{capability}"}
        row |= {"before_wait": case.before_wait}
        try:
            captured = capture(case.launch, capability)
        except Exception as error:
            rows.append({**row, "kernel": "", "error": f"{type(error).__name__}: {error}"})
            launches.append(None)
            continue
        for launch in captured:
            rows.append({**row, "kernel": launch.kernel_name})
            launches.append(launch)
            if everything or capability == 90 or case.everywhere:
                wanted.setdefault(launch.identity, launch)

    results = compile_all(wanted)
    seen: set[Identity] = set()
    for row, launch in zip(rows, launches, strict=True):
        if launch and launch.identity in results:
            compiled = results[launch.identity]
            row |= {"first": launch.identity not in seen, **compiled}
            overflows = overflowing_products(row.pop("ttir", ""), launch.grid, launch.integers)
            row["overflows"] = sorted(set(overflows))
            seen.add(launch.identity)
    return [row for row in rows if "figures" in row or "error" in row]


def compile_all(launches: dict[Identity, Launch]) -> dict[Identity, dict[str, Any]]:
    """The figures and the Triton IR of each launch, or the error."""
    compiled, results = {}, {}
    for identity, launch in launches.items():
        try:
            compiled[identity] = compile_launch(launch)
        except Exception as error:
            results[identity] = {"error": f"{type(error).__name__}: {error}"}
    for identity, made in zip(compiled, all_figures(list(compiled.values())), strict=True):
        ttir = compiled[identity].asm["ttir"]
        results[identity] = {"figures": dataclasses.asdict(made), "ttir": ttir}
    return results


def never_launched() -> list[str]:
    """The kernels of the package that no case reaches on any GPU."""
    launched = {
        launch.kernel
        for case in cases()
        for capability in MULTIPROCESSORS
        if capability >= case.min_capability
        for launch in capture(case.launch, capability)
    }
    return sorted(kernel.fn.__qualname__ for kernel in kernels() - launched)


def kernels() -> set[Any]:
    """Every Triton kernel of the package (`_<op>_kernel`; device functions have other names)."""
    modules = [
        importlib.import_module(f"glm4_kernels.{module.name}")
        for module in pkgutil.iter_modules(glm4_kernels.__path__)
        if not module.name.startswith("_")
    ]
    return {
        value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }


def figures_path(version: str) -> Path:
    """Figures are kept per minor version: another Triton compiles differently."""
    return FIGURES / f"triton-{'.'.join(version.split('.')[:2])}.json"


def figures_table(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{"sm_90": {"op | kernel | case": figures}}: one row per distinct binary, named after the
    first case that launches it."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("first") and "figures" in row:
            key = f"{row['op']} | {row['kernel']} | {row['case']}"
            table.setdefault(row["arch"], {})[key] = row["figures"]
    return table


def write_figures(rows: list[dict[str, Any]], only: list[str]) -> Path:
    """Commits the figures, row by row in the order of ops; those of other ops than `only` stay."""
    path = figures_path(triton.__version__)
    tables = figures_table(rows)
    if set(only) < set(OPS):
        for arch, committed in json.loads(path.read_text()).items():
            kept = {key: row for key, row in committed.items() if op_of(key) not in only}
            tables[arch] = kept | tables.get(arch, {})
    blocks = []
    for arch in sorted(tables, key=lambda arch: int(arch.removeprefix("sm_"))):
        of_arch = sorted(tables[arch].items(), key=lambda row: op_of(row[0]))
        body = ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in of_arch)
        blocks.append(f"  {json.dumps(arch)}: {{\n{body}\n  }}")
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    return path


def op_of(key: str) -> str:
    return key.partition(" | ")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile GLM-4's launches without a GPU.")
    parser.add_argument("--write", action="store_true", help="commit all figures to the table")
    parser.add_argument(
        "--only", nargs="+", metavar="OP", choices=OPS, default=OPS, help="the others stay"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    parts = list(product(arguments.only, MULTIPROCESSORS, [arguments.write]))
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        rows = [row for part in pool.map(measure, *zip(*parts, strict=True)) for row in part]
    if not arguments.write:
        json.dump(rows, sys.stdout)
        return
    path = write_figures(rows, arguments.only)
    errors = [row for row in rows if "error" in row]
    for row in errors:
        print(f"{row['arch']} {row['op']}, {row['case']}: {row['error']}", file=sys.stderr)
    n_binaries = sum(row.get("first", False) for row in rows)
    print(f"{path}: {n_binaries} binaries, {len(errors)} launches failed")
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
