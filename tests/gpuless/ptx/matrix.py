"""The tensor cores: fragments in registers (mma), matrices from shared memory (ldmatrix, stmatrix, wgmma), and fences.

Lane 4 * g + t of a warp holds rows g and g + 8 of a fragment. Products are exact in float32, their sums round like float32.
"""

import re

import numpy as np

from .arithmetic import instruction
from .memory import places
from .moves import whole_warps
from .parser import Fault, Immediate, Refused, Vector
from .values import IN_FLIGHT, Modifiers, address_reader, bf16_to_float, items, operands, reader, spread, writer

SHAPES = {"bf16": 16, "f16": 16, "tf32": 8}  # element -> depth of one product
ROW = np.uint64(16)


def shape(m, *depths):
    """(rows, columns, depth) of the product, which is a modifier."""
    for name in m.rest:
        if found := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", name):
            m.flag(name)
            return tuple(map(int, found.groups()))
    return m.refuse("no shape")


def elements(words, kind):
    """float32 elements of 32-bit words, the last axis grows by those in one word."""
    if kind == "tf32":  # the lowest 13 bits don't take part
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    halves = np.stack((words & np.uint32(0xFFFF), words >> np.uint32(16)), -1).astype(np.uint16)
    return bf16_to_float(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)


def left_fragments(registers, kind):
    """Four registers -> (warps, 16, depth)."""
    words = np.stack(registers).reshape(2, 2, -1, 8, 4)  # depth, row / 8, warp, g, t
    values = elements(words, kind)
    return values.transpose(2, 1, 3, 0, 4, 5).reshape(words.shape[2], 16, SHAPES[kind])


def right_fragments(registers, kind):
    """Two registers -> (warps, depth, 8)."""
    words = np.stack(registers).reshape(2, -1, 8, 4)  # depth, warp, g, t
    values = elements(words, kind)
    return values.transpose(1, 0, 3, 4, 2).reshape(words.shape[1], SHAPES[kind], 8)


