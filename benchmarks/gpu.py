"""The GPU run: build, test, time, in stages that each write one JSON file.

    python -m benchmarks gpu --out DIR                         all stages that DIR does not hold yet
    python -m benchmarks gpu --out DIR --stage kernels-decode  only this one

Each stage runs in its own process under its own time limit, so that a crash or a hang costs one
stage. Its file grows while it runs: what was measured before a failure is kept, beside the error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.harness import Case, discover, is_lost, run_case
from benchmarks.model_bench import Plan, decoder_at, made, measure_model, rewind
from benchmarks.provenance import REPOSITORY
from benchmarks.stages import Say, Stage, apart
from benchmarks.step_profile import budget_rows, kernel_rows, profile_step, step_op_bytes
from benchmarks.worker import Worker, WorkerError

CUDA = torch.device("cuda", 0)


@dataclass(frozen=True)
class Limited:
    """A stage, and its time limit."""

    run: Callable[[], Iterator[dict[str, Any]]]  # yields its result as it grows; picklable
    minutes: float  # after these it is stopped


def build() -> Iterator[dict[str, Any]]:
    """Builds the extension in place, from what is installed: no network."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    began = time.monotonic()
    subprocess.run([*command, "-e", str(REPOSITORY)], check=True)
    found = subprocess.run(
        [sys.executable, "-m", "glm4", "env", "--json"],
        capture_output=True, text=True, cwd=REPOSITORY, check=True,
    )  # fmt: skip
    environment = json.loads(found.stdout)
    kept = {name: environment[name] for name in ("packages", "extension", "missing")}
    yield {"build_seconds": time.monotonic() - began, "environment": kept}


def tests() -> Iterator[dict[str, Any]]:
    """Runs what each test file has for a GPU in a process of its own, some at a time; fails if a
    test failed. The other tests need no GPU."""
    files = sorted((REPOSITORY / "tests").glob("test_*.py"))
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    result: dict[str, Any] = {"tests": counts, "failures": [], "files_left": len(files)}
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        running = [pool.submit(run_test_file, file, "--gpu-only") for file in files]
        for ended in as_completed(running):
            for outcome, test, message in ended.result():
                counts[outcome] += 1
                if outcome == "failed":
                    result["failures"].append({"test": test, "message": message})
            result["files_left"] -= 1
            yield result
    if counts["failed"]:
        raise RuntimeError(f"{counts['failed']} tests failed")


# Far above the minute or two that a test file should take: what takes this long hangs.
FILE_SECONDS = 300.0


