"""`python -m benchmarks …`: per op, whole model, the GPU run, the report. Runs from a clone."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import cpu_model, gpu, quality, quantized, report, summary, threads
from benchmarks.ceilings import measure_ceilings
from benchmarks.harness import discover, run_cases
from benchmarks.model_bench import PLANS, QUICK_PLAN, measure_model
from benchmarks.peers import PEERS as CPU_PEERS
from benchmarks.provenance import PEERS, provenance, write_json

console = Console(width=None if sys.stdout.isatty() else 120)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    top.add_argument("--only", metavar="OP,…", help="these ops; 'model' is the whole model")
    top.add_argument("--json", metavar="FILE", type=Path, help="write all results there")
    top.add_argument("--quick", action="store_true", help="see that all runs; times mean nothing")
    top.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    commands = top.add_subparsers(
        dest="command", metavar="cpu-model | gpu | quality | quantized | threads | report"
    )

    heats = commands.add_parser(
        "cpu-model", help="whole models on the CPU beside transformers and llama.cpp, 8 minutes"
    )
    heats.add_argument(
        "--json", metavar="FILE", type=Path, default=argparse.SUPPRESS, help="write results there"
    )
    heats.add_argument("--quick", action="store_true", default=argparse.SUPPRESS)
    heats.add_argument("--heat", nargs="+", metavar="NAME", help="only these; default: all")

    run = commands.add_parser("gpu", help="the GPU run, in resumable stages")
    run.add_argument("--out", metavar="DIR", type=Path, required=True, help="one JSON per stage")
    run.add_argument("--stage", nargs="+", choices=list(gpu.STAGES), help="default: all, in order")
    run.add_argument("--force", action="store_true", help="run stages again that ended well")

    damage = commands.add_parser("quality", help="what int4 and int8 do to the demo model's texts")
    damage.add_argument("--json", metavar="FILE", type=Path, default=argparse.SUPPRESS)
    damage.add_argument("--draws", type=int, default=quality.DRAWS, help="permutations of channels")
    damage.add_argument("--quick", action="store_true", default=argparse.SUPPRESS)

    beside = commands.add_parser("quantized", help="int4 and int8 beside every peer, on the CPU")
    beside.add_argument("--json", metavar="FILE", type=Path, required=True, help="grows by stage")
    beside.add_argument("--stage", nargs="+", choices=list(quantized.STAGES), help="default: all")
    beside.add_argument("--peers", nargs="+", choices=list(CPU_PEERS), default=list(CPU_PEERS))
    beside.add_argument(
        "--quick", action="store_true", default=argparse.SUPPRESS, help="times mean nothing"
    )
    beside.add_argument("--force", action="store_true", help="run stages again that FILE holds")

    shared = commands.add_parser("threads", help="one, all and the default, beside a busy process")
    shared.add_argument("--json", metavar="FILE", type=Path, default=argparse.SUPPRESS)
    shared.add_argument("--quick", action="store_true", default=argparse.SUPPRESS)

    tables = commands.add_parser("report", help="tables and plots from committed results")
    tables.add_argument("results", metavar="RESULTS_DIR", type=Path)
    tables.add_argument("--readme", type=Path, help="the file whose marked table to write")
    tables.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    return top


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    command = {
        None: run_here,
        "cpu-model": run_cpu_model,
        "gpu": run_gpu,
        "quality": run_quality,
        "quantized": run_quantized,
        "threads": run_threads,
        "report": run_report,
    }[args.command]
    try:
        return command(args)
    except (ValueError, OSError, MemoryError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def run_here(args: argparse.Namespace) -> int:
    """Every op, then the whole model, on this machine; 1 if anything of ours was wrong."""
    only = args.only.split(",") if args.only else None
    modules = discover([op for op in only if op != "model"] if only else None)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"), 0)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: must be cpu, no CUDA device was found")
    origin = announced(provenance(device, args.quick))
    with console.status("measuring the ceilings"):
        ceilings = measure_ceilings(device, args.quick)
    result: dict[str, Any] = {"provenance": origin, "ceilings": asdict(ceilings)}
    result |= {"ops": [], "models": []}

    def save(more: dict[str, Any] | None = None) -> None:
        if args.json:
            write_json(args.json, result | (more or {}))

    for op, module in modules.items():
        cases = list(module.cases(device))
        with console.status(op) as status:
            for i, done in enumerate(run_cases(cases, device, ceilings, args.quick)):
                result["ops"].append(done)
                status.update(f"{op}: {i + 1} of {len(cases)} cases")
                save()
        if cases:
            console.print(report.op_table(result["ops"][-len(cases) :]))

    if only is None or "model" in only:
        for plan in (QUICK_PLAN,) if args.quick else PLANS[device.type]:
            with console.status(plan.model) as status:
                for model in measure_model(plan, device, ceilings, status.update):
                    save({"models": [*result["models"], model]})
            result["models"].append(model)
            console.print(report.model_table(model))
    return 1 if any(op["contenders"][0]["status"] != "ok" for op in result["ops"]) else 0


def announced(origin: dict[str, Any]) -> dict[str, Any]:
    """Says where this runs, and which peers it cannot compare with."""
    versions = origin["versions"]
    console.print(f"{origin['device']}, torch {versions['torch']}")
    missing = [peer for peer in PEERS if versions[peer] is None]
    if missing:
        console.print(f"skipped: not installed: {', '.join(missing)}", style="dim")
    return origin


def run_cpu_model(args: argparse.Namespace) -> int:
    """The heats of whole models, each contender in its own process."""
    heats = cpu_model.QUICK_HEATS if args.quick else cpu_model.HEATS
    names = [heat.name for heat in heats]
    unknown = [name for name in args.heat or () if name not in names]
    if unknown:
        raise ValueError(f"--heat must name some of {names}, got {unknown}")
    chosen = tuple(heat for heat in heats if not args.heat or heat.name in args.heat)
    device = torch.device("cpu")
    result = {"provenance": provenance(device, args.quick, cpu_model.PEERS), "heats": []}
    for heat in chosen:
        with console.status(heat.name) as status:
            for done in cpu_model.measure_heat(heat, torch.get_num_threads(), status.update):
                if args.json:
                    write_json(args.json, result | {"heats": [*result["heats"], done]})
        result["heats"].append(done)
        console.print(report.heat_table(done))
    return 0


def run_gpu(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ValueError("gpu: must run on a machine with a CUDA device, found none")
    stages = {name: gpu.STAGES[name] for name in args.stage or gpu.STAGES}
    origin = announced(provenance(gpu.CUDA))
    failed = gpu.run_stages(stages, args.out, origin, args.force, console.print)
    if failed:
        print(f"benchmarks: gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_quantized(args: argparse.Namespace) -> int:
    """Stage by stage; 1 if ours is not right in all of them."""
    origin = provenance(torch.device("cpu"), args.quick)
    stages = quantized.held(args.json, origin) if args.json.exists() and not args.force else {}
    wanted = args.stage or list(quantized.STAGES)
    for name in wanted:
        if quantized.complete(stages.get(name), args.peers):
            console.print(f"{name}: already there", style="dim")
            continue
        with console.status(name) as status:
            say = lambda what, name=name: status.update(f"{name}: {what}")  # noqa: E731
            effort = quantized.QUICK if args.quick else quantized.Effort()
            for result in quantized.run_stage(quantized.STAGES[name], args.peers, effort, say):
                stages[name] = result
                if not console.is_terminal:
                    console.print(f"{name}: {len(result['timed'])} of {len(result['tokens'])} done")
                write_json(args.json, {"provenance": origin, "quantized": stages})
        console.print(report.quantized_table(name, stages[name]))
    return 0 if all(quantized.ours_is_right(stages[name]) for name in wanted) else 1


def run_threads(args: argparse.Namespace) -> int:
    origin = announced(provenance(torch.device("cpu"), args.quick))
    results: list[dict[str, Any]] = []
    for plan in threads.QUICK_PLANS if args.quick else threads.PLANS:
        with console.status(plan.model) as status:
            for result in threads.measure(plan, status.update):
                if args.json:
                    write_json(args.json, {"provenance": origin, "threads": [*results, result]})
        results.append(result)
        console.print(report.threads_table(result))
    return 0


def run_quality(args: argparse.Namespace) -> int:
    if args.draws < 1:
        raise ValueError(f"quality: --draws must be at least 1, got {args.draws}")
    origin = announced(provenance(torch.device("cpu"), args.quick))
    layers = quality.layer_errors()
    with console.status("quality") as status:
        draws, limit = (1, 2) if args.quick else (args.draws, None)
        for result in quality.measure(quality.CONTENDERS, draws, limit, status.update):
            if args.json:
                found = {"provenance": origin, "quality": result | {"layers": layers}}
                write_json(args.json, found)
    console.print(report.quality_table(result))
    return 0


def run_report(args: argparse.Namespace) -> int:
    """Writes plots, RESULTS_DIR/README.md and the README's table; with --check only compares."""
    if not args.check:
        try:
            for written in report.plot(args.results):
                console.print(f"wrote {written}")
        except ImportError:
            console.print("skipped: plots: matplotlib is not installed")
    if args.readme is None:
        print(report.markdown(args.results))
        return 0
    for file, fresh in summary.pages(args.results, args.readme).items():
        if file.exists() and file.read_text() == fresh:
            continue
        if args.check:
            raise ValueError(
                f"report: {file} is out of date; run "
                f"python -m benchmarks report {args.results} --readme {args.readme}"
            )
        file.write_text(fresh)
        console.print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
