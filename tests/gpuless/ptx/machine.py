"""Runs a kernel: which lanes execute which instructions, barriers, and the end of a launch."""

import functools
from typing import NamedTuple

import numpy as np

from . import matrix, moves  # their instructions join DECODERS
from .arithmetic import DECODERS
from .hazards import Hazards
from .memory import Copies, Memory
from .parser import Fault, Kernel, Label, Refused, parse
from .values import IN_FLIGHT, STORAGE, UNWRITTEN, Modifiers, operands, reader, spread

LANES = 1 << 14  # at once
WAITS, LEAVES = "waits", "leaves"  # ends of a block of code, beside branches


class Code:
    """A kernel cut where lanes can part or meet: ``blocks[i]`` is its steps, its end, the guard of that end, its last
    instruction. ``without``: the number of an instruction to leave out. ``steps`` keeps what has been decoded."""

    def __init__(self, kernel: Kernel, steps: dict, without: int | None = None):
        self.kernel, self.steps = kernel, steps
        starts = {0, *kernel.labels.values()}
        ends = {"bra", "ret", "exit", "bar", "barrier"}
        for i, ins in enumerate(kernel.instructions):
            if ins.name in ends and "warp" not in ins.modifiers:
                starts.add(i + 1)
        starts = sorted(s for s in starts if s < len(kernel.instructions))
        number = {start: i for i, start in enumerate(starts)}
        after = len(starts)  # where lanes go that fall off the end
        self.labels = {label: number.get(start, after) for label, start in kernel.labels.items()}
        self.blocks, self.matrices = [], False
        for start, end in zip(starts, [*starts[1:], len(kernel.instructions)]):
            *body, last = kernel.instructions[start:end]
            finish, guard = self.ending(last) if last.number != without else (None, None)
            if finish is None:
                body.append(last)
            body = [ins for ins in body if ins.number != without]
            self.blocks.append((tuple(map(self.step, body)), finish, guard, last))
            self.matrices |= any(ins.name == "wgmma" for ins in body)

    def ending(self, ins):
        guard = ins.guard and reader(ins.guard, "pred", ins)
        m = Modifiers(ins)
        if ins.name == "bra":
            m.flag("uni")
            m.done()
            (target,) = operands(ins, 1)
            if not isinstance(target, Label):
                raise Refused(ins.text)
            return self.labels[target.name], guard
        if ins.name in ("ret", "exit"):
            m.done()
            operands(ins, 0)
            return LEAVES, guard
        if ins.name in ("bar", "barrier") and "warp" not in ins.modifiers:
            m.all("sync")
            if ins.name == "barrier":
                m.all("aligned")
            m.done()
            # Barriers of a part of the block aren't modelled: an immediate number and all threads.
            if guard or [getattr(o, "text", None) for o in operands(ins, 1)] != ["0"]:
                raise Refused(ins.text)
            return WAITS, None
        return None, None

    def step(self, ins):
        if ins.number not in self.steps:
            self.steps[ins.number] = self.decode(ins)
        return self.steps[ins.number]

    def decode(self, ins):
        if ins.name not in DECODERS:
            raise Refused(f"unknown instruction: {ins.text}")
        step = DECODERS[ins.name](ins)
        if ins.guard is None:
            return step
        guard = reader(ins.guard, "pred", ins)

        def guarded(state, mask):
            taken = spread(guard(state), state.shape)
            if mask is not None:
                taken = taken & mask
            if taken.all():
                step(state, None)
            elif taken.any():
                step(state, taken)

        return guarded


@functools.lru_cache(64)
def load(ptx: str, name: str | None) -> Code:
    return Code(parse(ptx, name), {})


