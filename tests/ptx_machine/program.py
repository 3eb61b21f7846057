"""Reads PTX, and executes one program of a grid."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx_machine import instructions
from ptx_machine.matrices import matrices, multiply_in_group, multiply_matrices
from ptx_machine.numbers import EVERY, LANES, TYPES, U64, Array, MachineError
from ptx_machine.state import Block, Step, Warp, target, together

# Nothing to do: what they order happens in order here, or when it is waited for.
NO_OPERATION = (
    "bar.warp.sync",
    "griddepcontrol",
    "fence",
    "wgmma.fence",
    "wgmma.commit_group",
    "wgmma.wait_group",
)
# The warp itself sees to these.
CONTROL = ("bra", "ret", "bar.sync", "cp.async.commit_group", "cp.async.wait_group")
MAKERS = {
    "bfe": instructions.bit_field,
    "prmt": instructions.permute,
    "lop3": instructions.logic_of_three,
    "setp": instructions.compare,
    "selp": instructions.select,
    "mov": instructions.move,
    "cvt": instructions.convert,
    "ld": instructions.load,
    "st": instructions.store,
    "cp": instructions.copy_async,
    "shfl": instructions.shuffle,
    "redux": instructions.reduce_over_lanes,
    "mma": multiply_matrices,
    "wgmma": multiply_in_group,
}


@dataclass(frozen=True)
class Instruction:
    text: str
    opcode: str
    guard: tuple[str, bool] | None  # predicate, and what it must be
    step: Step | None  # None: the warp itself sees to it
    argument: Any = None  # of those: label, number of groups


@dataclass(frozen=True)
class Program:
    instructions: list[Instruction]
    labels: dict[str, int]
    parameters: dict[str, np.dtype]
    warps: int


def parse(ptx: str) -> Program:
    entry = ptx[ptx.index(".entry") :]
    declared = re.findall(r"\.param\s+\.(\w+).*?(\w+_param_\d+)", entry[: entry.index(")")])
    parameters = {name: TYPES[kind] for kind, name in declared}
    threads = int(re.search(r"\.reqntid\s+(\d+)", entry)[1])  # type: ignore[index]
    body = entry[entry.index("{", entry.index(".reqntid")) : entry.index("// -- End function")]
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in re.sub(r"//.*", "", body).splitlines():
        line = re.sub(r"^\{(?=\s|$)|^\}", "", line.strip()).strip()
        if label := re.fullmatch(r"(\$?\w+):", line):
            labels[label[1]] = len(found)
            continue
        for statement in (part.strip() for part in line.split(";")):
            if statement and not statement.startswith("."):
                found.append(parse_instruction(statement))
    return Program(found, labels, parameters, threads // LANES)


def parse_instruction(text: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
    if found is None:
        raise MachineError(f"cannot read: {text}")
    negated, predicate, opcode, rest = found.groups()
    operands = [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", rest) if part.strip()]
    guard = (predicate, not negated) if predicate else None
    if opcode.startswith(CONTROL):
        return Instruction(text, opcode, guard, None, operands[0] if operands else None)
    try:
        return Instruction(text, opcode, guard, step_of(opcode, operands))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise MachineError(f"not known: {text} ({error!r})") from None


def step_of(opcode: str, operands: list[str]) -> Step:
    name, *modifiers = opcode.split(".")
    if opcode.startswith(NO_OPERATION):
        return lambda warp, lanes: None
    if name == "createpolicy":
        write = target(operands[0])
        return lambda warp, lanes: write(warp, np.zeros(LANES, U64), lanes)
    if name in ("mul", "mad") and modifiers[0] in ("lo", "hi", "wide"):
        return instructions.multiply(name, modifiers, operands)
    if name in ("shl", "shr"):
        return instructions.shift(name, modifiers, operands)
    if name in ("ldmatrix", "stmatrix"):
        return matrices(name, modifiers, operands)
    if name in MAKERS:
        return MAKERS[name](modifiers, operands)
    return instructions.arithmetic(name, modifiers, operands)


def run_warp(program: Program, warp: Warp) -> Iterator[None]:
    """Executes a warp; yields at every barrier. Of lanes that are apart, those behind go first."""
    counts = warp.block.counts
    here, lanes = 0, EVERY
    apart: dict[int, Array] = {}  # other lanes, by where they are
    while True:
        instruction = program.instructions[here]
        following, active = here + 1, lanes
        if instruction.guard is not None:
            name, wanted = instruction.guard
            active = lanes & (warp.registers[name] == wanted)
            active = EVERY if active.all() else active
        if counts is not None:
            counts["instructions"] += 1
        try:
            if instruction.step is not None:
                if active is EVERY or active.any():
                    instruction.step(warp, active)
            elif instruction.opcode.startswith("bra"):
                goal = program.labels[instruction.argument]
                if active is lanes or active is EVERY:
                    following = goal
                elif active.any():
                    apart[goal] = apart.get(goal, ~EVERY) | active
                    lanes = lanes & ~active
            elif instruction.opcode == "ret":
                lanes = lanes & ~active
            elif instruction.opcode == "cp.async.commit_group":
                warp.copies.append([])
            elif instruction.opcode == "cp.async.wait_group":
                instructions.wait_for_copies(warp, int(instruction.argument))
            else:
                together(active, "a barrier")
                yield
        except MachineError as error:
            raise MachineError(f"{instruction.text}: {error}") from None
        if apart or lanes is not EVERY:
            if lanes.any():
                apart[following] = apart.get(following, ~EVERY) | lanes
            if not apart:
                return
            following = min(apart)
            lanes = apart.pop(following)
            lanes = EVERY if lanes.all() else lanes
        here = following


def run_block(program: Program, block: Block) -> None:
    """Every warp from barrier to barrier, one after the other."""
    warps = [run_warp(program, Warp(block, number)) for number in range(program.warps)]
    while True:
        ended = [next(warp, "end") == "end" for warp in warps[:: 1 if block.events.forward else -1]]
        if all(ended):
            return
        if any(ended):
            raise MachineError("a warp ended where others wait at a barrier")
