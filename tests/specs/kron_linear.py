import itertools
from functools import partial

import torch

from fastadapt.ops import kron_linear, kron_linear_reference
from fastadapt.ops.kron_linear import _bwd, _fwd

from ..spec import Bad, Case, Compiled, Numerics, OpSpec


def flat(fn):
    """``fn`` with each factor as an argument of its own, as the battery and the benchmarks want to see tensors."""

    def call(x, a, s, t, **options):
        return fn(x, a, s if t is None else (s, t), **options)

    return call


def make(
    dtype, device, *, leading, a, b, q, terms=1, bias=True, residual=True, scale=0.5, parameters=None, gain=1.0
):  # fmt: skip
    """Arguments of a call: ``a`` and ``b`` are the sizes (in, out) of the two factors, ``parameters`` a dtype of their own."""
    parameters = dtype if parameters is None or dtype == torch.float64 else parameters
    randn = lambda *s: torch.randn(s, dtype=torch.float32, device=device)  # noqa: E731
    weight = lambda *s, gain=1.0: (gain * randn(*s)).to(parameters)  # noqa: E731
    n = a[1] * b[1]
    arguments = {
        "x": randn(*leading, a[0] * b[0]).to(dtype),
        "a": weight(terms, *a, gain=gain * a[0] ** -0.5),
        "s": weight(terms, b[0], q, gain=b[0] ** -0.5),
        "t": weight(terms, q, b[1], gain=(terms * q) ** -0.5),
        "scale": weight() if scale == "0-d" else scale,
    }
    if bias:
        arguments["bias"] = weight(n)
    if residual:
        arguments["residual"] = randn(*leading, n).to(dtype)
    return arguments


def case(name, **options):
    return Case(name, partial(make, **options))


def bench(m, a, b, q):
    flops = 2 * m * q * (a[0] * b[0] + a[0] * a[1] + a[1] * b[1])
    return Case(
        f"m{m}-{a[0]}x{a[1]}-{b[0]}x{b[1]}-r{q}", partial(make, leading=(m,), a=a, b=b, q=q, bias=False, residual=False),
        flops=flops, bytes=lambda item: m * (a[0] * b[0] + a[1] * b[1]) * item,
    )  # fmt: skip


EVERYTHING = {"scale": "0-d", "terms": 2}
CASES = (
    case("small", leading=(5,), a=(3, 4), b=(11, 6), q=2),
    case("one", leading=(1,), a=(1, 1), b=(1, 1), q=1),
    case("empty", leading=(0,), a=(2, 2), b=(4, 3), q=2),
    case("vector", leading=(), a=(4, 2), b=(10, 9), q=3),
    case("m33-d65-r17", leading=(33,), a=(5, 3), b=(13, 17), q=17),
    case("square", leading=(31,), a=(8, 8), b=(24, 24), q=16),
    case("in-not-out", leading=(17,), a=(4, 11), b=(33, 16), q=8),
    case("terms", leading=(19,), a=(4, 4), b=(16, 10), q=2, terms=4),
    case("a-of-one-column", leading=(18,), a=(7, 1), b=(20, 40), q=4),
    case("a-of-one-row", leading=(18,), a=(1, 6), b=(40, 20), q=4),
    case("large-a", leading=(4,), a=(24, 33), b=(2, 3), q=12),
    case("wide-rank", leading=(12,), a=(2, 3), b=(70, 50), q=40),
    case("many-rows", leading=(300,), a=(4, 2), b=(10, 12), q=3),
    case("4-d", leading=(2, 3, 2), a=(4, 4), b=(6, 6), q=2),
    case("bare", leading=(19,), a=(4, 4), b=(10, 10), q=2, bias=False, residual=False, scale=1.0),
    case("learned-scale", leading=(19,), a=(4, 4), b=(10, 10), q=2, scale="0-d"),
    case("everything", leading=(3, 7), a=(4, 3), b=(18, 24), q=5, **EVERYTHING),
    case("float32-parameters", leading=(19,), a=(4, 4), b=(10, 12), q=2, parameters=torch.float32),
)


def change(**edits):
    """Replace arguments; an edit that is a function gets all arguments of the good call."""
    return lambda a: {**a, **{name: edit(a) if callable(edit) else edit for name, edit in edits.items()}}


