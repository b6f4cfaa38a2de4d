"""Errors planted in a launch: what the simulator says without one of its barriers, waits or fences."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .machine import Launch
from .parser import Fault

ORDERING = (
    "bar.sync", "bar.warp.sync", "cp.async.wait_group", "cp.async.commit_group", "wgmma.wait_group", "wgmma.commit_group",
    "wgmma.fence", "fence.proxy.async",
)  # fmt: skip


class Outcome(NamedTuple):
    instruction: str
    line: int  # of the PTX, from 1
    report: str | None  # a fault, "other bits", or None: nothing is seen


def spans(ptx: str, name: str | None) -> list[tuple[str, int, int]]:
    """Where each instruction that orders others begins and ends in the text of kernel ``name``."""
    start = re.search(rf"\.entry\s+{re.escape(name)}\s*\(" if name else r"\.entry", ptx).start()
    end = ptx.find(".entry", start + 6) % (len(ptx) + 1)
    choice = "|".join(map(re.escape, ORDERING))
    found = re.compile(rf"(?m)^\s*(?:@\S+\s+)?({choice})\b[^;]*;").finditer(ptx, start, end)
    return [(match[1], match.start(1), match.end()) for match in found]


def contents(memory, buffers):
    return [memory.data[start : start + size].copy() for start, size, _ in buffers]


def without_each(launch: Launch) -> Iterator[Outcome]:
    """Run the launch, then once more without each of its ordering instructions, from the same memory; leave what it stored."""
    memory = launch.memory
    before, buffers = memory.snapshot(), list(memory.buffers)
    launch.run()
    after, clean = memory.snapshot(), contents(memory, buffers)
    for instruction, start, end in spans(launch.ptx, launch.name):
        memory.restore(before)
        try:
            launch._replace(ptx=launch.ptx[:start] + launch.ptx[end:]).run()
            same = all(map(np.array_equal, clean, contents(memory, buffers)))
            report = None if same else "other bits"
        except Fault as fault:
            report = str(fault)
        yield Outcome(instruction, launch.ptx.count("\n", 0, start) + 1, report)
    memory.restore(after)
