"""Which accesses to memory no barrier orders.

Between two barriers of a block the order of its warps is free, and so is the order of blocks throughout a launch. Two
accesses to one byte, at least one of them a store, are therefore a hazard when different warps make them between the same two
barriers, or different blocks in one launch: whichever came first in this run.
"""

from typing import NamedTuple

import numpy as np

from .parser import Fault

CELL = 4  # log2 of the bytes of a cell: no access is larger, or crosses its border


class Access(NamedTuple):
    addresses: np.ndarray
    bytes: int
    agents: np.ndarray  # number of the warp or block, from 1
    values: np.ndarray | None  # the bytes stored, (addresses, bytes); None for a load
    text: str

    def where(self, chosen):
        values = None if self.values is None else self.values[chosen]
        return self._replace(addresses=self.addresses[chosen], agents=self.agents[chosen], values=values)

    def each_byte(self):
        """Addresses of the single bytes, and their agents."""
        return (self.addresses[:, None] + np.arange(self.bytes)).ravel(), np.repeat(self.agents, self.bytes).astype(np.int64)


class Hazards:
    def __init__(self, memory, warps_of_a_block: int):
        self.memory, self.warps_of_a_block = memory, warps_of_a_block
        self.owner = np.zeros(len(memory.data) >> CELL, np.int32)
        self.since_barrier, self.in_global = [], []

    def note(self, addresses, size, warps, values, text):
        """Accesses of ``size`` bytes; ``warps``: the number of each one's warp; ``values``: what is stored, None for a load."""
        if len(addresses):
            if values is not None:
                values = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
            self.since_barrier.append(Access(addresses, size, warps, values, text))

    def barrier(self, blocks=None):
        """All warps of ``blocks`` (numbers from 1; None: of all) have met."""
        if blocks is None:
            met, self.since_barrier = self.since_barrier, []
        else:
            inside = [np.isin((a.agents - 1) // self.warps_of_a_block + 1, blocks) for a in self.since_barrier]
            met = [a.where(chosen) for a, chosen in zip(self.since_barrier, inside)]
            self.since_barrier = [a.where(~chosen) for a, chosen in zip(self.since_barrier, inside) if not chosen.all()]
        self.check(met, "warps of one block", "with no barrier between")
        for access in met:
            if (there := access.addresses < self.memory.shared_start).any():
                part = access if there.all() else access.where(there)
                self.in_global.append(part._replace(agents=(part.agents - 1) // self.warps_of_a_block + 1))

    def launch_ends(self):
        self.barrier()
        accesses, self.in_global = self.in_global, []
        self.check(accesses, "blocks", "in one launch")

    def check(self, accesses, who, when):
        """Look at cells first, which is fast, and at the bytes of those that two agents share."""
        stores = [a for a in accesses if a.values is not None]
        loads = [a for a in accesses if a.values is None]
        if not stores:
            return
        together = lambda some: (np.concatenate([a.addresses >> CELL for a in some]), np.concatenate([a.agents for a in some]))  # noqa: E731
        stored, by = together(stores)
        self.owner[stored] = by
        suspects = [stored[self.owner[stored] != by]]
        if loads:
            loaded, reader = together(loads)
            owner = self.owner[loaded]
            suspects.append(loaded[(owner != 0) & (owner != reader)])
        self.owner[stored] = 0
        suspects = np.concatenate(suspects)
        if suspects.size:
            self.check_bytes([a.where(np.isin(a.addresses >> CELL, suspects)) for a in accesses], who, when)

    def check_bytes(self, accesses, who, when):
        """A byte that several agents store the same value to is no hazard, for themselves: Triton's layouts repeat values."""
        stores = [a for a in accesses if a.values is not None and len(a.addresses)]
        loads = [a for a in accesses if a.values is None and len(a.addresses)]
        bytes_, agents = (np.concatenate(parts) for parts in zip(*(a.each_byte() for a in stores)))
        values = np.concatenate([a.values.reshape(-1) for a in stores])
        place, last = np.unique(bytes_, return_inverse=True)
        owner, value = np.zeros(len(place), np.int32), np.zeros(len(place), np.uint8)
        owner[last], value[last] = agents, values
        wrong = (agents != owner[last]) & (values != value[last])
        if wrong.any():
            self.report(bytes_[wrong][0], stores, "store and store", who, when)
        mine = np.unique(np.stack((bytes_, agents)), axis=1)
        mine = mine[0] << 32 | mine[1]
        for access in loads:
            bytes_, agents = access.each_byte()
            wrong = np.isin(bytes_, place) & ~np.isin(bytes_ << 32 | agents, mine)
            if wrong.any():
                self.report(bytes_[wrong][0], [access, *stores], "store and load", who, when)

    def report(self, byte, accesses, what, who, when):
        touching = [(a, (a.addresses <= byte) & (byte < a.addresses + a.bytes)) for a in accesses]
        seen = [f"{a.text!r} by {sorted(set(a.agents[hit] - 1))[:4]}" for a, hit in touching if hit.any()]
        raise Fault(f"race between {who}: {what} at {self.memory.describe(int(byte))} {when}: {'; '.join(seen[:3])}")
