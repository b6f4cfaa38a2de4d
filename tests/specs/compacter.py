import itertools
import math
from functools import partial

import torch

from fastadapt.ops import compacter, compacter_reference
from fastadapt.ops.bottleneck import ACTIVATIONS
from fastadapt.ops.compacter import _bwd, _fwd

from ..spec import Bad, Case, Compiled, Numerics, OpSpec

FACTORS = tuple(f"{side}_{factor}" for side in ("down", "up") for factor in "ast")


def flat(fn):
    """``fn`` with each factor as an argument of its own, as the battery and the benchmarks want to see tensors."""

    def call(x, down_a, down_s, down_t, up_a, up_s, up_t, **options):
        return fn(x, (down_a, down_s, down_t), (up_a, up_s, up_t), **options)

    return call


def make(
    dtype, device, *, shape, r, n=4, q=1, g=None, ids=None, residual="x", scale=0.5, activation="gelu", bias=True,
    parameters=None, gain=1.0,
):  # fmt: skip
    """Arguments of a call. ``ids`` is a nested list, ``parameters`` a dtype of their own, ``gain`` a size of the rules."""
    d, bank = shape[-1], () if g is None else (g,)
    parameters = dtype if parameters is None or dtype == torch.float64 else parameters
    randn = lambda *s: torch.randn(s, dtype=torch.float32, device=device)  # noqa: E731
    weight = lambda *s, gain=1.0: (gain * randn(*s)).to(parameters)  # noqa: E731
    x = randn(*shape).to(dtype)
    arguments = {
        "x": x,
        "down_a": weight(*bank, n, n, n, gain=gain * n**-0.5),
        "down_s": weight(*bank, n, d // n, q, gain=(d // n) ** -0.5),
        "down_t": weight(*bank, n, q, r // n, gain=(n * q) ** -0.5),
        "up_a": weight(*bank, n, n, n, gain=gain * n**-0.5),
        "up_s": weight(*bank, n, r // n, q, gain=(r // n) ** -0.5),
        "up_t": weight(*bank, n, q, d // n, gain=(n * q) ** -0.5),
        "activation": activation,
        "residual": {"x": x, "other": randn(*shape).to(dtype), "none": None}[residual],
        "scale": weight() if scale == "0-d" else scale,
    }
    if bias:
        arguments |= {"down_bias": weight(*bank, r), "up_bias": weight(*bank, d)}
    if ids is not None:
        arguments["adapter_ids"] = torch.tensor(ids, dtype=torch.int64, device=device)
    return arguments


def case(name, **options):
    return Case(name, partial(make, **options))


def bench(m, d, n=4, q=1, reduction=32):
    r = d // reduction
    return Case(
        f"m{m}-d{d}-r{r}", partial(make, shape=(m, d), r=r, n=n, q=q, scale=1.0),
        flops=4 * m * n * q * (d + r + n * n), bytes=lambda item: 2 * m * d * item,
    )  # fmt: skip


EVERYTHING = {"residual": "other", "scale": "0-d", "activation": "gelu_tanh"}
TOKENS = [2, -1, 0, 2, 2, 0, -1, 2, 0, 2, 2, 2]
CASES = (
    case("small", shape=(5, 36), r=8),
    case("one", shape=(1, 1), r=1, n=1),
    case("empty", shape=(0, 8), r=4),
    case("vector", shape=(40,), r=4),
    case("chunks-of-6", shape=(33, 768), r=24),
    case("rank-2", shape=(31, 60), r=12, q=2),
    case("n2-rank-3", shape=(17, 34), r=6, n=2, q=3),
    case("n3", shape=(19, 63), r=15, n=3),
    case("n5-rank-7", shape=(9, 65), r=10, n=5, q=7),
    case("n12", shape=(6, 48), r=24, n=12),
    case("n1-rank-20", shape=(13, 70), r=33, n=1, q=20),
    case("many-rows", shape=(300, 40), r=8),
    case("wide", shape=(18, 1032), r=264),
    case("4-d", shape=(2, 3, 2, 24), r=8, residual="other"),
    *(case(name, shape=(19, 40), r=24, activation=name) for name in ACTIVATIONS if name != "gelu"),
    case("bare", shape=(19, 40), r=8, residual="none", bias=False, scale=1.0),
    case("learned-scale", shape=(19, 40), r=8, scale="0-d"),
    case("everything", shape=(3, 7, 72), r=20, q=2, **EVERYTHING),
    case("m33-d65-r17", shape=(33, 65), r=15, n=5),
    case("float32-parameters", shape=(19, 40), r=8, parameters=torch.float32),
    case("bank-of-sequences", shape=(4, 6, 40), r=8, g=3, ids=[2, 0, -1, 2]),
    case("bank-of-tokens", shape=(2, 6, 40), r=8, g=4, ids=[TOKENS[:6], TOKENS[6:]], residual="none"),
    case("bank-with-everything", shape=(12, 72), r=20, q=2, g=3, ids=TOKENS, **EVERYTHING),
    case("bank-of-one-vector", shape=(24,), r=4, g=2, ids=1),
    case("bank-unused", shape=(5, 24), r=4, g=2, ids=[-1] * 5, residual="other"),
)


def zeros(n, dtype=torch.int64):
    return lambda a: torch.zeros(n, dtype=dtype, device=a["x"].device)


def ids(*values):
    return lambda a: torch.tensor(values, device=a["x"].device)


def change(**edits):
    """Replace arguments; an edit that is a function gets all arguments of the good call."""
    return lambda a: {**a, **{name: edit(a) if callable(edit) else edit for name, edit in edits.items()}}


def bank(adapter_ids):
    factors = {name: (lambda a, name=name: a[name].expand(3, -1, -1, -1)) for name in FACTORS}
    return change(**factors, down_bias=None, up_bias=None, adapter_ids=adapter_ids)


def cut(name):
    return lambda a: a[name][1:]


# Edits of the case "small": x (5, 36), n = 4, r = 8, q = 1.
BAD = (
    Bad("x-integer", change(x=zeros((5, 36)), residual=None), TypeError, "x must be .*float32.*, got torch.int64"),
    Bad("x-not-a-tensor", change(x=[1.0]), TypeError, "x must be a tensor, got list"),
    Bad("width", change(x=lambda a: a["x"][:, :34], residual=None), ValueError,
        r"down\[0\] must be \(n, n, n\) with an n that divides d = 34, got \(4, 4, 4\)"),
    Bad("rule-shape", change(down_a=cut("down_a")), ValueError,
        r"down\[0\] must be \(n, n, n\), or \(g, n, n, n\) with adapter_ids, got \(3, 4, 4\)"),
    Bad("rules-differ", change(up_a=lambda a: a["up_a"][:2, :2, :2]), ValueError,
        r"up\[0\] must be \(n, n, n\) = \(4, 4, 4\), got \(2, 2, 2\)"),
    Bad("no-terms", change(down_a=lambda a: a["down_a"][:0, :0, :0]), ValueError,
        r"down\[0\] must be \(n, n, n\) with an n that divides d = 36, got \(0, 0, 0\)"),
    Bad("down-s", change(down_s=lambda a: a["down_s"][:, 1:]), ValueError,
        r"down\[1\] must be \(n, d/n, q\) = \(4, 9, 1\), got \(4, 8, 1\)"),
    Bad("down-t", change(down_t=lambda a: a["down_t"][1:]), ValueError,
        r"down\[2\] must be \(n, q, r/n\) = \(4, 1, 2\), got \(3, 1, 2\)"),
    Bad("rank", change(down_s=lambda a: a["down_s"][..., :0]), ValueError, r"down\[1\] and down\[2\] must be .* above zero"),
    Bad("up-s", change(up_s=lambda a: a["up_s"][:, :1]), ValueError,
        r"up\[1\] must be \(n, r/n, q\) = \(4, 2, 1\), got \(4, 1, 1\)"),
    Bad("up-t", change(up_t=lambda a: a["up_t"][..., 1:]), ValueError,
        r"up\[2\] must be \(n, q, d/n\) = \(4, 1, 9\), got \(4, 1, 8\)"),
    Bad("down-bias", change(down_bias=cut("down_bias")), ValueError, r"down_bias must be \(r,\) = \(8,\), got \(7,\)"),
    Bad("up-bias", change(up_bias=cut("up_bias")), ValueError, r"up_bias must be \(d,\) = \(36,\), got \(35,\)"),
    Bad("factor-dtype", change(up_t=lambda a: a["up_t"].double()), TypeError,
        r"up\[2\] must be torch.* like .*, got torch.float64"),
    Bad("factors-differ",
        lambda a: {k: v.half() if k in ("x", "residual", "down_a") else v for k, v in a.items()}, TypeError,
        r"down\[1\] must be torch.float16 like down\[0\], got torch.float32"),
    Bad("factor-device", change(down_s=lambda a: a["down_s"].to("meta")), ValueError,
        r"down\[1\] must be on .* like x, got meta"),
    Bad("residual-shape", change(residual=lambda a: a["x"][:4]), ValueError,
        r"residual must be \(5, 36\) .* like x, got \(4, 36\)"),
    Bad("residual-dtype", change(residual=lambda a: a["x"].double()), ValueError,
        "residual must be .* like x, got .*torch.float64"),
    Bad("scale-shape", change(scale=lambda a: a["up_bias"]), ValueError, r"scale must be 0-d = \(\), got \(36,\)"),
    Bad("scale-type", change(scale="big"), TypeError, "scale must be a number or a 0-d tensor, got str"),
    Bad("activation", change(activation="swish"), ValueError, "activation must be one of .*'silu'.*, got 'swish'"),
    Bad("bank-without-ids", bank(None), ValueError, r"adapter_ids is needed when down\[0\] is a bank"),
    Bad("ids-without-bank", change(adapter_ids=zeros(5)), ValueError,
        r"down\[0\] must be a bank \(g, n, n, n\) when adapter_ids is given, got \(4, 4, 4\)"),
    Bad("ids-dtype", bank(zeros(5, torch.float32)), TypeError, "adapter_ids must be an integer tensor, got torch.float32"),
    Bad("ids-length", bank(zeros(4)), ValueError, r"adapter_ids must be \(5,\).*got \(4,\)"),
    Bad("ids-too-large", bank(ids(0, 1, 3, 0, 0)), ValueError,
        r"adapter_ids must lie in \[-1, 2\] for a bank of 3, got 3", cpu_only=True),
    Bad("ids-too-small", bank(ids(0, 1, -2, 0, 0)), ValueError,
        r"adapter_ids must lie in \[-1, 2\] for a bank of 3, got -2", cpu_only=True),
    Bad("backend", change(backend="cuda"), ValueError, "backend must be None or one of .*'native'.*, got 'cuda'"),
)  # fmt: skip


def leaf_args(arguments):
    a = arguments
    factors = ([a[f"{side}_{factor}"] for factor in "ast"] for side in ("down", "up"))
    rest = (a.get(name) for name in ("down_bias", "up_bias", "residual"))
    return compacter.arguments(
        a["x"], *factors, *rest, a.get("scale", 1.0), a.get("activation", "gelu"), a.get("adapter_ids")
    )  # fmt: skip


def compiled(dtype, shape, r, quick=(), precision="ieee", aligned=True, **options):
    name = options.pop("name", f"m{shape[0]}-d{shape[1]}-r{r}")
    return Compiled(case(name, shape=shape, r=r, **options), dtype, quick, precision, aligned)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMPILED = (
    compiled(BF16, (4096, 768), 24, quick=(90,)),
    compiled(FP32, (4096, 1024), 32, **EVERYTHING, quick=(80,)),
    compiled(FP16, (4096, 4096), 512, parameters=FP32, q=2),
    compiled(FP32, (4096, 1024), 512),
    compiled(BF16, (4096, 768), 24, g=5, ids=[0] * 4096, name="bank"),
    compiled(FP16, (17, 66), 12, n=3, aligned=False, name="odd"),
)


def ordered(x, down_a, down_s, down_t, up_a, up_s, up_t, *, down_bias=None, up_bias=None, residual=None, scale=1.0,
            activation="gelu", adapter_ids=None):  # fmt: skip
    """The formula through the numbers of rank space; a bank's factors are taken for each row."""
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    ids = torch.zeros((), dtype=torch.int64, device=x.device) if adapter_ids is None else adapter_ids
    ids = ids.reshape(ids.shape + (1,) * (len(shape) - 1 - ids.dim())).expand(shape[:-1]).flatten()
    mine = lambda t: (t[None] if adapter_ids is None else t)[ids.clamp(min=0)].to(x.dtype)  # noqa: E731

    def phm(x, a, s, t, bias):
        z = torch.einsum("map,mipk->maik", x.unflatten(1, (a.shape[-1], -1)), mine(s))
        y = torch.einsum("mbik,mikj->mbj", torch.einsum("maik,miab->mbik", z, mine(a)), mine(t)).flatten(1)
        return y if bias is None else y + mine(bias)

    y = scale * phm(ACTIVATIONS[activation](phm(x, down_a, down_s, down_t, down_bias)), up_a, up_s, up_t, up_bias)
    y = torch.where((ids >= 0)[:, None], y, 0.0).view(shape)
    return y if residual is None else residual + y


def rounded(a, unit, points):
    """Nothing but the output and the gradients is rounded."""
    return ordered(**a)


def fuzz(draw, st):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    leading = pick((0,), (1,), (2,), (3, 5), (16,), (17,), (2, 3, 5), (33,), (64,), (5, 19), (130,))
    g, ids = pick(None, None, 1, 3), None
    if g is not None:
        m = math.prod(leading) if draw(st.booleans()) else leading[0]
        ids = draw(st.lists(st.integers(-1, g - 1), min_size=m, max_size=m))
        if m != leading[0]:
            ids = torch.tensor(ids).view(leading).tolist()
    n = pick(1, 2, 3, 4, 4, 5, 8)
    return case(
        "fuzz", shape=(*leading, n * pick(1, 2, 7, 8, 16, 17, 33)), r=n * pick(1, 2, 5, 6, 8, 11), n=n,
        q=pick(1, 1, 2, 3, 4), g=g, ids=ids, residual=pick("x", "other", "none"), scale=pick(0.5, 1.0, "0-d"),
        activation=pick(*ACTIVATIONS), bias=draw(st.booleans()), parameters=pick(None, None, torch.float32),
    )  # fmt: skip


BIASES = ("down_bias", "up_bias")
NUMERICS = Numerics(
    rounded=rounded,
    # Under a 16-bit x a float32 gradient shows how a sum of float32 is rounded.
    predicted=lambda a, unit: ("y", "x", *FACTORS, *BIASES) if a["x"].dtype == a["down_a"].dtype else ("y", "x"),
    exact=(
        case("integers", shape=(67, 40), r=8, activation="relu", scale=2.0, gain=0.2),
        case("integers-in-a-bank", shape=(2, 6, 40), r=8, g=4, ids=[TOKENS[:6], TOKENS[6:]], activation="relu",
             residual="other"),
    ),
    rows=("adapter_ids",),
    alone={},
    paths=(
        case("rows", shape=(130, 72), r=20, q=2, **EVERYTHING),
        case("few-rows", shape=(5, 768), r=24),
        case("many-terms", shape=(40, 96), r=48, n=12, q=2),
    ),
    fuzz=fuzz,
    largest=1,
    rounds_inside=False,
    ordered=ordered,
)

SPEC = OpSpec(
    op=flat(compacter),
    reference=flat(compacter_reference),
    fwd=_fwd,
    bwd=_bwd,
    leaf_args=leaf_args,
    bwd_leaf_args=lambda grad_y, args, mask: (grad_y, *args[:9], *args[10:], mask),
    bwd_outputs=("x", *FACTORS, *BIASES, "scale"),
    activations=("x", "residual"),
    cases=CASES,
    bench=tuple(bench(m, d) for d, m in itertools.product((768, 1024, 4096), (1, 16, 128, 1024, 4096))),
    bench_cuda=tuple(bench(m, d) for d, m in itertools.product((768, 4096), (512, 4096, 16384))),
    bad=BAD,
    numerics=NUMERICS,
    compiled=COMPILED,
    huge=(case("bank-of-sequences", shape=(2101, 1024, 1024), r=16, g=3, ids=[i % 4 - 1 for i in range(2101)], **EVERYTHING),),
    many=(
        (case("rows", shape=(2**22 + 5, 2), r=2, n=2), ("x",)),
        (case("adapters", shape=(40, 40), r=8, g=65535, ids=[0, 65534] * 20), (*FACTORS, *BIASES)),
    ),
    tiled=(
        case("narrow", shape=(37, 140), r=12, q=2, **EVERYTHING),
        case("wide", shape=(18, 102), r=66, n=3, **EVERYTHING),
        case("bank", shape=(21, 132), r=24, g=3, ids=[2, -1, 0, *[2] * 18], **EVERYTHING),
    ),
    planted=(
        case("looped", shape=(1100, 200), r=20, **EVERYTHING),
        case("looped-bank", shape=(600, 400), r=20, g=2, ids=[0, 1, -1, 1, 0] * 120, **EVERYTHING),
    ),
    large=lambda elements: case("large", shape=(elements // 1024 + 2048, 1024), r=16, **EVERYTHING),
)
