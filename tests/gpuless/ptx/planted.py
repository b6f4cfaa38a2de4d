"""Errors planted in a launch: what the simulator says without one of its barriers, waits or fences."""

import math
from collections import Counter
from collections.abc import Container, Iterator
from typing import NamedTuple

import numpy as np

from .machine import Launch, load
from .parser import Fault

ORDERING = (
    "bar.sync", "bar.warp.sync", "cp.async.wait_group", "cp.async.commit_group", "wgmma.wait_group", "wgmma.commit_group",
    "wgmma.fence", "fence.proxy.async",
)  # fmt: skip


COPIES = ("cp.async.wait_group", "cp.async.commit_group")
FENCES = ("wgmma.fence", "fence.proxy.async")
BARRIERS = ("bar.sync", "bar.warp.sync")


class Outcome(NamedTuple):
    instruction: str
    number: int  # among the instructions of the kernel
    report: str | None  # a fault, "other bits", or None: nothing is seen
    idle: str | None  # why the launch doesn't need the instruction, seen in a run with it
    reached: bool  # False only of barriers


def contents(memory, buffers):
    return [memory.data[start : start + size].copy() for start, size, _ in buffers]


def without_each(launch: Launch, shown: Container[int] = (), most: float = math.inf, blocks: int = 2) -> Iterator[Outcome]:
    """Run the first blocks of each row of the grid, then again without each ordering instruction, from the same memory.

    Not without those whose numbers are in ``shown``, nor those that this first run shows to order nothing, and without ``most``
    of each name. What it stored is left.
    """
    memory, (x, y, z) = launch.memory, launch.grid
    launch = launch._replace(only=tuple(row * x + i for row in range(y * z) for i in range(min(x, blocks))))
    before, buffers = memory.snapshot(), list(memory.buffers)
    hazards = launch._replace(trace=True).run()
    after, clean, crossed = memory.snapshot(), contents(memory, buffers), hazards.crossed()
    met, tried = {number for _, number, _, _ in hazards.trace}, Counter()
    for ins in load(launch.ptx, launch.name).kernel.instructions:
        number, opcode = ins.number, ".".join((ins.name, *ins.modifiers, ""))
        instruction = next((name for name in ORDERING if opcode.startswith(f"{name}.")), None)
        if instruction is None or number in shown:
            continue
        idle = report = None
        if instruction in BARRIERS and number not in crossed:
            idle = "no byte is touched before and behind it by two threads, one of which stores"
        if instruction in FENCES and number not in hazards.useful_fences:
            idle = "nothing that follows was stored, or written to a register, since the fence before it"
        reached = instruction not in BARRIERS or number in met
        if idle:
            yield Outcome(instruction, number, report, idle, reached)
            continue
        tried[instruction] += 1
        if tried[instruction] > most:
            continue
        memory.restore(before)
        try:
            changed = launch._replace(without=number).run()
            same = all(map(np.array_equal, clean, contents(memory, buffers)))
            report = None if same else "other bits"
            if instruction in COPIES and changed.landings == hazards.landings:
                idle = "every copy lands between the same barriers without it"
        except Fault as fault:
            report = str(fault)
        yield Outcome(instruction, number, report, idle, reached)
    memory.restore(after)
