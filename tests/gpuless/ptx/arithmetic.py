"""Instructions that compute with registers alone. Each function here turns an instruction into step(state, mask)."""

import numpy as np

from .parser import Immediate, Pair, Refused
from .values import (
    INTEGERS,
    TYPES,
    Modifiers,
    bf16_to_float,
    bits_of,
    float_to_bf16,
    flush,
    immediate_integer_operand,
    operands,
    reader,
    writer,
)

DECODERS = {}


def instruction(*names):
    def register(decode):
        DECODERS.update(dict.fromkeys(names, decode))
        return decode

    return register


def compute(ins, kind, function, counts, result=None):
    """step: the first operand becomes ``function`` of the others, all of type ``kind`` but for the result."""
    target, *sources = operands(ins, counts)
    write, reads = writer(target, result or kind, ins), [reader(s, kind, ins) for s in sources]
    if len(reads) == 1:
        (a,) = reads
        return lambda state, mask: write(state, function(a(state)), mask)
    if len(reads) == 2:
        a, b = reads
        return lambda state, mask: write(state, function(a(state), b(state)), mask)
    a, b, c = reads
    return lambda state, mask: write(state, function(a(state), b(state), c(state)), mask)


def fused(a, b, c):
    """a * b + c with one rounding: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def fused_down(a, b, c):
    """The same, rounded towards minus infinity."""
    exact = a.astype(np.float64) * b + c
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def half_function(function, kind):
    """``function`` of float64 on 16-bit floats, rounded once; pairs of them in 32 bits for x2."""
    if kind.startswith("bf16"):
        widen, round_ = bf16_to_float, float_to_bf16
    else:
        widen, round_ = (lambda h: h.view(np.float16)), (lambda v: v.astype(np.float16).view(np.uint16))
    single = lambda *halves: round_(function(*(widen(h.view(np.uint16)).astype(np.float64) for h in halves)))  # noqa: E731
    if kind.endswith("x2"):
        def pairs(*words):
            low = single(*(w.astype(np.uint16) for w in words))
            high = single(*((w >> np.uint32(16)).astype(np.uint16) for w in words))
            return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)

        return pairs
    return lambda *h: single(*h).view(TYPES[kind])


HALVES = ("f16", "bf16", "f16x2", "bf16x2")
ROUNDED = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": lambda a, b, c: a * b + c}


@instruction("add", "sub", "mul", "fma")
def decode_sum_or_product(ins):
    if ins.name == "mul" and {"lo", "hi", "wide"} & set(ins.modifiers):
        return decode_integer_product(ins)
    m = Modifiers(ins)
    kind = m.kind("f32", *HALVES, *(INTEGERS if ins.name in ("add", "sub") else ()))
    function, count = ROUNDED[ins.name], 4 if ins.name == "fma" else 3
    if kind in HALVES:
        m.flag("rn")
        function = half_function(function, kind)
    elif kind == "f32":
        rounding = m.one_of("rn", "rm", default="rn")
        if ins.name == "fma":
            function = {"rn": fused, "rm": fused_down}[rounding]
        elif rounding != "rn":
            m.refuse()
        function = flushed(function) if m.flag("ftz") else function
    m.done()
    return compute(ins, kind, function, count)


def flushed(function):
    return lambda *values: flush(function(*map(flush, values)))


def high_half(a, b):
    """The upper bits of an integer product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.int64 if np.issubdtype(a.dtype, np.signedinteger) else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    product = np.asarray(a).astype(object) * np.asarray(b).astype(object) >> 64  # of Python's integers, immediates too
    return np.asarray(product, dtype=object).astype(a.dtype)


@instruction("mad")
def decode_integer_product(ins):
    m = Modifiers(ins)
    kind, part = m.kind(*INTEGERS), m.one_of("lo", "hi", "wide")
    m.done()
    product = {"lo": np.multiply, "hi": high_half}.get(part)
    if part != "wide":
        if ins.name == "mul":
            return compute(ins, kind, product, 3)
        return compute(ins, kind, lambda a, b, c: product(a, b) + c, 4)
    wide_kind = f"{kind[0]}{2 * bits_of(kind)}"
    wide = TYPES[wide_kind]
    target, first, second, *third = operands(ins, 3 if ins.name == "mul" else 4)
    write, a, b = writer(target, wide_kind, ins), reader(first, kind, ins), reader(second, kind, ins)
    if not third:
        return lambda state, mask: write(state, a(state).astype(wide) * b(state).astype(wide), mask)
    c = reader(third[0], wide_kind, ins)
    return lambda state, mask: write(state, a(state).astype(wide) * b(state).astype(wide) + c(state), mask)


