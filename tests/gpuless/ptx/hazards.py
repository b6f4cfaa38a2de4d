"""Which accesses to memory no barrier orders.

Between two barriers of a block the order of its warps is free, between two of a warp that of its lanes, and that of blocks
throughout a launch. Two accesses to one byte, at least one of them a store, are therefore a hazard when different warps make
them between the same two barriers, and so on: whichever came first in this run. Stores of one value by several are none, for
those who stored it either: layouts repeat values.
"""

import functools
from typing import NamedTuple

import numpy as np

from .parser import Fault

GROUPS = 1 << 32  # more than there are of warps
LARGEST = 4  # log2 of the bytes of the largest access


class Access(NamedTuple):
    addresses: np.ndarray
    bytes: int
    lanes: np.ndarray  # counted through the whole launch
    values: np.ndarray | None  # the bytes stored, (addresses, bytes); None for a load
    text: str

    def where(self, chosen):
        values = None if self.values is None else self.values[chosen]
        return self._replace(addresses=self.addresses[chosen], lanes=self.lanes[chosen], values=values)

    def cells(self, cell=0):
        """Numbers of the cells of ``2**cell`` bytes that are touched, and their lanes; no access crosses its natural border."""
        first, count = self.addresses >> cell, self.bytes >> cell
        if count <= 1:
            return first, self.lanes
        return (first[:, None] + np.arange(count)).ravel(), np.repeat(self.lanes, count)


def joined(accesses, cell=0):
    return (np.concatenate(parts) for parts in zip(*(a.cells(cell) for a in accesses)))


@functools.cache
def owners(size):
    """Who stored to each cell, for the duration of one check: zeros before and behind it."""
    return np.zeros(size, np.int32)


def among(lanes):
    """A function that says which of some lanes are among ``lanes``."""
    first, last = int(lanes.min()), int(lanes.max())
    known = np.zeros(last - first + 2, bool)  # the last entry, also that at -1, stands for all others
    known[lanes - first] = True
    return lambda some: known[np.clip(some - first, -1, last - first + 1)]


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
        self.owner = owners(len(memory.data))
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
            met, self.in_warps = split(met, among(lanes))
        self.check_lanes(met)
        if self.trace is not None:
            self.trace.append(("warp", number, lanes, met))

    def barrier(self, lanes=None, number=None):
        """The lanes of whole blocks (None: all) have met."""
        self.warp_barrier(lanes, number)
        self.barriers += 1
        met, self.in_blocks = self.in_blocks, []
        if lanes is not None:
            met, self.in_blocks = split(met, among(lanes))
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
        self.check_cells(accesses, LARGEST, lanes_of_an_agent, lambda lane: (0, lane // lanes_of_an_agent), who, when)

    def check_lanes(self, accesses):
        """The same between the lanes of each warp; what warps do to one another is left to ``check``."""
        if accesses:
            cell = min(a.bytes for a in accesses).bit_length() - 1  # neighbours share larger ones
            self.check_cells(accesses, cell, 1, lambda lane: divmod(lane, 32), "lanes of one warp", "with no barrier between")

    def check_cells(self, accesses, cell, lanes_of_an_agent, group_and_agent, who, when):
        """Look at cells of ``2**cell`` bytes first, which is fast, and at the bytes of those that two agents share."""
        loads, stores = loads_and_stores(accesses)
        if not stores:
            return
        stored, lanes = joined(stores, cell)
        by = lanes // lanes_of_an_agent + 1
        self.owner[stored] = by
        suspects = [stored[self.owner[stored] != by]]
        if loads:
            loaded, lanes = joined(loads, cell)
            owner = self.owner[loaded]
            suspects.append(loaded[(owner != 0) & (owner != lanes // lanes_of_an_agent + 1)])
        self.owner[stored] = 0
        suspects = np.concatenate(suspects)
        if suspects.size:
            self.owner[suspects] = 1
            shared = [self.owner[a.cells(cell)[0]].reshape(len(a.lanes), -1).any(1) for a in accesses]
            self.owner[suspects] = 0
            self.check_bytes([a.where(hit) for a, hit in zip(accesses, shared) if hit.any()], group_and_agent, who, when)

    def check_bytes(self, accesses, group_and_agent, who, when):
        """Between the agents of each group of them."""
        loads, stores = loads_and_stores(accesses)
        if not stores:
            return

        def place_and_agent(address, lane):
            group, agent = group_and_agent(lane)
            return address * GROUPS + group, agent

        addresses, lanes = joined(stores)
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
            addresses, lanes = access.cells()
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
            size = 32 if kind == "warp" else self.threads
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
                    both = [*earlier, *mine]
                    self.check_lanes(both) if kind == "warp" else self.check(both, 32, "", "")
                except Fault:
                    needed.add(last)
        return needed

    def report(self, byte, accesses, what, who, when):
        touching = [(a, (a.addresses <= byte) & (byte < a.addresses + a.bytes)) for a in accesses]
        threads = lambda a, hit: [divmod(lane, self.threads) for lane in a.lanes[hit][:2].tolist()]  # noqa: E731
        seen = [f"{a.text!r} of (block, thread) {threads(a, hit)}" for a, hit in touching if hit.any()]
        raise Fault(f"race between {who}: {what} at {self.memory.describe(int(byte))} {when}: {'; '.join(seen[:3])}")
