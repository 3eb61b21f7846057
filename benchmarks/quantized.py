"""Quantised linear layers of GLM-4-9B beside every peer, in one interleaved run on a CPU.

    python -m benchmarks quantized --json FILE          all stages that FILE does not hold yet
    python -m benchmarks quantized --json FILE --stage o  only this matrix

A stage is a matrix. Each peer is a process of its own (`peers/`), and prepares copies of each of
its weights that together are eight times the last-level cache, or four times at least where memory
is short, so that no call finds its weight there (in the stage `in_cache` on purpose). A contender
that kills its process costs itself alone: the peer's others are prepared again in another. Then,
for each M:

right   every contender multiplies the same activations; relative L2 of the result against fp64
        and the weights before they were quantised. One beyond TOLERANCE is not timed.
fast    turns go round robin, a different contender first in each round. Beside each turn the read
        bandwidth and the 8-bit peak are sampled; a turn during which others used the processors is
        taken again. After the first round, whoever needs SLOW times what the best of its bits
        needs is not asked again.
judge   medians and quartiles over rounds of each turn's median; share of the floor, the larger of
        bytes / bandwidth and operations / peak, both as sampled beside the turn.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ceilings import BUFFER_CACHES, LEAST_CACHES, CpuReadProbe, multiply_add_peak
from benchmarks.harness import quantile
from benchmarks.memory import MIB, allowed, cache_bytes, shown
from benchmarks.peers import PEERS
from benchmarks.peers.serve import Peer
from benchmarks.provenance import installed_version
from benchmarks.shapes import SHAPES
from benchmarks.worker import Worker, WorkerError

MODEL = "glm-4-9b"
TOKENS = (1, 4, 16, 128, 512)
# Bits of a weight -> largest relative L2 of a result that counts as right.
TOLERANCE = {4: 0.15, 8: 0.03, 16: 0.01}
SLOW = 3.0
FOREIGN = 0.15  # share of the processors' time in a turn; its clock ticks every 10 ms
RETRIES = 2
PEAK_SECONDS = 0.002
# Rows of W that are random; the rest repeats them.
ROWS = 1024


@dataclass(frozen=True)
class Stage:
    n: int
    k: int
    tokens: tuple[int, ...] = TOKENS
    in_cache: bool = False


STAGES = {name: Stage(n, k) for name, (n, k) in SHAPES[MODEL].linears.items()}
STAGES["in_cache"] = Stage(1024, 4096, (1, 16), True)


@dataclass(frozen=True)
class Effort:
    """How much is timed: a turn lasts `turn_seconds`, or one call if that is longer."""

    rounds: int = 5
    long_rounds: int = 3  # where one call of the fastest takes over `long_seconds`
    long_seconds: float = 0.25
    turn_seconds: float = 0.08


QUICK = Effort(rounds=1, turn_seconds=0.0)


class PeerProcess:
    """A peer, its process, and what it has prepared. A call that fails raises WorkerError."""

    def __init__(self, module: str, threads: int) -> None:
        self.module, self.threads = module, threads
        self.problem: tuple[Path, int, int, int] | None = None
        self.held: dict[str, np.ndarray | None] = {}  # contenders prepared, and what they multiply
        self.dead: dict[str, str] = {}  # contenders that killed their process, and how
        self.worker = self.started()

    def started(self) -> Worker:
        environment = {"OMP_NUM_THREADS": str(self.threads), "PYTHONWARNINGS": "ignore"}
        return Worker(Peer, self.module, environment=environment)

    def describe(self) -> list[dict[str, Any]]:
        return self.worker.call("describe")

    def pose(self, rows: Path, n: int, rotate_bytes: int) -> None:
        self.problem = (rows, n, rotate_bytes, self.threads)
        self.worker.call("pose", *self.problem)

    def prepare(self, name: str) -> dict[str, int]:
        prepared = self.ask("prepare", name)
        self.held[name] = None
        return prepared

    def multiply(self, name: str, x: np.ndarray) -> np.ndarray:
        y = self.ask("multiply", name, x)
        self.held[name] = x
        return y

    def turn(self, name: str, seconds: float) -> dict[str, Any]:
        return self.ask("turn", name, seconds)

    def ask(self, method: str, name: str, *arguments: Any) -> Any:
        if name in self.dead:
            raise WorkerError(f"not asked again: {self.dead[name]}")
        try:
            return self.worker.call(method, name, *arguments)
        except WorkerError as error:
            if error.died:
                self.dead[name] = str(error)
                self.revive()
            raise

    def revive(self) -> None:
        """Another process, in which all but the dead are prepared again."""
        self.worker.end()
        held, self.held = self.held, {}
        self.worker = self.started()
        try:
            self.describe()
            if self.problem:
                self.worker.call("pose", *self.problem)
        except WorkerError as error:
            self.dead |= dict.fromkeys(held, str(error))
            return
        for name, x in held.items():
            with suppress(WorkerError):  # who dies here is told at its next call
                self.prepare(name)
                if x is not None:
                    self.multiply(name, x)

    def end(self) -> None:
        self.worker.end()


def start_peers(
    names: list[str], threads: int, stack: ExitStack
) -> tuple[dict[PeerProcess, list[dict[str, Any]]], list[str]]:
    """The peers that are installed, with their contenders; and a line for each that is not."""
    processes = [PeerProcess(name, threads) for name in names]
    started, skipped = {}, []
    for peer in processes:
        stack.callback(peer.end)
        try:
            started[peer] = peer.describe()
        except WorkerError as error:
            skipped.append(f"{PEERS[peer.module]}: {error}")
    return started, skipped


@dataclass
class Entrant:
    """A contender in a stage."""

    peer: PeerProcess
    result: dict[str, Any]  # name, bits, what, bytes, copies, tokens: {M: …}; or note

    @property
    def name(self) -> str:
        return self.result["name"]


def run_stage(
    stage: Stage,
    peers: list[str],
    effort: Effort = Effort(),
    say: Callable[[str], None] = lambda what: None,
    memory: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the stage's result as it grows; `memory`: bytes that it may take."""
    threads = torch.get_num_threads()
    began = time.monotonic()
    with ExitStack() as stack:
        say("starting the peers")
        started, skipped = start_peers(peers, threads, stack)
        bits = [contender["bits"] for of_peer in started.values() for contender in of_peer]
        say("measuring the cache")
        rotate = rotate_bytes(stage, bits, allowed(memory))
        say(f"{len(bits)} contenders, copies of {shown(rotate)} each")
        probe = Probe(threads)
        result: dict[str, Any] = {
            "n": stage.n,
            "k": stage.k,
            "in_cache": stage.in_cache,
            "rotate_bytes": rotate,
            "cache_bytes": cache_bytes(),
            "peers": peers,
            "versions": {PEERS[p.module]: installed_version(PEERS[p.module]) for p in started},
            "skipped": skipped,
            "contenders": [],
            "died": [],
            "tokens": stage.tokens,
            "timed": [],
        }
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = random_rows(stage)
        np.save(folder / "rows.npy", rows)
        entrants = []
        for peer, contenders in started.items():
            peer.pose(folder / "rows.npy", stage.n, rotate)
            for contender in contenders:
                say(f"preparing {contender['name']}")
                entry = contender | {"peer": peer.module, "tokens": {}}
                result["contenders"].append(entry)
                try:
                    entry |= peer.prepare(contender["name"])
                    entrants.append(Entrant(peer, entry))
                except WorkerError as error:
                    entry["note"] = str(error)
        for n_tokens in stage.tokens:
            measure(entrants, rows, n_tokens, stage, effort, probe, say)
            result["timed"].append(n_tokens)
            result["seconds"] = round(time.monotonic() - began)
            result["died"] = [f"{who}: {how}" for peer in started for who, how in peer.dead.items()]
            yield result