def divided(a, b):
    """Integer division towards zero; by zero all bits are set, as on every GPU so far."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if np.issubdtype(a.dtype, np.signedinteger):
        quotient = quotient + ((quotient < 0) & (quotient * safe != a)).astype(a.dtype)
    return np.where(b == 0, ~a.dtype.type(0), quotient)


def remainder(a, b):
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


@instruction("div", "rem")
def decode_quotient(ins):
    m = Modifiers(ins)
    kind = m.kind(*INTEGERS, *(("f32",) if ins.name == "div" else ()))
    if kind != "f32":
        m.done()
        return compute(ins, kind, divided if ins.name == "div" else remainder, 3)
    m.one_of("full", "rn", "approx")
    function = flushed(np.divide) if m.flag("ftz") else np.divide
    m.done()
    return compute(ins, kind, function, 3)


@instruction("min", "max")
def decode_extreme(ins):
    m = Modifiers(ins)
    kind, nan = m.kind("f32", *HALVES, *INTEGERS), m.flag("NaN")
    low = ins.name == "min"
    if kind in INTEGERS:
        function = extreme = np.minimum if low else np.maximum
        if kind == "s32" and m.flag("relu"):  # a negative result is 0
            function = lambda a, b: np.maximum(extreme(a, b), np.int32(0))  # noqa: E731
    else:  # a number wins over NaN unless .NaN
        function = (np.minimum if low else np.maximum) if nan else (np.fmin if low else np.fmax)
        if m.flag("ftz"):
            function = flushed(function)
    m.done()
    return compute(ins, kind, half_function(function, kind) if kind in HALVES else function, 3)


# approx: within two units in the last place on a GPU, rounded from float64 here.
FUNCTIONS = {"ex2": np.exp2, "lg2": np.log2, "rcp": lambda v: 1 / v, "sqrt": np.sqrt, "rsqrt": lambda v: 1 / np.sqrt(v),
             "tanh": np.tanh, "sin": np.sin, "cos": np.cos}  # fmt: skip


@instruction(*FUNCTIONS)
def decode_function(ins):
    m = Modifiers(ins)
    m.kind("f32")
    m.one_of("approx", *(("rn",) if ins.name in ("rcp", "sqrt") else ()))
    exact = FUNCTIONS[ins.name]
    function = lambda v: exact(v.astype(np.float64)).astype(np.float32)  # noqa: E731
    function = flushed(function) if m.flag("ftz") else function
    m.done()
    return compute(ins, "f32", function, 2)


@instruction("neg", "abs", "copysign")
def decode_sign(ins):
    m = Modifiers(ins)
    kind = m.kind("f32", *HALVES, "s16", "s32", "s64")
    function = {"neg": np.negative, "abs": np.abs, "copysign": lambda sign, value: np.copysign(value, sign)}[ins.name]
    if kind in HALVES:
        function = half_function(function, kind)
    elif m.flag("ftz"):
        function = flushed(function)
    m.done()
    return compute(ins, kind, function, 3 if ins.name == "copysign" else 2)


LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@instruction(*LOGIC)
def decode_logic(ins):
    m = Modifiers(ins)
    kind = m.kind("pred", "b16", "b32", "b64")
    m.done()
    return compute(ins, kind, LOGIC[ins.name], 2 if ins.name == "not" else 3)


@instruction("shl", "shr")
def decode_shift(ins):
    m = Modifiers(ins)
    kind = m.kind(*INTEGERS, "b16", "b32", "b64")
    m.done()
    target, value, amount = operands(ins, 3)
    write, a, n = writer(target, kind, ins), reader(value, kind, ins), reader(amount, "u32", ins)
    dtype, bits, left = TYPES[kind], bits_of(kind), ins.name == "shl"
    shift = np.left_shift if left else np.right_shift

    if isinstance(amount, Immediate) and (fixed := n(None)) < bits:
        return lambda state, mask: write(state, shift(a(state), dtype(fixed)), mask)

    def step(state, mask):
        values, by = a(state), n(state)
        shifted = shift(values, np.minimum(by, np.uint32(bits - 1)).astype(dtype))
        # A shift by all bits or more leaves nothing, or the sign.
        gone = shift(values, dtype(bits - 1)) if kind[0] == "s" and not left else dtype(0)
        write(state, np.where(by >= bits, gone, shifted), mask)

    return step


@instruction("bfe")
def decode_extract(ins):
    m = Modifiers(ins)
    kind = m.kind("u32", "s32")
    m.done()
    target, value, first, length = operands(ins, 4)
    first, length = (immediate_integer_operand(o, ins) for o in (first, length))
    if not (first >= 0 and length > 0 and first + length <= 32):
        m.refuse("bits outside the word")
    write, a = writer(target, kind, ins), reader(value, kind, ins)
    up, down = TYPES[kind](32 - length - first), TYPES[kind](32 - length)
    return lambda state, mask: write(state, (a(state) << up) >> down, mask)


@instruction("bfi")
def decode_insert(ins):
    m = Modifiers(ins)
    m.kind("b32")
    m.done()
    target, value, base, first, length = operands(ins, 5)
    first, length = (immediate_integer_operand(o, ins) for o in (first, length))
    if not (first >= 0 and length > 0 and first + length <= 32):
        m.refuse("bits outside the word")
    field = np.uint32(((1 << length) - 1) << first)
    write, a, b = writer(target, "b32", ins), reader(value, "b32", ins), reader(base, "b32", ins)
    return lambda state, mask: write(state, a(state) << np.uint32(first) & field | b(state) & ~field, mask)


@instruction("prmt")
def decode_permute_bytes(ins):
    m = Modifiers(ins)
    m.kind("b32")
    m.done()
    target, low, high, selector = operands(ins, 4)
    selector = immediate_integer_operand(selector, ins)
    if selector & 0x8888 or selector >> 16:
        m.refuse("sign of a byte")
    write, a, b = writer(target, "b32", ins), reader(low, "b32", ins), reader(high, "b32", ins)

    def step(state, mask):
        word, result = a(state).astype(np.uint64) | b(state).astype(np.uint64) << np.uint64(32), np.uint64(0)
        for i in range(4):
            byte = word >> np.uint64(8 * (selector >> 4 * i & 7)) & np.uint64(255)
            result = result | byte << np.uint64(8 * i)
        write(state, result.astype(np.uint32), mask)

    return step


@instruction("lop3")
def decode_three_way_logic(ins):
    m = Modifiers(ins)
    m.kind("b32")
    m.done()
    table = immediate_integer_operand(ins.operands[-1], ins)
    ins.operands = operands(ins, 5)[:4]

    def function(a, b, c):
        result = np.uint32(0)
        for i in range(8):
            if table >> i & 1:
                result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return compute(ins, "b32", function, 4)


@instruction("popc")
def decode_count(ins):
    m = Modifiers(ins)
    m.kind("b32")
    m.done()
    return compute(ins, "b32", lambda v: np.bitwise_count(v).astype(np.uint32), 2)


ORDERED = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal}


@instruction("setp")
def decode_compare(ins):
    m = Modifiers(ins)
    kind = m.kind("f32", *HALVES, *INTEGERS, "b16", "b32", "b64")
    floating = kind in ("f32", *HALVES)
    if floating:
        name = m.one_of(*ORDERED, *(f"{n}u" for n in ORDERED), "nan", "num")
    else:
        name = m.one_of(*(("eq", "ne") if kind[0] == "b" else ORDERED))
    m.done()
    unordered = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
    if name in ("nan", "num"):
        function = unordered if name == "nan" else lambda a, b: ~unordered(a, b)
    elif name.endswith("u"):
        function = lambda a, b: ORDERED[name[:-1]](a, b) | unordered(a, b)  # noqa: E731
    elif name == "ne" and floating:
        function = lambda a, b: (a != b) & ~unordered(a, b)  # noqa: E731
    else:
        function = ORDERED[name]
    if kind.endswith("x2"):
        return compare_both(ins, kind, function)
    if kind == "bf16":
        return compute(ins, kind, lambda a, b: function(bf16_to_float(a), bf16_to_float(b)), 3, "pred")
    return compute(ins, kind, function, 3, "pred")


def compare_both(ins, kind, function):
    """p|q: of the lower halves, and of the upper ones."""
    target, *words = operands(ins, 3)
    if not isinstance(target, Pair):
        raise Refused(f"one predicate for two: {ins.text}")
    writes, words = [writer(p, "pred", ins) for p in target], [reader(word, kind, ins) for word in words]
    widen = bf16_to_float if kind == "bf16x2" else lambda h: h.view(np.float16)

    def step(state, mask):
        values = [word(state) for word in words]
        for write, shift in zip(writes, (0, 16)):
            halves = (widen((v >> np.uint32(shift)).astype(np.uint16)) for v in values)
            write(state, function(*halves), mask)

    return step


@instruction("selp")
def decode_select(ins):
    m = Modifiers(ins)
    kind = m.kind("f32", "f16", *INTEGERS, "b16", "b32", "b64")
    m.done()
    target, yes, no, condition = operands(ins, 4)
    write, a, b, p = writer(target, kind, ins), reader(yes, kind, ins), reader(no, kind, ins), reader(condition, "pred", ins)
    return lambda state, mask: write(state, np.where(p(state), a(state), b(state)), mask)
