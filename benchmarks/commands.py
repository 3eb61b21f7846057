"""The command line: per op, whole models, the GPU run, quantised layers, quality, the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from rich.console import Console

from benchmarks import cpu_model, gpu, memory, quality, quantized, report, summary, tables, threads
from benchmarks.ceilings import Ceilings, CpuReadProbe, measure_ceilings
from benchmarks.harness import discover, run_case
from benchmarks.model_bench import MEMORY_SHARE, PLANS, QUICK_PLAN, Plan, measure_model
from benchmarks.peers import PEERS as CPU_PEERS
from benchmarks.provenance import PEERS, provenance
from benchmarks.record import FolderRecord, Record
from benchmarks.stages import Say, Stage, run_stages

CPU = torch.device("cpu")
console = Console(width=None if sys.stdout.isatty() else 120)

Result = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """Wrong arguments cost one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"benchmarks: {message}; {self.prog} --help tells more\n")


def parser() -> Parser:
    given_twice: Any = argparse.SUPPRESS  # before the command or after it
    top = Parser(prog="python -m benchmarks", description=__doc__)
    top.add_argument("--only", metavar="OP,…", help="these ops; 'model' is the whole model")
    top.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    commands = top.add_subparsers(
        dest="command",
        metavar="cpu-model | gpu | quality | quantized | threads | report",
        parser_class=Parser,
    )

    def common(to: argparse.ArgumentParser, default: Any = given_twice, needed: str = "") -> None:
        to.add_argument(
            "--json",
            metavar="FILE",
            type=Path,
            default=default,
            required=bool(needed),
            help="keep all results there, as they come; the same command goes on from them",
        )
        quick = False if default is None else default
        to.add_argument(
            "--quick", action="store_true", default=quick, help="see that all runs; no times"
        )
        to.add_argument(
            "--fresh", action="store_true", default=quick, help="measure again what FILE holds"
        )

    def bounded(to: argparse.ArgumentParser, default: Any = given_twice) -> None:
        to.add_argument(
            "--memory",
            metavar="SIZE",
            type=memory.size,
            default=default,
            help="at most so much, as 4G; default: a share of what is free, which the run tells",
        )

    common(top, None)
    bounded(top, None)

    heats = commands.add_parser(
        "cpu-model", help="whole models on the CPU beside transformers and llama.cpp, 8 minutes"
    )
    common(heats)
    bounded(heats)
    heats.add_argument("--heat", nargs="+", metavar="NAME", help="only these; default: all")

    run = commands.add_parser("gpu", help="the GPU run")
    run.add_argument("--out", metavar="DIR", type=Path, required=True, help="one JSON per stage")
    run.add_argument("--stage", nargs="+", choices=list(gpu.STAGES), help="default: all, in order")
    run.add_argument(
        "--fresh", "--force", action="store_true", help="run stages again that ended well"
    )

    damage = commands.add_parser("quality", help="what int4 and int8 do to the demo model's texts")
    common(damage)
    damage.add_argument("--draws", type=int, default=quality.DRAWS, help="permutations of channels")

    beside = commands.add_parser("quantized", help="int4 and int8 beside every peer, on the CPU")
    common(beside)
    bounded(beside)
    beside.add_argument("--stage", nargs="+", choices=list(quantized.STAGES), help="default: all")
    beside.add_argument("--peers", nargs="+", choices=list(CPU_PEERS))
    beside.add_argument("--force", action="store_true", dest="fresh", default=given_twice)

    shared = commands.add_parser("threads", help="one, all and the default, beside a busy process")
    common(shared)

    written = commands.add_parser("report", help="tables and plots from committed results")
    written.add_argument("results", metavar="RESULTS_DIR", type=Path)
    written.add_argument("--readme", type=Path, help="the file whose marked table to write")
    written.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    return top


