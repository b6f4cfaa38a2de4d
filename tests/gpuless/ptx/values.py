"""Operands as functions of the machine's state, and the modifiers of an instruction."""

import numpy as np

from .parser import (
    DISCARD,
    WIDTHS,
    Address,
    Fault,
    Immediate,
    Instruction,
    Negated,
    Refused,
    Register,
    Special,
    Symbol,
    Vector,
    immediate_integer,
)

# Bits of a register -> how it is kept.
STORAGE = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16, "b16": np.uint16, "f16": np.float16,
    "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32, "u64": np.uint64, "s64": np.int64,
    "b64": np.uint64, "pred": np.bool_, "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32,
}  # fmt: skip
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")


class Unwritten:
    """Stands in a register that nothing has written: all bits set, NaN. Compilers leave lanes undefined that don't matter."""

    def view(self, dtype):
        storage = STORAGE[np.dtype(dtype).itemsize * 8]
        return np.bool_(True) if dtype is np.bool_ else storage(np.iinfo(storage).max).view(dtype)


class InFlight:
    def view(self, dtype):
        raise Fault("read of a register that an unfinished wgmma writes")


UNWRITTEN, IN_FLIGHT = Unwritten(), InFlight()


def spread(value, shape):
    """One value a lane. np.broadcast_to takes as long as a product of all lanes."""
    return value if value.shape == shape else np.broadcast_to(value, shape)


def bits_of(kind: str) -> int:
    return WIDTHS.get(kind) or np.dtype(TYPES[kind]).itemsize * 8


def bf16_to_float(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values):
    """To nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def flush(values):
    """Subnormal float32 numbers to zero, as .ftz wants."""
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


class Modifiers:
    """The modifiers of one instruction: each is asked for once, and what nobody asked for is refused."""

    def __init__(self, instruction: Instruction):
        self.instruction, self.rest = instruction, list(instruction.modifiers)

    def refuse(self, why="unknown modifier"):
        raise Refused(f"{why}: {self.instruction.text}")

    def flag(self, name):
        if name in self.rest:
            self.rest.remove(name)
            return True
        return False

    def one_of(self, *names, default=None):
        for name in names:
            if self.flag(name):
                return name
        return default if default is not None else self.refuse(f"none of {names}")

    def all(self, *names):
        for name in names:
            self.flag(name) or self.refuse(f"without .{name}")

    def kind(self, *allowed):
        """The type, which comes last."""
        kind = self.rest.pop() if self.rest else self.refuse("no type")
        return kind if kind in (allowed or TYPES) else self.refuse(f"type .{kind}")

    def done(self):
        if self.rest:
            self.refuse(f"modifiers {self.rest}")


def operands(instruction: Instruction, *counts: int) -> tuple:
    if len(instruction.operands) not in counts:
        raise Refused(f"{len(instruction.operands)} operands: {instruction.text}")
    return instruction.operands


def immediate(text: str, kind: str, instruction: Instruction):
    dtype, bits = TYPES[kind], bits_of(kind)
    if text[:2] in ("0f", "0F", "0d", "0D"):
        if (kind[0] == "f" or kind[0] == "b") and bits == (len(text) - 2) * 4:
            return STORAGE[bits](int(text[2:], 16)).view(dtype)
    elif kind[0] != "f":
        value = int(text, 0)
        if kind == "pred":
            return np.bool_(value != 0)
        if -(1 << bits - 1) <= value < 1 << bits:
            return STORAGE[bits](value % (1 << bits)).view(dtype)
    raise Refused(f"immediate {text} as .{kind}: {instruction.text}")


def reader(operand, kind: str, instruction: Instruction, narrow: bool = False):
    """A function of the state that gives the operand as an array (or a number) of type ``kind``.

    ``narrow``: the register may be wider, its low bits are taken.
    """
    dtype, bits = TYPES[kind], bits_of(kind)
    if isinstance(operand, Register):
        index = operand.index
        if operand.bits == bits:
            return lambda state: state.registers[index].view(dtype)
        if narrow and operand.bits > bits > 1:
            storage = STORAGE[bits]
            return lambda state: state.registers[index].view(STORAGE[operand.bits]).astype(storage).view(dtype)
    elif isinstance(operand, Immediate):
        value = immediate(operand.text, kind, instruction)
        return lambda state: value
    elif isinstance(operand, Special) and kind in ("u32", "b32", "s32"):
        name = operand.name
        return lambda state: state.special[name].view(dtype)
    elif isinstance(operand, Symbol) and kind in ("u32", "b32", "u64", "b64"):
        if operand.space == "param" and bits == 64:
            offset = operand.offset
            return lambda state: dtype(state.parameters + offset)
        if operand.space == "shared":
            address = dtype(operand.offset)
            return lambda state: address
    elif isinstance(operand, Negated) and kind == "pred":
        positive = reader(operand.predicate, kind, instruction)
        return lambda state: ~positive(state)
    raise Refused(f"operand {operand} as .{kind}: {instruction.text}")


def writer(operand, kind: str, instruction: Instruction, widen: bool = False):
    """A function (state, values, mask) that stores an array of type ``kind`` to the operand.

    ``widen``: the register may be wider; signed values keep their sign.
    """
    bits = bits_of(kind)
    if operand == DISCARD:
        return lambda state, values, mask: None
    if not isinstance(operand, Register):
        raise Refused(f"result {operand}: {instruction.text}")
    index, storage = operand.index, STORAGE[operand.bits]
    if operand.bits == bits:
        return lambda state, values, mask: state.write(index, values.view(storage), mask)
    if widen and operand.bits > bits > 1:
        wide = {16: np.int16, 32: np.int32, 64: np.int64}[operand.bits] if kind[0] == "s" else storage
        return lambda state, values, mask: state.write(index, values.astype(wide).view(storage), mask)
    raise Refused(f"result of .{kind} in {operand.bits} bits: {instruction.text}")


def items(operand) -> tuple:
    """The elements of a vector operand, or the operand itself."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def address_reader(operand, instruction: Instruction):
    """A function of the state that gives an address as uint64."""
    if not isinstance(operand, Address):
        raise Refused(f"address {operand}: {instruction.text}")
    offset = np.uint64(operand.offset % (1 << 64))
    if isinstance(operand.base, Register) and operand.base.bits == 32:
        read32 = reader(operand.base, "u32", instruction)
        small = np.uint32(operand.offset % (1 << 32))
        return lambda state: (read32(state) + small).astype(np.uint64)
    read = reader(operand.base, "u64", instruction)
    return lambda state: read(state) + offset


def immediate_integer_operand(operand, instruction: Instruction) -> int:
    if not isinstance(operand, Immediate):
        raise Refused(f"operand {operand} isn't constant: {instruction.text}")
    return immediate_integer(operand.text)
