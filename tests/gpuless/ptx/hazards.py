"""Which accesses to memory no barrier orders.

Between two barriers of a block the order of its warps is free, between two of a warp that of its lanes, and that of blocks
throughout a launch. Two accesses to one byte, at least one of them a store, are therefore a hazard when different warps make
them between the same two barriers, and so on: whichever came first in this run. Stores of one value by several are none, for
those who stored it either: layouts repeat values.
"""

from typing import NamedTuple

import numpy as np

from .parser import Fault

CELL = 4  # log2 of the bytes of a cell: no access is larger, or crosses its border


class Access(NamedTuple):
    addresses: np.ndarray
    bytes: int
    lanes: np.ndarray  # counted through the whole launch
    values: np.ndarray | None  # the bytes stored, (addresses, bytes); None for a load
    text: str

    def where(self, chosen):
        values = None if self.values is None else self.values[chosen]
        return self._replace(addresses=self.addresses[chosen], lanes=self.lanes[chosen], values=values)

    def each_byte(self):
        """Addresses of the single bytes, and their lanes."""
        return (self.addresses[:, None] + np.arange(self.bytes)).ravel(), np.repeat(self.lanes, self.bytes)


def split(accesses, chosen):
    """Accesses of lanes for which ``chosen(lanes)``, and the others."""
    both = [(a, chosen(a.lanes)) for a in accesses]
    inside = [a if hit.all() else a.where(hit) for a, hit in both if hit.any()]
    return inside, [a if not hit.any() else a.where(~hit) for a, hit in both if not hit.all()]


def loads_and_stores(accesses):
    return [a for a in accesses if a.values is None], [a for a in accesses if a.values is not None]