# A peer's process before it has a weight: torch, or another runtime.
PEER_BYTES = 400 * MIB


def rotate_bytes(stage: Stage, bits: list[int], room: int) -> int:
    """Bytes of the copies of one contender's weight, at least: BUFFER_CACHES times the cache, or
    what `room` leaves to each of the contenders, whose weights have so many bits.

    Raises:
        MemoryError: that is less than LEAST_CACHES times the cache: calls would find their weights
            there.
    """
    cache = cache_bytes()
    if stage.in_cache:
        return cache * 3 // 8
    values = stage.n * stage.k
    # Copies end past the bytes asked for by up to a weight; one is made at a time, out of two in
    # 16 bits.
    taken = len(PEERS) * PEER_BYTES + 4 * values + sum(values * b * 9 // 64 for b in bits)
    each = (room - taken) // max(1, len(bits))
    least = LEAST_CACHES * cache
    if each < least:
        needed = taken + len(bits) * least
        raise MemoryError(
            f"{len(bits)} contenders need {shown(needed)}, with copies of {LEAST_CACHES} times the "
            f"cache's {shown(cache)} each; {shown(room)} are allowed (--memory, --peers)"
        )
    return min(each, max(BUFFER_CACHES * cache, 192 * MIB))


def random_rows(stage: Stage) -> np.ndarray:
    """N(0, 0.02^2), as many rows as divide N, at most ROWS."""
    n_rows = next(rows for rows in range(min(ROWS, stage.n), 0, -1) if stage.n % rows == 0)
    generator = np.random.default_rng(stage.n)
    return generator.standard_normal((n_rows, stage.k), np.float32) * np.float32(0.02)


def measure(
    entrants: list[Entrant],
    rows: np.ndarray,
    n_tokens: int,
    stage: Stage,
    effort: Effort,
    probe: Probe,
    say: Callable[[str], None],
) -> None:
    """Adds the figures for one M to the contenders' results."""
    key = str(n_tokens)
    x = np.random.default_rng(n_tokens).standard_normal((n_tokens, stage.k), np.float32)
    truth = x.astype(np.float64) @ rows.astype(np.float64).T
    right = []
    for entrant in entrants:
        say(f"M = {n_tokens}: checking {entrant.name}")
        figures = entrant.result["tokens"][key] = {"status": "ok"}
        try:
            y = entrant.peer.multiply(entrant.name, x)
        except WorkerError as error:
            figures |= {"status": "failed", "note": str(error)}
            continue
        l2 = (
            float(np.linalg.norm(y - truth) / np.linalg.norm(truth))
            if y.shape == truth.shape
            else math.nan
        )
        figures["relative_l2"] = l2
        if l2 <= TOLERANCE[entrant.result["bits"]]:
            right.append(entrant)
        else:  # NaN is wrong too
            figures |= {"status": "wrong", "note": f"relative L2 {l2:.1e}"}
    turns = take_turns(right, n_tokens, effort, probe, say)
    operations = 2 * n_tokens * stage.n * stage.k
    for entrant in right:
        if turns[entrant.name]:
            figures = entrant.result["tokens"][key]
            figures |= judged(turns[entrant.name], entrant.result["bytes"], operations)


def take_turns(
    entrants: list[Entrant],
    n_tokens: int,
    effort: Effort,
    probe: Probe,
    say: Callable[[str], None],
) -> dict[str, list[dict[str, Any]]]:
    turns: dict[str, list[dict[str, Any]]] = {entrant.name: [] for entrant in entrants}

    def took_turn(entrant: Entrant) -> bool:
        try:
            turns[entrant.name].append(undisturbed_turn(entrant, effort, probe))
        except WorkerError as error:
            entrant.result["tokens"][str(n_tokens)]["note"] = str(error)
            return False
        return True

    def keeps_up(entrant: Entrant) -> bool:
        """Whether a contender is asked again: ours always, others within SLOW times the best of
        their bits, in a second turn if not in the first."""
        same = [e for e in asked if e.result["bits"] == entrant.result["bits"]]
        limit = SLOW * min(turns[e.name][0]["seconds"] for e in same)
        if entrant.result["peer"] == "ours" or turns[entrant.name][0]["seconds"] <= limit:
            return True
        return took_turn(entrant) and turns[entrant.name][1]["seconds"] <= limit

    asked = list(entrants)
    rounds, done = effort.rounds, 0
    while asked and done < rounds:
        remaining = []
        for entrant in asked:
            say(f"M = {n_tokens}: round {done + 1} of {rounds}, {entrant.name}")
            if took_turn(entrant):
                remaining.append(entrant)
        asked = remaining
        done += 1
        if done == 1:
            fastest = min((turns[e.name][0]["seconds"] for e in asked), default=0.0)
            if fastest > effort.long_seconds:
                rounds = min(rounds, effort.long_rounds)
            asked = [e for e in asked if keeps_up(e)]
        asked = asked[1:] + asked[:1]
    return turns


def undisturbed_turn(entrant: Entrant, effort: Effort, probe: Probe) -> dict[str, Any]:
    """The least disturbed of up to 1 + RETRIES turns."""
    best: dict[str, Any] | None = None
    for _ in range(1 + RETRIES):
        turn = one_turn(entrant, effort, probe)
        if best is None or turn["foreign"] < best["foreign"]:
            best = turn
        if best["foreign"] <= FOREIGN or effort.turn_seconds == 0:
            break
    assert best is not None
    return best


def one_turn(entrant: Entrant, effort: Effort, probe: Probe) -> dict[str, Any]:
    before = probe.sample()
    answer = entrant.peer.turn(entrant.name, effort.turn_seconds)
    after = probe.sample()
    return {
        "seconds": statistics.median(answer["times"]),
        "read": (before[0] + after[0]) / 2,
        "peak": max(before[1], after[1]),
        "foreign": answer["foreign"],
    }


class Probe:
    """Samples both ceilings, in a few milliseconds."""

    def __init__(self, threads: int) -> None:
        self.read = CpuReadProbe()
        self.threads = threads

    def sample(self) -> tuple[float, float]:
        """Bytes per second read from memory, 8-bit operations per second."""
        return self.read.sample(), multiply_add_peak(PEAK_SECONDS, self.threads)


def judged(turns: list[dict[str, Any]], nbytes: int, operations: int) -> dict[str, Any]:
    seconds = [turn["seconds"] for turn in turns]
    floors = [max(nbytes / turn["read"], operations / turn["peak"]) for turn in turns]
    middle = statistics.median(seconds)
    return {
        "us": middle * 1e6,
        "p25_us": quantile(seconds, 0.25) * 1e6,
        "p75_us": quantile(seconds, 0.75) * 1e6,
        "gb_per_s": nbytes / middle / 1e9,
        "gop_per_s": operations / middle / 1e9,
        "share_of_read": statistics.median(nbytes / t["read"] / t["seconds"] for t in turns),
        "share_of_peak": statistics.median(operations / t["peak"] / t["seconds"] for t in turns),
        "share": statistics.median(f / s for f, s in zip(floors, seconds, strict=True)),
        "turns_us": [round(s * 1e6, 2) for s in seconds],
        "read_beside_gb_per_s": [round(turn["read"] / 1e9, 1) for turn in turns],
        "peak_beside_gop_per_s": [round(turn["peak"] / 1e9) for turn in turns],
        "foreign": [round(turn["foreign"], 3) for turn in turns],
    }


def faults(stage: dict[str, Any]) -> list[str]:
    """Who died, and that ours did not take part or was wrong."""
    ours = [] if ours_is_right(stage) else ["ours is not right"]
    return [*stage["died"], *ours]


def ours_is_right(stage: dict[str, Any]) -> bool:
    """Whether we took part and nothing of ours was wrong."""
    ours = [c for c in stage["contenders"] if c["peer"] == "ours"]
    return bool(ours) and all(
        c["tokens"] and all(t["status"] == "ok" for t in c["tokens"].values()) for c in ours
    )


def compared(stage: dict[str, Any], bits: int, key: str) -> tuple[dict | None, dict | None]:
    """Our contender of so many bits, and the fastest right peer of as many or of 16, at M = key;
    None for one that has no time."""
    timed = [
        c
        for c in stage["contenders"]
        if c["bits"] in (bits, 16) and "us" in c["tokens"].get(key, {})
    ]
    ours = next((c for c in timed if c["peer"] == "ours"), None)
    peers = [c for c in timed if c["peer"] != "ours"]
    return ours, min(peers, key=lambda c: c["tokens"][key]["us"], default=None)