def main(arguments: list[str] | None = None) -> int:
    try:
        args = parser().parse_args(arguments)
    except SystemExit as ended:  # --help, or wrong arguments
        return int(ended.code or 0)
    command: Callable[[argparse.Namespace], int] = {
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
    finally:
        memory.limit = None


def run_all(stages: list[Stage], record: Record) -> int:
    """The exit status; what failed is on stderr, a line each."""
    try:
        outcome = run_stages(stages, record, console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(record.summary()) from None
    for fault in outcome.faults:
        print(f"benchmarks: {fault}", file=sys.stderr)
    return outcome.status


def announce(origin: Result, peers: tuple[str, ...] = PEERS) -> None:
    """Says where this runs, and which peers it cannot compare with."""
    versions = origin["versions"]
    console.print(f"{origin['device']}, torch {versions['torch']}")
    missing = [peer for peer in peers if versions[peer] is None]
    if missing:
        console.print(f"skipped: not installed: {', '.join(missing)}", style="dim")


def announce_memory(asked: int | None, share: float = memory.SHARE) -> None:
    """Says how much memory the run takes at most, and why; ValueError where there is less."""
    free = memory.free_bytes(CPU)
    room = memory.allowed(asked, share)
    memory.limit = asked
    why = "--memory" if asked else f"{share:.0%} of the {memory.shown(free)} free"
    console.print(f"memory: at most {memory.shown(room)} ({why})")
    with console.status("measuring the cache"):
        console.print(memory.cache_line())


def run_here(args: argparse.Namespace) -> int:
    """Every op, then the whole model, on this machine; 1 if anything of ours was wrong."""
    only = args.only.split(",") if args.only else None
    modules = discover([op for op in only if op != "model"] if only else None)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"), 0)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be cpu, no CUDA device was found")
    origin = provenance(device, args.quick)
    record = Record("ops", origin, {}, args.json, args.fresh)
    announce(origin)
    if device.type == "cpu":
        announce_memory(args.memory)

    def ceilings_stage(say: Say) -> Iterator[Result]:
        say("copy, read, matmul")
        yield {"ceilings": asdict(measure_ceilings(device, args.quick))}

    def ceilings() -> Ceilings:
        return Ceilings(**record.result("ceilings")["ceilings"])

    def op_stage(module: ModuleType, say: Say) -> Iterator[Result]:
        cases, done = list(module.cases(device)), []
        probe = CpuReadProbe() if device.type == "cpu" and not args.quick else None
        for i, case in enumerate(cases):
            say(f"{i + 1} of {len(cases)}: {case.label}")
            done.append(run_case(case, device, ceilings(), probe, args.quick))
            yield {"ops": done}

    def model_stage(plan: Plan, say: Say) -> Iterator[Result]:
        for grown in measure_model(plan, device, ceilings(), say):
            yield {"models": [grown]}

    stages = [Stage("ceilings", ceilings_stage, needed=True)]
    stages += [
        Stage(
            op, partial(op_stage, module), wrong_ops, lambda result: tables.op_table(result["ops"])
        )
        for op, module in modules.items()
    ]
    if only is None or "model" in only:
        plans = (QUICK_PLAN,) if args.quick else PLANS[device.type]
        stages += [
            Stage(
                f"model {plan.model}",
                partial(model_stage, plan),
                table=lambda result: tables.model_table(result["models"][0]),
            )
            for plan in plans
        ]
    return run_all(stages, record)


def wrong_ops(result: Result) -> list[str]:
    return [
        f"{op['label']}: ours is {ours['status']}, {ours.get('note', '')}"
        for op in result.get("ops", ())
        if (ours := op["contenders"][0])["status"] != "ok"
    ]


def run_cpu_model(args: argparse.Namespace) -> int:
    """The heats of whole models, each contender in its own process."""
    heats = cpu_model.QUICK_HEATS if args.quick else cpu_model.HEATS
    names = [heat.name for heat in heats]
    unknown = [name for name in args.heat or () if name not in names]
    if unknown:
        raise ValueError(f"--heat must name some of {names}, got {unknown}")
    origin = provenance(CPU, args.quick, cpu_model.PEERS)
    record = Record("cpu-model", origin, {"memory": args.memory}, args.json, args.fresh)
    announce(origin, cpu_model.PEERS)
    announce_memory(args.memory, MEMORY_SHARE)

    def measure(heat: cpu_model.Heat, say: Say) -> Iterator[Result]:
        for grown in cpu_model.measure_heat(heat, torch.get_num_threads(), say, args.memory):
            yield {"heats": [grown]}

    stages = [
        Stage(
            heat.name,
            partial(measure, heat),
            lambda result: cpu_model.faults(result["heats"][0]),
            lambda result: tables.heat_table(result["heats"][0]),
        )
        for heat in heats
        if not args.heat or heat.name in args.heat
    ]
    return run_all(stages, record)


def run_gpu(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ValueError("gpu: must run on a machine with a CUDA device, found none")
    origin = provenance(gpu.CUDA)
    announce(origin)
    record = FolderRecord(origin, args.out, args.fresh)
    return run_all(gpu.stages(args.stage or list(gpu.STAGES)), record)


def run_quantized(args: argparse.Namespace) -> int:
    """Matrix by matrix; 1 if ours is not right in all of them, or a peer died."""
    if args.json is None:
        raise ValueError("quantized: --json FILE must say where the results go")
    peers = args.peers or list(CPU_PEERS)
    packages = tuple(CPU_PEERS[peer] for peer in peers if peer not in ("ours", "torch_linear"))
    origin = provenance(CPU, args.quick, packages)
    absent = [package for package in packages if origin["versions"][package] is None]
    if args.peers and absent:
        raise ValueError(
            f"quantized: --peers names {', '.join(absent)}, not installed: "
            "pip install -r benchmarks/peers/requirements.txt"
        )
    options = {"peers": peers, "memory": args.memory}
    record = Record("quantized", origin, options, args.json, args.fresh)
    announce(origin, packages)
    announce_memory(args.memory)
    effort = quantized.QUICK if args.quick else quantized.Effort()

    def measure(name: str, say: Say) -> Iterator[Result]:
        stage = quantized.STAGES[name]
        for grown in quantized.run_stage(stage, peers, effort, say, args.memory):
            yield {"quantized": {name: grown}}

    stages = [
        Stage(
            name,
            partial(measure, name),
            lambda result, name=name: quantized.faults(result["quantized"][name]),
            lambda result, name=name: tables.quantized_table(name, result["quantized"][name]),
        )
        for name in args.stage or quantized.STAGES
    ]
    return run_all(stages, record)


def run_quality(args: argparse.Namespace) -> int:
    if args.draws < 1:
        raise ValueError(f"quality: --draws must be at least 1, got {args.draws}")
    origin = provenance(CPU, args.quick)
    record = Record("quality", origin, {}, args.json, args.fresh)
    announce(origin)
    limit = 2 if args.quick else None

    def layers(say: Say) -> Iterator[Result]:
        say("errors of heavy-tailed weights")
        yield {"layers": quality.layer_errors()}

    def measure(draw: int, say: Say) -> Iterator[Result]:
        yield {"draws": [quality.measure_draw(quality.CONTENDERS, draw, limit, say)]}

    draws = 1 if args.quick else args.draws
    names = [f"draw {i + 1}" for i in range(draws)]

    def table(result: Result) -> Any:
        so_far = [record.result(name) for name in names if record.done(name)]
        return tables.quality_table(quality.summary([d for r in so_far for d in r["draws"]]))

    stages = [Stage("layers", layers)]
    stages += [Stage(name, partial(measure, i)) for i, name in enumerate(names)]
    status = run_all(stages, record)
    if any(record.done(name) for name in names):
        console.print(table({}))
    return status


def run_threads(args: argparse.Namespace) -> int:
    """A model on one thread, all and the default, alone and beside a busy process."""
    origin = provenance(CPU, args.quick)
    record = Record("threads", origin, {}, args.json, args.fresh)
    announce(origin)

    def measure(plan: threads.Plan, say: Say) -> Iterator[Result]:
        for grown in threads.measure(plan, say):
            yield {"threads": [grown]}

    stages = [
        Stage(
            plan.model,
            partial(measure, plan),
            table=lambda result: tables.threads_table(result["threads"][0]),
        )
        for plan in (threads.QUICK_PLANS if args.quick else threads.PLANS)
    ]
    return run_all(stages, record)


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