def cut(name):
    return lambda a: a[name][1:]


# Edits of the case "small": x (5, 33), a (1, 3, 4), s (1, 11, 2), t (1, 2, 6).
BAD = (
    Bad("x-integer", change(x=lambda a: torch.zeros(5, 33, dtype=torch.int64, device=a["x"].device)), TypeError,
        "x must be .*float32.*, got torch.int64"),
    Bad("x-not-a-tensor", change(x=[1.0]), TypeError, "x must be a tensor, got list"),
    Bad("width", change(x=lambda a: a["x"][:, 1:]), ValueError,
        r"a must be \(terms, a_in, a_out\) with an a_in that divides the width 32 of x, got \(1, 3, 4\)"),
    Bad("no-terms", change(a=cut("a")), ValueError, r"a must be .* with no size zero, got \(0, 3, 4\)"),
    Bad("a-rank", change(a=lambda a: a["a"][0]), ValueError, r"a must be \(terms, a_in, a_out\).*got \(3, 4\)"),
    Bad("s-shape", change(s=lambda a: a["s"][:, 1:]), ValueError,
        r"s must be \(terms, b_in, q\) with a_in \* b_in the width of x = \(1, 11, 2\), got \(1, 10, 2\)"),
    Bad("t-shape", change(t=lambda a: a["t"][:, 1:]), ValueError,
        r"t must be \(terms, q, b_out\) = \(1, 2, 6\), got \(1, 1, 6\)"),
    Bad("terms-differ", change(a=lambda a: a["a"].expand(2, -1, -1)), ValueError,
        r"s must be .* = \(2, 11, 2\), got \(1, 11, 2\)"),
    Bad("factor-dtype", change(t=lambda a: a["t"].double()), TypeError, "t must be torch.* like .*, got torch.float64"),
    Bad("factors-differ", lambda a: {k: a[k].half() if k in ("x", "residual", "a") else a[k] for k in a}, TypeError,
        "s must be torch.float16 like a, got torch.float32"),
    Bad("factor-device", change(s=lambda a: a["s"].to("meta")), ValueError, "s must be on .* like x, got meta"),
    Bad("bias", change(bias=cut("bias")), ValueError, r"bias must be \(a_out \* b_out,\) = \(24,\), got \(23,\)"),
    Bad("residual-shape", change(residual=lambda a: a["x"]), ValueError,
        r"residual must be \(5, 24\) .* like the output, got \(5, 33\)"),
    Bad("residual-dtype", change(residual=lambda a: a["residual"].double()), ValueError,
        "residual must be .* like the output, got .*torch.float64"),
    Bad("scale-dtype", change(scale=lambda a: torch.ones((), dtype=torch.int64, device=a["x"].device)), TypeError,
        "scale must be torch.float32 like x, got torch.int64"),
    Bad("integers-scaled", change(scale=lambda a: a["bias"][0], a=lambda a: a["a"].long()), TypeError,
        "a must be float16, .* got torch.int64"),
    Bad("one-factor-of-integers-scaled", change(scale=lambda a: a["bias"][0], t=lambda a: a["t"].long()), TypeError,
        "t must be torch.float32 like x, got torch.int64"),
    Bad("scale-type", change(scale="big"), TypeError, "scale must be a number or a 0-d tensor, got str"),
    Bad("backend", change(backend="cuda"), ValueError, "backend must be None or one of .*'native'.*, got 'cuda'"),
)  # fmt: skip


def leaf_args(arguments):
    x, a, s, t = (arguments[name] for name in ("x", "a", "s", "t"))
    rest = (arguments.get(name) for name in ("bias", "residual"))
    return kron_linear.arguments(x, a, s if t is None else (s, t), *rest, arguments.get("scale", 1.0))


def compiled(dtype, name, quick=(), aligned=True, **options):
    return Compiled(case(name, **options), dtype, quick, aligned=aligned)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMPILED = (
    compiled(BF16, "square-r16", leading=(4096,), a=(8, 8), b=(512, 512), q=16, quick=(90,)),
    compiled(FP32, "square-r4", leading=(4096,), a=(16, 16), b=(48, 48), q=4, quick=(80,)),
    compiled(FP16, "long-r32", leading=(4096,), a=(4, 16), b=(1024, 256), q=32, parameters=FP32, residual=False),
    compiled(FP16, "wide-r128", leading=(4096,), a=(4, 4), b=(256, 256), q=128),
    compiled(FP32, "wide-r128", leading=(4096,), a=(4, 4), b=(256, 256), q=128),
    compiled(BF16, "odd", leading=(17,), a=(5, 1), b=(13, 17), q=3, aligned=False, **EVERYTHING),
)