class State:
    """Registers and positions of all lanes of some thread blocks, which run side by side."""

    def __init__(self, code, memory, hazards, parameters, threads, blocks, grid, shared):
        self.code, self.memory, self.hazards = code, memory, hazards
        self.origin, self.parameters = np.uint64(memory.origin), memory.origin + parameters  # as addresses
        self.threads, self.count = threads, len(blocks)
        lanes = threads * self.count
        self.shape = (lanes,)
        self.registers = [UNWRITTEN] * len(code.kernel.widths)
        thread, block = np.tile(np.arange(threads), self.count), np.repeat(blocks, threads)
        self.lane, self.warp_start = thread % 32, np.arange(lanes) // 32 * 32
        self.number = block * threads + thread  # through the whole launch
        unsigned = lambda values: np.broadcast_to(np.asarray(values, np.uint32), self.shape).copy()  # noqa: E731
        self.special = {"%laneid": unsigned(self.lane)}
        for axis, size, before in zip("xyz", grid, (1, grid[0], grid[0] * grid[1])):
            self.special[f"%ctaid.{axis}"] = unsigned(block // before % size)
            self.special[f"%nctaid.{axis}"] = unsigned(size)
            self.special[f"%tid.{axis}"] = unsigned(thread if axis == "x" else 0)
            self.special[f"%ntid.{axis}"] = unsigned(threads if axis == "x" else 1)
        self.shared_base = np.repeat(memory.open_shared(self.count, shared), threads).astype(np.uint64)
        self.copies = Copies(self)
        self.matrices = matrix.Asynchronous(self) if code.matrices else None

    def write(self, index, values, mask):
        if values.shape != self.shape:
            values = np.broadcast_to(values, self.shape)
        old = self.registers[index]
        if old is IN_FLIGHT:
            raise Fault("write to a register that an unfinished wgmma writes")
        if mask is not None:
            if old is UNWRITTEN:
                bits = self.code.kernel.widths[index]
                old = np.full(self.shape, True if bits == 1 else np.iinfo(STORAGE[bits]).max, STORAGE[bits])
            values = np.where(mask, values, old)
        self.registers[index] = values

    def note(self, addresses, size, lanes, values, text):
        """An access: a store of ``values``, or a load if there are none."""
        numbers = self.number if lanes is None else self.number[lanes]
        self.hazards.note(addresses.astype(np.int64), size, numbers, values, text)
        if values is not None and self.matrices:
            self.matrices.stored(addresses, size, numbers // 32, text)

    def run(self):
        """The lanes furthest behind run first, so that those which parted meet again."""
        blocks, end = self.code.blocks, len(self.code.blocks)
        at = np.zeros(self.shape, np.int64)
        waiting = np.zeros(self.shape, bool)
        together = 0  # the block of code where all lanes are, or None
        while True:
            if together is None:
                ready = np.where(waiting, end, at)
                number = int(ready.min())
                if number == end:
                    if not waiting.any():
                        break
                    self.release(at, waiting)
                    continue
                mask = ready == number
                if mask.all():
                    mask, together = None, number
            elif together == end:
                break
            else:
                number, mask = together, None
            steps, finish, guard, last = blocks[number]
            for step in steps:
                step(self, mask)
            if finish is None:
                target, taken = number + 1, None
            elif finish is WAITS:
                target, taken = number + 1, None
                if mask is None:
                    self.hazards.barrier(None, last.number)
                else:
                    waiting |= mask  # lanes that went back to the head of a loop wait there for the others of their warp
            else:
                target = end if finish is LEAVES else finish
                taken = guard and spread(guard(self), self.shape)
            if mask is None and (taken is None or taken.all()):
                together = target
            elif mask is None and not taken.any():
                together = number + 1
            else:
                if together is not None:
                    at[:] = together
                    together = None
                mask = np.ones(self.shape, bool) if mask is None else mask
                if taken is None:
                    at[mask] = target
                else:
                    at[mask & taken], at[mask & ~taken] = target, number + 1
        if self.copies.pending:
            raise Fault(f"the kernel ends with copies in flight: {self.copies.pending[0][-1]}")
        if self.matrices:
            self.matrices.kernel_ends()

    def release(self, at, waiting):
        """Every lane that still runs waits. A block goes on if all its lanes that haven't left wait at one barrier."""
        where, stopped = at.reshape(-1, self.threads), waiting.reshape(-1, self.threads)
        moves.whole_warps(waiting, self.code.blocks[at[waiting][0] - 1][3].text)
        first = np.where(stopped, where, -1).max(1, keepdims=True)
        if ((where != first) & stopped).any():
            raise Fault("threads of one block wait at different barriers")
        if (stopped.any(1) & ~stopped.all(1)).any():
            raise Fault("some threads wait at a barrier that others of their block never reach")
        # They wait behind the barrier; blocks at different ones meet one after another.
        for behind in np.unique(at[waiting]):
            self.hazards.barrier(self.number[waiting & (at == behind)], self.code.blocks[behind - 1][3].number)
        waiting[:] = False


class Launch(NamedTuple):
    """A launch, ready to run. ``arguments``: the bytes of each parameter; those left out at the end are null."""

    ptx: str
    name: str | None
    memory: Memory
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes of dynamic shared memory
    arguments: list[bytes]
    only: tuple[int, ...] | None = None  # numbers of the blocks to run; None: all
    without: int | None = None  # number of an instruction to leave out
    trace: bool = False  # keep what ``Hazards.crossed`` needs

    def run(self) -> Hazards:
        code = load(self.ptx, self.name)
        if self.without is not None:
            code = Code(code.kernel, code.steps, self.without)
        memory, parameters = self.memory, self.place_arguments(code.kernel)
        hazards = Hazards(memory, self.threads, self.trace)
        # Blocks side by side share one set of registers, which wgmma, slow to write, would hold for all of them.
        at_once = 1 if code.matrices else max(1, LANES // self.threads)
        total = self.grid[0] * self.grid[1] * self.grid[2]
        chosen = np.arange(total) if self.only is None else np.array(self.only)
        shared = code.kernel.shared_bytes + self.shared
        try:
            with np.errstate(all="ignore"):
                for blocks in np.array_split(chosen, -(-len(chosen) // at_once)):
                    State(code, memory, hazards, parameters, self.threads, blocks, self.grid, shared).run()
                    hazards.barrier()
                hazards.launch_ends()
        except Fault as fault:
            raise Fault(f"{code.kernel.name}: {fault}") from None
        return hazards

    def place_arguments(self, kernel):
        threads, arguments = self.threads, self.arguments
        if kernel.threads is not None and (threads > kernel.threads or kernel.exact_threads and threads != kernel.threads):
            raise Fault(f"{kernel.name} is compiled for {kernel.threads} threads, not {threads}")
        if threads % 32 or len(arguments) > len(kernel.parameters):
            raise Fault(f"{kernel.name}: {threads} threads, {len(arguments)} arguments for {len(kernel.parameters)}")
        packed = bytearray(kernel.parameter_bytes)
        for argument, (size, offset) in zip(arguments, kernel.parameters):
            if len(argument) != size:
                raise Fault(f"{kernel.name}: an argument of {len(argument)} bytes for a parameter of {size}")
            packed[offset : offset + size] = argument
        start = self.memory.add(len(packed), f"the parameters of {kernel.name}")
        self.memory.data[start : start + len(packed)] = np.frombuffer(bytes(packed), np.uint8)
        return start
