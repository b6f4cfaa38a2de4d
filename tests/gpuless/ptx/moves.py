"""Instructions that move and convert values: between registers, types, address spaces and the lanes of a warp."""

import numpy as np

from .arithmetic import instruction
from .parser import Fault, Pair, Vector
from .values import DISCARD, INTEGERS, TYPES, Modifiers, bf16_to_float, bits_of, float_to_bf16, items, operands, reader, writer


@instruction("mov")
def decode_move(ins):
    m = Modifiers(ins)
    kind = m.kind("pred", "f32", *INTEGERS, "b16", "b32", "b64")
    m.done()
    target, source = operands(ins, 2)
    if isinstance(target, Vector) or isinstance(source, Vector):
        return decode_pack(ins, kind, target, source)
    write, read = writer(target, kind, ins), reader(source, kind, ins)
    return lambda state, mask: write(state, read(state), mask)


def decode_pack(ins, kind, target, source):
    """mov between a register and a vector of its parts."""
    parts = items(target if isinstance(target, Vector) else source)
    part = f"b{bits_of(kind) // len(parts)}"
    width, whole, narrow = bits_of(part), TYPES[kind], TYPES.get(part)
    if kind[0] != "b" or width * len(parts) != bits_of(kind) or width < 16:
        Modifiers(ins).refuse("mov of a vector")
    if isinstance(target, Vector):
        read, writes = reader(source, kind, ins), [writer(t, part, ins) for t in parts]

        def unpack(state, mask):
            value = read(state)
            for i, write in enumerate(writes):
                write(state, (value >> whole(width * i)).astype(narrow), mask)

        return unpack
    write, reads = writer(target, kind, ins), [reader(s, part, ins) for s in parts]

    def pack(state, mask):
        value = whole(0)
        for i, read in enumerate(reads):
            value = value | read(state).astype(whole) << whole(width * i)
        write(state, value, mask)

    return pack


@instruction("cvt")
def decode_convert(ins):
    m = Modifiers(ins)
    source = m.kind()
    if m.flag("tf32"):
        return decode_convert_tf32(ins, m, source)
    target = m.kind()
    if target in ("f16x2", "bf16x2"):
        return decode_convert_two(ins, m, source, target)
    integers = (*INTEGERS, "s8", "u8")
    to, dtype = TYPES[target], TYPES[target]
    widen = bf16_to_float if source == "bf16" else lambda v: v
    if source in integers and target in integers:
        function = lambda v: v.astype(to)  # noqa: E731
    elif source in integers and target == "f32":
        m.all("rn")
        function = lambda v: v.astype(np.float32)  # noqa: E731
    elif source == "f32" and target in integers:
        rounding, limits = m.one_of("rzi", "rni", "rmi", "rpi"), np.iinfo(dtype)
        m.flag("ftz")
        whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding]

        def function(v):
            values = np.nan_to_num(whole(v.astype(np.float64)), nan=0.0)
            top = np.nextafter(float(limits.max) + 1, 0) if bits_of(target) == 64 else limits.max
            return np.clip(values, limits.min, top).astype(to)
    elif source in ("f16", "bf16") and target == "f32":
        function = lambda v: widen(v).astype(np.float32)  # noqa: E731
    elif source == "f32" and target in ("f16", "bf16"):
        m.all("rn")
        function = float_to_bf16 if target == "bf16" else lambda v: v.astype(np.float16)
    elif source == target == "f32" and m.flag("sat"):
        function = lambda v: np.where(np.isnan(v), np.float32(0), np.clip(v, np.float32(0), np.float32(1)))  # noqa: E731
    else:
        m.refuse("conversion")
    m.done()
    result, value = operands(ins, 2)
    write, read = writer(result, target, ins, widen=True), reader(value, source, ins, narrow=True)
    return lambda state, mask: write(state, function(read(state)), mask)


def decode_convert_tf32(ins, m, source):
    """To ten bits of mantissa, ties away from zero."""
    m.all("rna")
    m.done()
    if source != "f32":
        m.refuse("conversion")
    result, value = operands(ins, 2)
    write, read = writer(result, "b32", ins), reader(value, "b32", ins)

    def step(state, mask):
        bits = np.asarray(read(state))
        nearest = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        write(state, np.where(np.isfinite(bits.view(np.float32)), nearest, bits), mask)

    return step