class Hazards:
    def __init__(self, memory, threads: int, trace: bool = False):
        self.memory, self.threads = memory, threads
        self.trace = [] if trace else None  # (of a warp or a block, number of the barrier, who met there, accesses)
        self.landings = []  # (copy, how many lanes, number of the barriers before it landed)
        self.useful_fences = set()  # numbers of those that made a store, or a register, visible
        self.barriers = 0
        self.owner = np.zeros(len(memory.data) >> CELL, np.int32)
        self.in_warps, self.in_blocks, self.in_launch = [], [], []

    def note(self, addresses, size, lanes, values, text, asynchronous=False):
        """Accesses of ``size`` bytes; ``values``: what is stored, None for a load. Asynchronous: by warps, not their lanes."""
        if len(addresses):
            if values is not None:
                values = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
            access = Access(addresses, size, lanes, values, text)
            self.in_blocks.append(access)
            if not asynchronous:
                self.in_warps.append(access)

    def warp_barrier(self, lanes=None, number=None):
        """The lanes of whole warps (None: of all) have met at instruction ``number`` (None: at the end)."""
        met, self.in_warps = self.in_warps, []
        if lanes is not None:
            met, self.in_warps = split(met, lambda some: np.isin(some, lanes))
        self.check_lanes(met)
        if self.trace is not None:
            self.trace.append(("warp", number, lanes, met))

    def barrier(self, lanes=None, number=None):
        """The lanes of whole blocks (None: all) have met."""
        self.warp_barrier(lanes, number)
        self.barriers += 1
        met, self.in_blocks = self.in_blocks, []
        if lanes is not None:
            met, self.in_blocks = split(met, lambda some: np.isin(some, lanes))
        self.check(met, 32, "warps", "with no barrier between")
        if self.trace is not None:
            self.trace.append(("block", number, lanes, met))
        for access in met:
            if (there := access.addresses < self.memory.shared_start).any():
                self.in_launch.append(access if there.all() else access.where(there))

    def launch_ends(self):
        self.barrier()
        accesses, self.in_launch = self.in_launch, []
        self.check(accesses, self.threads, "blocks", "in one launch")

    def check(self, accesses, lanes_of_an_agent, who, when):
        """Look at cells first, which is fast, and at the bytes of those that two agents share."""
        loads, stores = loads_and_stores(accesses)
        if not stores:
            return
        cells = lambda some: np.concatenate([a.addresses >> CELL for a in some])  # noqa: E731
        agents = lambda some: np.concatenate([a.lanes for a in some]) // lanes_of_an_agent + 1  # noqa: E731
        stored, by = cells(stores), agents(stores)
        self.owner[stored] = by
        suspects = [stored[self.owner[stored] != by]]
        if loads:
            loaded = cells(loads)
            owner = self.owner[loaded]
            suspects.append(loaded[(owner != 0) & (owner != agents(loads))])
        self.owner[stored] = 0
        suspects = np.concatenate(suspects)
        if suspects.size:
            suspicious = [a.where(np.isin(a.addresses >> CELL, suspects)) for a in accesses]
            self.check_bytes(suspicious, lambda address, lane: (address, lane // lanes_of_an_agent), who, when)

    def check_lanes(self, accesses):
        """The same between the lanes of each warp; what warps do to one another is left to ``check``."""
        warps = 1 << 32  # more than there are
        place_and_agent = lambda address, lane: (address * warps + lane // 32, lane % 32)  # noqa: E731
        self.check_bytes(accesses, place_and_agent, "lanes of one warp", "with no barrier between")

    def check_bytes(self, accesses, place_and_agent, who, when):
        loads, stores = loads_and_stores(accesses)
        if not stores:
            return
        addresses, lanes = (np.concatenate(parts) for parts in zip(*(a.each_byte() for a in stores)))
        places, agents = place_and_agent(addresses, lanes)
        values = np.concatenate([a.values.reshape(-1) for a in stores])
        place, number = np.unique(places, return_inverse=True)
        owner, value = np.zeros(len(place), agents.dtype), np.zeros(len(place), np.uint8)
        owner[number], value[number] = agents, values
        others = agents != owner[number]
        if (others & (values != value[number])).any():
            wrong = others & (values != value[number])
            self.report(addresses[wrong][0], stores, "store and store", who, when)
        more = set(zip(places[others].tolist(), agents[others].tolist()))  # who stored the same value as the owner
        for access in loads:
            addresses, lanes = access.each_byte()
            places, agents = place_and_agent(addresses, lanes)
            at = np.minimum(np.searchsorted(place, places), len(place) - 1)
            wrong = (place[at] == places) & (owner[at] != agents)
            if more:
                for i in np.flatnonzero(wrong):
                    wrong[i] = (int(places[i]), int(agents[i])) not in more
            if wrong.any():
                self.report(addresses[wrong][0], [access, *stores], "store and load", who, when)

    def crossed(self) -> set[int]:
        """Numbers of the barriers with an access before and one behind that only they order."""
        needed, before = set(), {}
        for kind, number, lanes, accesses in self.trace:
            size, of_an_agent = (32, 1) if kind == "warp" else (self.threads, 32)
            # All have met where nobody is named: those without an access too.
            named = [a.lanes for a in accesses] if lanes is None else [lanes]
            known = {group for other, group in before if other == kind} if lanes is None else set()
            for group in known.union(*((some // size).tolist() for some in named)):
                mine = [a.where(a.lanes // size == group) for a in accesses if (a.lanes // size == group).any()]
                last, earlier = before.get((kind, group), (None, []))
                before[kind, group] = number, mine
                if last is None or last in needed:
                    continue
                try:
                    self.check_bytes([*earlier, *mine], lambda address, lane: (address, lane // of_an_agent), "", "")  # noqa: B023
                except Fault:
                    needed.add(last)
        return needed

    def report(self, byte, accesses, what, who, when):
        touching = [(a, (a.addresses <= byte) & (byte < a.addresses + a.bytes)) for a in accesses]
        threads = lambda a, hit: [divmod(lane, self.threads) for lane in a.lanes[hit][:2].tolist()]  # noqa: E731
        seen = [f"{a.text!r} of (block, thread) {threads(a, hit)}" for a, hit in touching if hit.any()]
        raise Fault(f"race between {who}: {what} at {self.memory.describe(int(byte))} {when}: {'; '.join(seen[:3])}")
