"""Memory, and the instructions that load from it and store to it.

Everything lies in one array of bytes: the buffers of the launch, far apart, its parameters, and the shared memory of each
block. Addresses are those that the array has in this process; inside the simulator they are counted from its begin. Each
byte has a state beside it.
"""

import numpy as np

from .arithmetic import instruction
from .parser import Fault
from .values import (
    TYPES,
    Modifiers,
    address_reader,
    bits_of,
    immediate_integer_operand,
    items,
    operands,
    reader,
    spread,
    writer,
)

OUTSIDE, COPYING, VALID = 0, 1, 0xFF  # the state of a byte; COPYING: a cp.async that nobody has waited for writes it
GUARD = 1 << 16  # between buffers
SHARED_GUARD = 1 << 12  # between the shared memories of blocks
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
ACCESSIBLE = {size: np.iinfo(word).max for size, word in WORDS.items()}  # the state of a word whose bytes are all VALID


class Memory:
    def __init__(self, size: int = 1 << 28):
        aligned = np.zeros(size + (1 << 20), np.uint8)
        self.data, self.state = aligned[-aligned.ctypes.data % (1 << 20) :][:size], np.zeros(size, np.uint8)
        self.origin = self.data.ctypes.data
        self.buffers, self.next = [], GUARD
        self.shared_start = size // 2

    def add(self, size: int, name: str) -> int:
        """The address of a new buffer, which holds NaN."""
        start = self.next
        self.next = -(-(start + size + GUARD) // 1024) * 1024
        if self.next > self.shared_start:
            raise MemoryError("the simulated memory is full")
        self.buffers.append((start, size, name))
        self.data[start : start + size] = 0xFF
        self.state[start : start + size] = VALID
        return start

    def snapshot(self):
        """What ``restore`` needs: contents and states of the buffers."""
        return self.data[: self.next].copy(), self.state[: self.next].copy(), list(self.buffers)

    def restore(self, snapshot):
        data, state, buffers = snapshot
        self.next, self.buffers = len(data), list(buffers)
        self.data[: self.next], self.state[: self.next] = data, state

    def forbid(self, start: int, size: int):
        self.state[start : start + size] = OUTSIDE

    def allow(self, start: int, item: int, shape: tuple, strides: tuple):
        """Let kernels reach the elements of an array that begins at ``start``; ``strides`` in bytes."""
        if 0 not in shape:
            for byte in range(start, start + item):
                np.lib.stride_tricks.as_strided(self.state[byte:], shape, strides)[...] = VALID

    def open_shared(self, blocks: int, size: int) -> np.ndarray:
        """Fresh shared memory, all NaN: the generic address of each block's."""
        self.shared_size = size
        stride = -(-(size + SHARED_GUARD) // 1024) * 1024
        starts = self.shared_start + SHARED_GUARD + np.arange(blocks, dtype=np.int64) * stride
        if starts[-1] + stride > len(self.data):
            raise MemoryError("too many blocks at once")
        region = slice(self.shared_start, starts[-1] + stride)
        self.data[region], self.state[region] = 0xFF, OUTSIDE
        for start in starts:
            self.state[start : start + size] = VALID
        self.shared_bases = starts
        return starts

    def describe(self, address: int) -> str:
        if address >= self.shared_start:
            block = np.searchsorted(self.shared_bases, address, "right") - 1
            if block >= 0:
                return f"byte {address - self.shared_bases[block]} of {self.shared_size} of shared memory"
        near = [b for b in self.buffers if b[0] - GUARD // 2 <= address < b[0] + b[1] + GUARD // 2]
        return f"byte {address - near[0][0]} of {near[0][1]} of {near[0][2]}" if near else f"address {address:#x}"

    def slots(self, addresses, size, text):
        """Numbers of the naturally aligned pieces of ``size`` bytes, all of them accessible."""
        word = min(size, 8)
        slots = addresses >> np.uint64(size.bit_length() - 1)
        if slots.size:
            if np.bitwise_or.reduce(addresses) & np.uint64(size - 1):
                wrong = addresses[addresses & np.uint64(size - 1) != 0][0]
                raise Fault(f"misaligned access of {size} bytes at {self.describe(int(wrong))}: {text}")
            if int(slots.max()) >= len(self.data) // size:
                raise Fault(f"access to {self.describe(int(addresses.max()))}: {text}")
            state = self.state.view(WORDS[word]).reshape(-1, size // word)[slots]
            if not (good := state == ACCESSIBLE[word]).all():
                wrong = int(addresses[~good.all(1)][0])
                bytes_ = self.state[wrong : wrong + size]
                why = "out of bounds" if (bytes_ == OUTSIDE).any() else "to memory that an unfinished cp.async writes"
                raise Fault(f"access {why}: {size} bytes at {self.describe(wrong)}: {text}")
        return slots

    def mark(self, slots, size, state):
        word = min(size, 8)
        value = np.frombuffer(bytes([state]) * word, WORDS[word])[0]
        self.state.view(WORDS[word]).reshape(-1, size // word)[slots] = value

    def load(self, slots, word, count):
        return self.data.view(WORDS[word]).reshape(-1, count)[slots]

    def store(self, slots, values):
        """``values``: (slots, words)."""
        self.data.view(values.dtype).reshape(-1, values.shape[1])[slots] = values


def places(state, read, space, lanes):
    """Where in the memory the addresses of ``lanes`` (None: of all) are."""
    addresses = read(state) + (state.shared_base if space == "shared" else -state.origin)
    if np.ndim(addresses) == 0:
        addresses = np.full(state.shape, addresses)
    return addresses if lanes is None else addresses[lanes]


def access(ins):
    """What ld and st have in common: space, type, number of elements."""
    m = Modifiers(ins)
    kind = m.kind()
    if bits_of(kind) > 64 or kind in ("pred", "bf16", "f16x2", "bf16x2"):
        m.refuse("type")
    space = m.one_of("global", "shared", "param", default="generic")
    m.flag("cta") if m.flag("shared::cta") else None
    if space == "global" and ins.name == "ld":
        m.flag("nc")
    count = {"v2": 2, "v4": 4}.get(m.one_of("v2", "v4", default="one"), 1)
    m.done()
    if bits_of(kind) * count > 128:
        m.refuse("more than 16 bytes")
    return space, kind, count


@instruction("ld")
def decode_load(ins):
    space, kind, count = access(ins)
    target, source = operands(ins, 2)
    targets, read, word = items(target), address_reader(source, ins), bits_of(kind) // 8
    if len(targets) != count:
        Modifiers(ins).refuse("elements")
    writes, size, dtype = [writer(t, kind, ins, widen=True) for t in targets], word * count, TYPES[kind]

    def step(state, mask):
        lanes = None if mask is None else np.flatnonzero(mask)
        addresses = places(state, read, space, lanes)
        slots = state.memory.slots(addresses, size, ins.text)
        if space != "param":
            state.note(addresses, size, lanes, None, ins.text)
        values = state.memory.load(slots, word, count)
        for i, write in enumerate(writes):
            column = values[:, i]
            if lanes is not None:
                column = np.zeros(state.shape, values.dtype)
                column[lanes] = values[:, i]
            write(state, np.ascontiguousarray(column).view(dtype), mask)

    return step


@instruction("st")
def decode_store(ins):
    space, kind, count = access(ins)
    target, source = operands(ins, 2)
    sources, read, word = items(source), address_reader(target, ins), bits_of(kind) // 8
    if len(sources) != count or space == "param":
        Modifiers(ins).refuse("store")
    reads, size, storage = [reader(s, kind, ins, narrow=True) for s in sources], word * count, WORDS[word]

    def step(state, mask):
        lanes = None if mask is None else np.flatnonzero(mask)
        addresses = places(state, read, space, lanes)
        slots = state.memory.slots(addresses, size, ins.text)
        values = np.empty((len(addresses), count), storage)
        for i, value in enumerate(reads):
            column = spread(value(state), state.shape)
            values[:, i] = (column if lanes is None else column[lanes]).view(storage)
        state.note(addresses, size, lanes, values, ins.text)
        state.memory.store(slots, values)

    return step


@instruction("cp")
def decode_copy(ins):
    m = Modifiers(ins)
    m.all("async")
    if "commit_group" in m.rest:
        m.all("commit_group")
        m.done()
        operands(ins, 0)
        return lambda state, mask: state.copies.commit(mask)
    if "wait_all" in m.rest or "wait_group" in m.rest:
        everything = m.one_of("wait_all", "wait_group") == "wait_all"
        m.done()
        newest = -1 if everything else immediate_integer_operand(*operands(ins, 1), ins)
        return lambda state, mask: state.copies.wait(newest, mask, ins.text)
    level = m.one_of("ca", "cg")
    m.all("shared", "global")
    m.done()
    to, source, size, *rest = operands(ins, 3, 4)
    size = immediate_integer_operand(size, ins)
    if size not in ((16,) if level == "cg" else (4, 8, 16)):
        m.refuse("size")
    to, source = address_reader(to, ins), address_reader(source, ins)
    taken = reader(rest[0], "u32", ins) if rest else lambda state: np.uint32(size)

    def step(state, mask):
        lanes = None if mask is None else np.flatnonzero(mask)
        state.copies.start(
            places(state, to, "shared", lanes), places(state, source, "global", lanes), size,
            np.broadcast_to(taken(state), state.shape)[slice(None) if lanes is None else lanes], lanes, ins.text,
        )  # fmt: skip

    return step


class Copies:
    """cp.async: the bytes land when their thread waits for them, not before, and nobody may touch them until then."""

    def __init__(self, state):
        self.state, self.memory = state, state.memory
        self.group = np.zeros(state.shape, np.int64)  # the open group of each lane
        self.pending = []

    def start(self, to, source, size, taken, lanes, text):
        memory, word = self.memory, min(size, 8)
        if not len(to):
            return
        if taken.max() > size:
            raise Fault(f"a copy of {taken.max()} of {size} bytes: {text}")
        slots = memory.slots(to, size, text)
        lanes = np.arange(len(self.group)) if lanes is None else lanes
        data = np.zeros((len(to), size), np.uint8)
        whole = taken == size
        data[whole] = memory.load(memory.slots(source[whole], size, text), word, size // word).view(np.uint8)
        self.state.note(source[whole], size, lanes[whole], None, text)
        for i in np.flatnonzero(~whole & (taken > 0)):
            if source[i] % size:
                raise Fault(f"misaligned copy from {memory.describe(int(source[i]))}: {text}")
            part = source[i] + np.arange(taken[i], dtype=np.uint64)
            data[i, : taken[i]] = memory.load(memory.slots(part, 1, text), 1, 1)[:, 0]
            self.state.note(part, 1, np.full(len(part), lanes[i]), None, text)
        self.state.note(to, size, lanes, data, text)  # it may land from now on
        memory.mark(slots, size, COPYING)
        self.pending.append((lanes, self.group[lanes], to, slots, data.view(WORDS[word]), size, text))

    def commit(self, mask):
        self.group = self.group + (1 if mask is None else mask)

    def wait(self, newest, mask, text):
        """Land all but the ``newest`` committed groups; -1: the open one as well."""
        kept = []
        for lanes, group, to, slots, data, size, origin in self.pending:
            ready = group < self.group[lanes] - newest
            if mask is not None:
                ready &= mask[lanes]
            if ready.all():
                self.land(lanes, to, slots, data, size, origin)
            elif ready.any():
                self.land(lanes[ready], to[ready], slots[ready], data[ready], size, origin)
                ready = ~ready
                kept.append((lanes[ready], group[ready], to[ready], slots[ready], data[ready], size, origin))
            else:
                kept.append((lanes, group, to, slots, data, size, origin))
        self.pending = kept

    def land(self, lanes, to, slots, data, size, text):
        self.memory.mark(slots, size, VALID)
        self.memory.store(slots, data)
        self.state.note(to, size, lanes, data, text)
        self.state.hazards.landings.append((text, len(lanes), self.state.hazards.barriers))