def product_registers(product):
    """(groups of warps, rows, columns) -> one array of lanes for each register of the accumulator."""
    count, rows, columns = product.shape
    parts = product.reshape(count, rows // 16, 2, 8, columns // 8, 4, 2)  # group, warp, row / 8, g, block, t, column
    return parts.transpose(4, 2, 6, 0, 1, 3, 5).reshape(columns // 2, -1)


@instruction("mma")
def decode_mma(ins):
    m = Modifiers(ins)
    m.all("sync", "aligned", "row", "col")
    size = shape(m)
    kind = m.rest[1] if len(m.rest) == 4 else m.refuse("types")
    if kind not in SHAPES or m.rest != ["f32", kind, kind, "f32"] or size != (16, 8, SHAPES[kind]):
        m.refuse("types or shape")
    target, left, right, added = (items(o) for o in operands(ins, 4))
    if [len(target), len(left), len(right), len(added)] != [4, 4, 2, 4]:
        m.refuse("operands")
    writes = [writer(t, "f32", ins) for t in target]
    a, b = [reader(x, "b32", ins) for x in left], [reader(x, "b32", ins) for x in right]
    c = [reader(x, "f32", ins) for x in added]

    def step(state, mask):
        whole_warps(mask, ins.text)
        word = lambda read: spread(read(state), state.shape)  # noqa: E731
        product = np.matmul(left_fragments([word(r) for r in a], kind), right_fragments([word(r) for r in b], kind))
        sums = [part + read(state) for part, read in zip(product_registers(product), c)]
        for write, values in zip(writes, sums):
            write(state, values, mask)

    return step


def rows_of_matrices(state, read, count, mask, text):
    """Addresses and slots of the rows that the first lanes of each taking-part warp give, and those lanes."""
    whole_warps(mask, text)
    taking = np.arange(state.shape[0]) if mask is None else np.flatnonzero(mask)
    lanes = taking.reshape(-1, 32)[:, : 8 * count].ravel()
    rows = places(state, read, "shared", lanes)
    return rows, state.memory.slots(rows, 16, text), lanes


def matrix_modifiers(ins):
    m = Modifiers(ins)
    m.kind("b16")
    m.all("sync", "aligned", "m8n8", "shared")
    count, transposed = int(m.one_of("x1", "x2", "x4")[1:]), m.flag("trans")
    m.done()
    return count, transposed


@instruction("ldmatrix")
def decode_load_matrix(ins):
    count, transposed = matrix_modifiers(ins)
    target, source = operands(ins, 2)
    read, writes = address_reader(source, ins), [writer(t, "b32", ins) for t in items(target)]
    if len(writes) != count:
        raise Refused(ins.text)

    def step(state, mask):
        rows, slots, lanes = rows_of_matrices(state, read, count, mask, ins.text)
        state.note(rows, 16, lanes, None, ins.text)
        matrices = state.memory.load(slots, 2, 8).reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        words = matrices.view(np.uint32)  # warp, matrix, row, pair of columns
        for i, write in enumerate(writes):
            values = words[:, i].reshape(-1)
            if mask is not None:
                values, some = np.zeros(state.shape, np.uint32), values
                values[mask] = some
            write(state, values, mask)

    return step


@instruction("stmatrix")
def decode_store_matrix(ins):
    count, transposed = matrix_modifiers(ins)
    target, source = operands(ins, 2)
    read, reads = address_reader(target, ins), [reader(s, "b32", ins) for s in items(source)]
    if len(reads) != count:
        raise Refused(ins.text)

    def step(state, mask):
        rows, slots, lanes = rows_of_matrices(state, read, count, mask, ins.text)
        words = np.stack([r(state) if mask is None else r(state)[mask] for r in reads]).reshape(count, -1, 8, 4)
        matrices = np.ascontiguousarray(words.swapaxes(0, 1)).view(np.uint16)  # warp, matrix, row, column
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        state.note(rows, 16, lanes, matrices, ins.text)
        state.memory.store(slots, matrices.reshape(-1, 8))

    return step


@instruction("bar")
def decode_warp_barrier(ins):
    m = Modifiers(ins)
    m.all("warp", "sync")
    m.done()
    if operands(ins, 1) != (Immediate("-1"),):
        m.refuse("a part of a warp")

    def step(state, mask):
        whole_warps(mask, ins.text)
        state.hazards.warp_barrier(None if mask is None else state.number[mask], ins.number)

    return step


@instruction("fence")
def decode_fence(ins):
    m = Modifiers(ins)
    m.all("proxy", "async")
    m.flag("shared::cta")
    m.done()
    operands(ins, 0)
    return lambda state, mask: state.matrices.fence(mask, ins.number) if state.matrices else None


@instruction("wgmma")
def decode_wgmma(ins):
    m = Modifiers(ins)
    what = m.one_of("fence", "commit_group", "wait_group", "mma_async")
    m.all("sync", "aligned")
    if what == "mma_async":
        return decode_wgmma_product(ins, m)
    m.done()
    count = int(operands(ins, 1)[0].text) if what == "wait_group" else operands(ins, 0) and None

    def step(state, mask):
        if mask is not None:
            raise Refused(f"only some warps execute {ins.text}")
        core = state.matrices
        {"fence": lambda: core.order(ins.number), "commit_group": core.commit}.get(what, lambda: core.wait(count))()

    return step


def decode_wgmma_product(ins, m):
    rows, columns, depth = shape(m)
    kind = m.rest[1] if len(m.rest) == 3 else m.refuse("types")
    if kind not in SHAPES or m.rest != ["f32", kind, kind] or (rows, depth) != (64, SHAPES[kind]):
        m.refuse("types or shape")
    target, left, right, add, *rest = ins.operands
    in_registers = isinstance(left, Vector)
    numbers = [getattr(o, "text", None) for o in rest]
    transposes = 0 if kind == "tf32" else 1 if in_registers else 2
    if len(items(target)) != columns // 2 or numbers[:2] != ["1", "1"] or len(numbers) != 2 + transposes:
        m.refuse("operands")
    left_transposed, right_transposed = ((False, False, *(n == "1" for n in numbers[2:]))[-2:])
    target = [t.index for t in items(target)]
    words = [(x.index, reader(x, "b32", ins)) for x in items(left)] if in_registers else []
    read_left = None if in_registers else reader(left, "b64", ins)
    read_right, scale = reader(right, "b64", ins), reader(add, "pred", ins)

    def step(state, mask):
        if mask is not None or state.shape[0] % 128:
            raise Refused(f"only some warps execute {ins.text}")
        core = state.matrices
        b, cells = core.matrix(read_right(state), columns, kind, right_transposed, None, ins.text)
        if in_registers:
            a = left_fragments([read(state) for _, read in words], kind).reshape(-1, 64, depth)
        else:
            a, more = core.matrix(read_left(state), 64, kind, left_transposed, 16, ins.text)
            cells = np.concatenate((cells, more))
        product = product_registers(np.matmul(a, b.swapaxes(1, 2)))
        core.start(target, product, np.broadcast_to(scale(state), state.shape), [i for i, _ in words], cells, ins.text)

    return step


class Asynchronous:
    """wgmma, which reads shared memory through a proxy of its own and writes registers when it likes.

    ``unfenced``: who stored to shared memory without fence.proxy.async since; ``reading``: how many unfinished products read
    there. Cells of two bytes.
    """

    def __init__(self, state):
        self.state, self.memory = state, state.memory
        self.start_address = self.memory.shared_start
        size = int(self.memory.shared_bases[-1]) + self.memory.shared_size - self.start_address
        self.unfenced, self.reading = np.zeros(size // 2 + 8, np.int32), np.zeros(size // 2 + 8, np.int16)
        self.open, self.groups = [], []
        self.results, self.unfinished = {}, {}  # by register: the value to come, and how many products write it
        self.ordered, self.before = {}, {}  # by register: the value that the last wgmma.fence saw, and the one before it
        self.seen = set()  # where those values lie: a move behind the fence, as LLVM places it for ptxas to order, keeps that
        self.last_fence = None

    def stored(self, addresses, size, warps, text):
        inside = addresses >= self.start_address
        cells = (addresses[inside].astype(np.int64) - self.start_address >> 1)[:, None] + np.arange(max(1, size // 2))
        if self.reading[cells].any():
            raise Fault(f"store to shared memory that an unfinished wgmma reads: {text}")
        self.unfenced[cells] = warps[inside][:, None] + 1

    def fence(self, mask, number):
        mine = self.unfenced != 0
        if mask is not None:
            mine &= np.isin(self.unfenced, self.state.number[mask] // 32 + 1)
        if mine.any():
            self.state.hazards.useful_fences.add(number)
        self.unfenced[mine] = 0

    def matrix(self, descriptors, rows, kind, transposed, rows_of_a_warp, text):
        """(groups of four warps, rows, depth) as descriptors say, and the cells where it lies.

        ``rows_of_a_warp``: each warp reads as many rows of its own; None: each reads all.
        """
        descriptors = np.broadcast_to(descriptors, self.state.shape).reshape(-1, 128)
        if (descriptors != descriptors[:, :1]).any():
            raise Fault(f"descriptors differ within a group of warps: {text}")
        depth, wide = SHAPES[kind], 4 if kind == "tf32" else 2
        row, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
        matrices, all_cells = [], []
        for group, descriptor in enumerate(descriptors[:, 0].tolist()):
            offsets = descriptor_offsets(descriptor, row, k, wide, transposed, text)
            base = int(self.state.shared_base[group * 128])
            addresses = base + offsets
            slots = self.memory.slots(addresses.ravel().astype(np.uint64), wide, text)
            cells = addresses - self.start_address >> 1
            if self.unfenced[cells].any():
                raise Fault(f"wgmma reads what was stored to shared memory without fence.proxy.async: {text}")
            self.note(addresses, row, rows_of_a_warp, group, text)
            words = self.memory.load(slots, wide, 1).reshape(rows, depth)
            if wide == 2:
                matrices.append(bf16_to_float(words) if kind == "bf16" else words.view(np.float16).astype(np.float32))
            else:
                matrices.append(elements(words, kind)[..., 0])
            all_cells.append(np.unique(cells))
        return np.stack(matrices), np.concatenate(all_cells)

    def note(self, addresses, row, rows_of_a_warp, group, text):
        first = self.state.number[group * 128]
        for warp in range(4):
            mine = addresses if rows_of_a_warp is None else addresses[row // rows_of_a_warp == warp]
            lines = np.unique(mine.ravel() >> 4) << 4  # layouts move 16 bytes at a time
            self.state.hazards.note(lines, 16, np.full(len(lines), first + 32 * warp), None, text, asynchronous=True)

    def order(self, number):
        """wgmma.fence: what other instructions wrote to registers is there for the products that follow."""
        self.before, self.ordered, self.last_fence = self.ordered, dict(enumerate(self.state.registers)), number
        self.seen = {place(value) for value in self.state.registers} - {None}

    def start(self, target, product, add, sources, cells, text):
        registers = self.state.registers
        for index in (*target, *sources):
            value = registers[index]
            if value is not IN_FLIGHT and self.ordered.get(index) is not value and place(value) not in self.seen:
                raise Fault(f"a register was written since the last wgmma.fence: {text}")
            if value is not IN_FLIGHT and self.before.get(index) is not value:
                self.state.hazards.useful_fences.add(self.last_fence)
        for index, values in zip(target, product):
            before = self.results[index] if registers[index] is IN_FLIGHT else registers[index]
            sums = values + before.view(np.float32) if add.all() else np.where(add, values + before.view(np.float32), values)
            self.results[index] = sums.astype(np.float32).view(np.uint32)
            self.unfinished[index] = self.unfinished.get(index, 0) + 1
            registers[index] = IN_FLIGHT
        np.add.at(self.reading, cells, 1)
        self.open.append((target, [(i, registers[i]) for i in sources], cells, text))

    def commit(self):
        self.groups.append(self.open)
        self.open = []

    def wait(self, newest):
        """Finish all but the ``newest`` groups."""
        while len(self.groups) > newest:
            for target, sources, cells, text in self.groups.pop(0):
                np.subtract.at(self.reading, cells, 1)
                for index, value in sources:
                    if self.state.registers[index] is not value:
                        raise Fault(f"a register was written while a wgmma read it: {text}")
                for index in target:
                    self.unfinished[index] -= 1
                    if not self.unfinished[index]:
                        self.state.registers[index] = self.ordered[index] = self.before[index] = self.results[index]

    def kernel_ends(self):
        if self.open or any(self.groups):
            raise Fault("the kernel ends with wgmma in flight")


def place(value):
    return value.__array_interface__["data"][0] if isinstance(value, np.ndarray) else None


def descriptor_offsets(descriptor, row, k, wide, transposed, text):
    """Where the elements of a matrix lie in shared memory, by its descriptor: start, strides and swizzle."""
    if descriptor & ~0xC000_3FFF_3FFF_3FFF:
        raise Refused(f"descriptor {descriptor:#x}: {text}")
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = descriptor >> 62
    width = (16, 128, 64, 32)[swizzle]
    if transposed:
        if not swizzle:
            raise Refused(f"transposed without a swizzle: {text}")
        offsets = start + row * wide // width * leading + k // 8 * stride + k % 8 * width + row * wide % width
    elif swizzle:
        offsets = start + row // 8 * stride + row % 8 * width + k * wide
    else:
        offsets = start + row // 8 * stride + row % 8 * 16 + k * wide // 16 * leading + k * wide % 16
    return offsets ^ ((offsets >> 7 & (0, 7, 3, 1)[swizzle]) << 4)