def ordered(x, a, s, t, *, bias=None, residual=None, scale=1.0):
    """The formula through the numbers of rank space."""
    a, s, t = (factor.to(x.dtype) for factor in (a, s, t))
    z = torch.einsum("...ap,ipk->...aik", x.unflatten(-1, (a.shape[1], -1)), s)
    y = scale * torch.einsum("...bik,ikj->...bj", torch.einsum("...aik,iab->...bik", z, a), t).flatten(-2)
    y = y if bias is None else y + bias.to(x.dtype)
    return y if residual is None else residual + y


def rounded(a, unit, points):
    """Nothing but the output and the gradients is rounded."""
    return ordered(**a)


def fuzz(draw, st):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    small, wide = (1, 2, 3, 4, 7, 8, 16), (1, 2, 7, 8, 16, 17, 33, 64)
    return case(
        "fuzz", leading=pick((0,), (1,), (2,), (3, 5), (16,), (17,), (2, 3, 5), (33,), (130,)),
        a=(pick(*small), pick(*small)), b=(pick(*wide), pick(*wide)), q=pick(1, 2, 3, 8, 17), terms=pick(1, 1, 2, 4),
        bias=draw(st.booleans()), residual=draw(st.booleans()), scale=pick(0.5, 1.0, "0-d"),
        parameters=pick(None, None, torch.float32),
    )  # fmt: skip


NUMERICS = Numerics(
    rounded=rounded,
    # Under a 16-bit x a float32 gradient shows how a sum of float32 is rounded.
    predicted=lambda a, unit: ("y", "x", "a", "s", "t", "bias") if a["x"].dtype == a["a"].dtype else ("y", "x"),
    exact=(case("integers", leading=(67,), a=(3, 4), b=(17, 10), q=3, scale=2.0),),
    rows=(),
    alone={},
    paths=(
        case("rows", leading=(130,), a=(4, 3), b=(18, 25), q=5, **EVERYTHING),
        case("few-rows", leading=(5,), a=(8, 8), b=(96, 96), q=8),
    ),
    fuzz=fuzz,
    rounds_inside=False,
    ordered=ordered,
)

SQUARES = (((8, 8), (96, 96), 8), ((16, 16), (48, 48), 4), ((8, 8), (512, 512), 16), ((4, 4), (1024, 1024), 32))
SPEC = OpSpec(
    op=flat(kron_linear),
    reference=flat(kron_linear_reference),
    fwd=_fwd,
    bwd=_bwd,
    leaf_args=leaf_args,
    bwd_leaf_args=lambda grad_y, args, mask: (grad_y, *args[:5], args[6], mask),
    bwd_outputs=("x", "a", "s", "t", "bias"),
    activations=("x", "residual"),
    cases=CASES,
    bench=tuple(bench(m, *sizes) for sizes, m in itertools.product((*SQUARES, ((16, 43), (256, 256), 16)), (16, 256, 1024))),
    bench_cuda=tuple(bench(m, *sizes) for sizes, m in itertools.product(SQUARES[2:], (512, 4096))),
    bad=BAD,
    numerics=NUMERICS,
    compiled=COMPILED,
    huge=(case("rows", leading=(2**22 + 5,), a=(4, 4), b=(130, 130), q=2, **EVERYTHING),),
    many=((case("rows", leading=(2**22 + 5,), a=(2, 2), b=(1, 1), q=1), ("x",)),),
    tiled=(
        case("few", leading=(37,), a=(4, 3), b=(35, 70), q=5, **EVERYTHING),
        case("many", leading=(18,), a=(3, 5), b=(33, 18), q=17, **EVERYTHING),
    ),
    planted=(case("looped", leading=(1100,), a=(4, 3), b=(50, 70), q=5, **EVERYTHING),),
    large=lambda elements: case("large", leading=(elements // 1024 + 2048,), a=(4, 4), b=(256, 256), q=2, **EVERYTHING),
)