def decode_convert_two(ins, m, source, target):
    """The first operand becomes the upper half."""
    m.all("rn")
    m.done()
    if source != "f32":
        m.refuse("conversion")
    round_ = float_to_bf16 if target == "bf16x2" else lambda v: v.astype(np.float16).view(np.uint16)
    result, high, low = operands(ins, 3)
    write, a, b = writer(result, target, ins), reader(high, source, ins), reader(low, source, ins)

    def step(state, mask):
        upper, lower = (round_(read(state)).astype(np.uint32) for read in (a, b))
        write(state, upper << np.uint32(16) | lower, mask)

    return step


@instruction("cvta")
def decode_address_space(ins):
    """Global and param addresses are generic ones; shared memory has a place of its own for each block."""
    m = Modifiers(ins)
    m.kind("u64")
    into, space = m.flag("to"), m.one_of("global", "param", "shared")
    m.done()
    target, source = operands(ins, 2)
    write, read = writer(target, "u64", ins), reader(source, "u64", ins)
    if space != "shared":
        return lambda state, mask: write(state, read(state), mask)
    if into:
        return lambda state, mask: write(state, read(state) - state.shared_base - state.origin, mask)
    return lambda state, mask: write(state, read(state) + state.shared_base + state.origin, mask)


def whole_warps(mask, text):
    if mask is not None and (lanes := mask.reshape(-1, 32).sum(1) % 32).any():
        raise Fault(f"{text}: only {lanes.max()} lanes of a warp arrive")


@instruction("shfl")
def decode_shuffle(ins):
    m = Modifiers(ins)
    m.kind("b32")
    m.all("sync")
    mode = m.one_of("bfly", "idx", "up", "down")
    m.done()
    target, value, by, clamp, members = operands(ins, 5)
    result, inside = (target.value, target.predicate) if isinstance(target, Pair) else (target, DISCARD)
    write, read, source = writer(result, "b32", ins), reader(value, "b32", ins), reader(by, "u32", ins)
    write_inside, bound, who = writer(inside, "pred", ins), reader(clamp, "u32", ins), reader(members, "u32", ins)

    def step(state, mask):
        whole_warps(mask, ins.text)
        taking = True if mask is None else mask
        wrong = (who(state) != np.uint32(0xFFFFFFFF)) | (bound(state) != (0 if mode == "up" else 31))
        if np.any(wrong & taking):
            m.refuse("shfl within a part of a warp")
        lane, offset = state.lane, np.asarray(source(state)).astype(np.int64) & 31
        other = {"bfly": lane ^ offset, "idx": offset + 0 * lane, "up": lane - offset, "down": lane + offset}[mode]
        valid = (other >= 0) & (other < 32)
        values = np.broadcast_to(read(state), lane.shape)
        write(state, values[np.where(valid, other, lane) + state.warp_start], mask)
        write_inside(state, valid, mask)

    return step


@instruction("match")
def decode_match(ins):
    m = Modifiers(ins)
    m.kind("b32")
    m.all("any", "sync")
    m.done()
    target, value, members = operands(ins, 3)
    write, read, who = writer(target, "b32", ins), reader(value, "b32", ins), reader(members, "u32", ins)

    def step(state, mask):
        whole_warps(mask, ins.text)
        if np.any((who(state) != np.uint32(0xFFFFFFFF)) & (True if mask is None else mask)):
            m.refuse("match within a part of a warp")
        values = np.broadcast_to(read(state), state.lane.shape).reshape(-1, 32)
        equal = values[:, :, None] == values[:, None, :]
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        write(state, np.where(equal, bits, np.uint32(0)).sum(2, dtype=np.uint32).reshape(-1), mask)

    return step


@instruction("redux")
def decode_reduction(ins):
    m = Modifiers(ins)
    kind = m.kind("s32", "u32")
    m.all("sync")
    function = {"min": np.minimum, "max": np.maximum, "add": np.add}[m.one_of("min", "max", "add")]
    m.done()
    target, value, members = operands(ins, 3)
    write, read, who = writer(target, kind, ins), reader(value, kind, ins), reader(members, "u32", ins)

    def step(state, mask):
        whole_warps(mask, ins.text)
        if np.any((who(state).astype(np.uint32) != np.uint32(0xFFFFFFFF)) & (True if mask is None else mask)):
            m.refuse("redux within a part of a warp")
        values = np.broadcast_to(read(state), state.lane.shape).reshape(-1, 32)
        write(state, np.repeat(function.reduce(values, 1, dtype=values.dtype), 32), mask)

    return step