def run_test_file(file: Path, *options: str) -> list[tuple[str, str, str]]:
    """(outcome, test, message) of each test of one file."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
        try:
            ran = subprocess.run(
                [*command, *options, f"--junitxml={junit}", str(file)],
                capture_output=True, text=True, errors="replace", cwd=REPOSITORY,
                timeout=FILE_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return [("failed", file.name, f"took more than {FILE_SECONDS:g} s")]
        print(ran.stdout[-4000:], flush=True)
        if not junit.exists():
            return [("failed", file.name, f"pytest ended with {ran.returncode}")]
        outcomes = []
        for case in ElementTree.parse(junit).iter("testcase"):
            test = f"{case.get('classname')}::{case.get('name')}"
            bad = [case.find(kind) for kind in ("failure", "error")]
            message = next((b.get("message", "") for b in bad if b is not None), None)
            if message is not None:
                outcomes.append(("failed", test, message.split("\n")[0][:300]))
            else:
                skipped = case.find("skipped") is not None
                outcomes.append(("skipped" if skipped else "passed", test, ""))
        return outcomes


# Far above the seconds that a case should take, compiling included: what takes this long hangs.
CASE_SECONDS = 90.0

# Ops by the stage that times them: decode attention alone fills one. None: all others.
KERNELS: dict[str, tuple[str, ...] | None] = {
    "kernels-decode": ("flash_decode",),
    "kernels-large": ("merge_attention", "prefill_attention", "quantized_matmul"),
    "kernels-sample": ("sample", "decode_advance"),  # torch.compile takes long over sort and sums
    "kernels-small": None,
}


def ops_of(stage: str) -> tuple[str, ...]:
    named = [op for ops in KERNELS.values() for op in ops or ()]
    return KERNELS[stage] or tuple(op for op in discover() if op not in named)


def cases_of(stage: str, device: torch.device = CUDA) -> list[Case]:
    modules = discover()
    return [case for op in ops_of(stage) for case in modules[op].cases(device)]


def kernels(
    cases: Callable[[], list[Case]], device: torch.device = CUDA
) -> Iterator[dict[str, Any]]:
    """Times the cases; fails, at the end, if one of ours was wrong or failed."""
    result: dict[str, Any] = {"ops": [], "failed": []}
    for kind, found in timed_apart(cases, device):
        if kind == "ceilings":
            result.setdefault(kind, found)
        else:
            result[kind].append(found)
        yield result
    wrong = [
        f"{op['op']} ({op['label']})"
        for op in result["ops"]
        if op["contenders"][0]["status"] != "ok"
    ]
    if wrong or result["failed"]:
        raise RuntimeError(f"wrong or failed: {'; '.join(result['failed'] + wrong)}")


def timed_apart(cases: Callable[[], list[Case]], device: torch.device) -> Iterator[tuple[str, Any]]:
    """What `CaseTimer` finds in a process of its own: a case that kills it, or takes longer than
    `CASE_SECONDS`, costs no more than itself. The next ones go on in another process."""
    worker = Worker(CaseTimer, cases, device, silent=False)
    try:
        ceilings = worker.call("measure_ceilings")
        yield "ceilings", asdict(ceilings)
        for i, case in enumerate(worker.call("names")):
            if worker.process.poll() is not None:
                worker = Worker(CaseTimer, cases, device, ceilings, silent=False)
                worker.call("names")  # importing torch is no part of a case
            try:
                yield "ops", worker.call("time", i, seconds=CASE_SECONDS)
            except WorkerError as error:
                yield "failed", f"{case}: {error}"
                if error.died or worker.call("is_lost"):
                    worker.end()
    finally:
        worker.end()


class CaseTimer:
    """Times cases one by one, under ceilings measured once."""

    def __init__(
        self,
        cases: Callable[[], list[Case]],
        device: torch.device,
        ceilings: Ceilings | None = None,
    ) -> None:
        self.cases, self.device, self.ceilings = cases(), device, ceilings

    def measure_ceilings(self) -> Ceilings:
        self.ceilings = measure_ceilings(self.device)
        return self.ceilings

    def names(self) -> list[str]:
        return [f"{case.op} ({case.label})" for case in self.cases]

    def time(self, i: int) -> dict[str, Any]:
        assert self.ceilings is not None
        try:
            done = run_case(self.cases[i], self.device, self.ceilings)
        except Exception:
            traceback.print_exc()
            raise
        print(f"{self.names()[i]}: {times(done)}", flush=True)
        return done

    def is_lost(self) -> bool:
        """Whether a kernel has failed on the GPU, so that the next case needs another process."""
        return is_lost()


def times(op: dict[str, Any]) -> str:
    """Of everybody, in a graph if there is one, for who watches the run."""
    return ", ".join(
        f"{c['name']} {c.get('graph', c['eager'])['us']:.4g} us" if "eager" in c else
        f"{c['name']} {c['status']}"
        for c in op["contenders"]
    )  # fmt: skip


def model(plan: Plan) -> Iterator[dict[str, Any]]:
    ceilings = measure_ceilings(CUDA)
    for grown in measure_model(plan, CUDA, ceilings):
        yield {"ceilings": asdict(ceilings), "models": [grown]}


def profile(plan: Plan, device: torch.device = CUDA) -> Iterator[dict[str, Any]]:
    """Every kernel of a replayed decode step, and a budget of its ops."""
    ceilings = measure_ceilings(device)
    model = made(plan, device)
    result: dict[str, Any] = {"ceilings": asdict(ceilings), "profiles": []}
    failed = []
    for context in plan.contexts:
        for batch in plan.batches:
            with torch.inference_mode():
                decoder = decoder_at(model, batch, context)
                for _ in range(4):  # compiles, captures, warms up
                    decoder.launch(batch)
                    rewind(decoder, context)
                called, replayed = profile_step(decoder, batch)
            found: dict[str, Any] = {
                "model": plan.model,
                "layers": model.config.layers,
                "batch": batch,
                "context": context,
                "us": sum(kernel.us for kernel in replayed),
                "kernels": kernel_rows(replayed),
            }
            result["profiles"].append(found)
            op_bytes, bandwidth = step_op_bytes(model, batch, context), ceilings.bandwidth(device)
            try:
                found["budget"] = budget_rows(called, replayed, op_bytes, bandwidth)
            except ValueError as error:
                failed.append(f"{batch} x {context}: {error}")
            yield result
    if failed:
        raise ValueError(f"no budget of {'; '.join(failed)}")


# A prompt and its first token fit the model's context.
MODELS = {
    "model-9b": Plan("glm-4-9b-chat", first_tokens=(1024, 32768, 130048)),
    "model-9b-0414": Plan(
        "glm-4-9b-0414", contexts=(1024, 32768), first_tokens=(1024, 31744), their_batches=(1,)
    ),
    "model-32b": Plan(
        "glm-4-32b-0414", contexts=(1024, 32768), first_tokens=(1024, 31744), their_batches=(1,)
    ),
    "model-1m": Plan(
        "glm-4-9b-chat-1m",
        batches=(1,),
        contexts=(1024, 131072, 1 << 20),
        generate_batches=(),
        first_tokens=(131072,),
    ),
}

STAGES = {
    "build": Limited(build, 7.5),
    "tests": Limited(tests, 7.8),
    **{name: Limited(partial(kernels, partial(cases_of, name)), 7.8) for name in KERNELS},
    **{name: Limited(partial(model, plan), 7.8) for name, plan in MODELS.items()},
    "profile": Limited(
        partial(profile, Plan("glm-4-9b-chat", batches=(1, 8), contexts=(1024, 131072))), 5.0
    ),
    "profile-0414": Limited(
        partial(profile, Plan("glm-4-9b-0414", batches=(1, 64), contexts=(1024,))), 5.0
    ),
}


def stages(names: list[str]) -> list[Stage]:
    """Those stages, each as `run_stages` wants it: in a process of its own."""
    return [Stage(name, partial(measured, STAGES[name])) for name in names]


def measured(stage: Limited, say: Say) -> Iterator[dict[str, Any]]:
    say(f"at most {stage.minutes:g} minutes")
    return apart(stage.run, stage.minutes)
