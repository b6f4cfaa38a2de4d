import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F

from fastadapt.ops import bottleneck, bottleneck_reference
from fastadapt.ops.bottleneck import ACTIVATIONS, _bwd, _fwd

from ..spec import Bad, Case, Compiled, Numerics, OpSpec


def make(
    dtype, device, *, shape, r, g=None, ids=None, residual="x", scale=0.5, activation="relu", bias=True, norm=None,
    skip=False, hidden_skip=False, parameters=None, mean=0.0,
):  # fmt: skip
    """Arguments of a call. ``ids`` is a tensor, ``norm`` is None, "weight" or "bias", ``parameters`` a dtype of their own."""
    d, bank = shape[-1], () if g is None else (g,)
    parameters = dtype if parameters is None or dtype == torch.float64 else parameters
    randn = lambda *s: torch.randn(s, dtype=torch.float32, device=device)  # noqa: E731
    weight = lambda *s, gain=1.0: (gain * randn(*s)).to(parameters)  # noqa: E731
    x = (randn(*shape) + mean).to(dtype)
    arguments = {
        "x": x,
        "down_weight": weight(*bank, r, d, gain=d**-0.5),
        "up_weight": weight(*bank, d, r, gain=r**-0.5),
        "activation": activation,
        "residual": {"x": x, "other": randn(*shape).to(dtype), "none": None}[residual],
        "scale": {"0-d": weight(), "channel": weight(d)}.get(scale, scale),
    }
    if bias:
        arguments |= {"down_bias": weight(*bank, r), "up_bias": weight(*bank, d)}
    if norm:
        arguments["norm_weight"] = 1 + weight(d, gain=0.2)
        if norm == "bias":
            arguments["norm_bias"] = weight(d)
    if skip:
        arguments["skip_weight"] = weight(d)
    if hidden_skip:
        arguments["hidden_skip_weight"] = weight(r)
    if ids is not None:
        arguments["adapter_ids"] = torch.tensor(ids, dtype=torch.int64, device=device)
    return arguments


def case(name, **options):
    return Case(name, partial(make, **options))


def bench(m, d, r):
    return Case(
        f"m{m}-d{d}-r{r}", partial(make, shape=(m, d), r=r), flops=4 * m * d * r, bytes=lambda item: 2 * m * d * item
    )


EVERYTHING = {
    "residual": "other", "scale": "channel", "activation": "gelu", "norm": "bias", "skip": True, "hidden_skip": True,
}  # fmt: skip
TOKENS = [2, -1, 0, 2, 2, 0, -1, 2, 0, 2, 2, 2]
CASES = (
    case("small", shape=(5, 33), r=7),
    case("one", shape=(1, 1), r=1),
    case("empty", shape=(0, 8), r=4),
    case("vector", shape=(40,), r=4),
    *(case(f"m{m}-d{d}-r{r}", shape=(m, d), r=r) for m, d, r in ((31, 63, 15), (32, 64, 16), (33, 65, 17), (65, 129, 48))),
    case("wide", shape=(18, 200), r=130),
    case("many-rows", shape=(150, 24), r=8),
    case("4-d", shape=(2, 3, 2, 24), r=8, residual="other"),
    *(case(name, shape=(19, 40), r=24, activation=name) for name in ACTIVATIONS if name != "relu"),
    case("bare", shape=(19, 40), r=8, residual="none", bias=False, scale=1.0),
    case("residual", shape=(19, 40), r=8, residual="other"),
    case("learned-scale", shape=(19, 40), r=8, scale="0-d"),
    case("channel-scale", shape=(19, 40), r=8, scale="channel", residual="none"),
    case("norm", shape=(19, 40), r=8, norm="bias"),
    case("norm-no-bias", shape=(19, 40), r=8, norm="weight", residual="other", bias=False),
    case("norm-of-large-mean", shape=(19, 40), r=8, norm="bias", mean=30.0, residual="none"),
    case("skip", shape=(19, 40), r=8, skip=True),
    case("hidden-skip", shape=(19, 40), r=8, hidden_skip=True, activation="silu"),
    case("everything", shape=(3, 7, 70), r=20, **EVERYTHING),
    case("float32-parameters", shape=(19, 40), r=8, parameters=torch.float32, scale="channel", norm="bias"),
    case("bank-of-sequences", shape=(4, 6, 40), r=8, g=3, ids=[2, 0, -1, 2]),
    case("bank-of-tokens", shape=(2, 6, 40), r=8, g=4, ids=[TOKENS[:6], TOKENS[6:]], residual="none", scale="channel"),
    case("bank-with-everything", shape=(12, 70), r=20, g=3, ids=TOKENS, **EVERYTHING),
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
    return change(
        down_weight=lambda a: a["down_weight"].expand(3, -1, -1), up_weight=lambda a: a["up_weight"].expand(3, -1, -1),
        down_bias=None, up_bias=None, adapter_ids=adapter_ids,
    )  # fmt: skip


def cut(name):
    return lambda a: a[name][1:]


# Edits of the case "small": x (5, 33), r = 7.
BAD = (
    Bad("x-integer", change(x=zeros((5, 33)), residual=None), TypeError, "x must be .*float32.*, got torch.int64"),
    Bad("x-not-a-tensor", change(x=[1.0]), TypeError, "x must be a tensor, got list"),
    Bad("down-shape", change(down_weight=lambda a: a["down_weight"][:, :32]), ValueError,
        r"down_weight must be \(r, d\) = \(7, 33\), got \(7, 32\)"),
    Bad("down-rank", change(down_weight=lambda a: a["down_weight"][0]), ValueError,
        r"down_weight must be \(r, d\).*got \(33,\)"),
    Bad("up-shape", change(up_weight=lambda a: a["up_weight"].T), ValueError,
        r"up_weight must be \(d, r\) = \(33, 7\), got \(7, 33\)"),
    Bad("down-none", change(down_weight=None), TypeError, "down_weight must be a tensor, got NoneType"),
    Bad("up-none", change(up_weight=None), TypeError, "up_weight must be a tensor, got NoneType"),
    Bad("down-bias", change(down_bias=cut("down_bias")), ValueError, r"down_bias must be \(r\) = \(7,\), got \(6,\)"),
    Bad("up-bias", change(up_bias=cut("up_bias")), ValueError, r"up_bias must be \(d\) = \(33,\), got \(32,\)"),
    Bad("weight-dtype", change(up_weight=lambda a: a["up_weight"].double()), TypeError,
        "up_weight must be torch.* like .*, got torch.float64"),
    Bad("weights-differ",
        lambda a: {k: v.half() if k in ("x", "residual", "down_weight") else v for k, v in a.items()}, TypeError,
        "up_weight must be torch.float16 like down_weight, got torch.float32"),
    Bad("weight-device", change(down_weight=lambda a: a["down_weight"].to("meta")), ValueError,
        "down_weight must be on .* like x, got meta"),
    Bad("residual-shape", change(residual=lambda a: a["x"][:4]), ValueError,
        r"residual must be \(5, 33\) .* like x, got \(4, 33\)"),
    Bad("residual-dtype", change(residual=lambda a: a["x"].double()), ValueError,
        "residual must be .* like x, got .*torch.float64"),
    Bad("scale-shape", change(scale=cut("up_bias")), ValueError, r"scale must be 0-d or \(d,\) = \(33,\), got \(32,\)"),
    Bad("scale-type", change(scale="big"), TypeError, "scale must be a number or a tensor, got str"),
    Bad("activation", change(activation="swish"), ValueError, "activation must be one of .*'silu'.*, got 'swish'"),
    Bad("norm-bias-alone", change(norm_bias=lambda a: a["up_bias"]), ValueError,
        "norm_weight must be given with norm_bias, got None"),
    Bad("norm-shape", change(norm_weight=cut("up_bias")), ValueError,
        r"norm_weight must be \(d,\) = \(33,\), got \(32,\)"),
    Bad("norm-eps", change(norm_eps="small"), TypeError, "norm_eps must be a number, got str"),
    Bad("skip-shape", change(skip_weight=lambda a: a["down_bias"]), ValueError,
        r"skip_weight must be \(d,\) = \(33,\), got \(7,\)"),
    Bad("hidden-skip-shape", change(hidden_skip_weight=lambda a: a["up_bias"]), ValueError,
        r"hidden_skip_weight must be \(r,\) = \(7,\), got \(33,\)"),
    Bad("bank-without-ids", bank(None), ValueError, "adapter_ids is needed when down_weight is a bank"),
    Bad("ids-without-bank", change(adapter_ids=zeros(5)), ValueError,
        r"down_weight must be a bank \(g, r, d\) when adapter_ids is given, got \(7, 33\)"),
    Bad("ids-dtype", bank(zeros(5, torch.float32)), TypeError, "adapter_ids must be an integer tensor, got torch.float32"),
    Bad("ids-length", bank(zeros(4)), ValueError, r"adapter_ids must be \(5,\).*got \(4,\)"),
    Bad("ids-too-large", bank(ids(0, 1, 3, 0, 0)), ValueError,
        r"adapter_ids must lie in \[-1, 2\] for a bank of 3, got 3", cpu_only=True),
    Bad("ids-too-small", bank(ids(0, 1, -2, 0, 0)), ValueError,
        r"adapter_ids must lie in \[-1, 2\] for a bank of 3, got -2", cpu_only=True),
    Bad("backend", change(backend="cuda"), ValueError, "backend must be None or one of .*'native'.*, got 'cuda'"),
)  # fmt: skip


def leaf_args(arguments):
    names = bottleneck.arguments.__code__.co_varnames[: bottleneck.arguments.__code__.co_argcount]
    defaults = {"scale": 1.0, "activation": "relu", "norm_eps": 1e-5}
    return bottleneck.arguments(*(arguments.get(name, defaults.get(name)) for name in names))


def compiled(dtype, shape, r, quick=(), precision="ieee", aligned=True, **options):
    name = options.pop("name", f"m{shape[0]}-d{shape[1]}-r{r}")
    return Compiled(case(name, shape=shape, r=r, **options), dtype, quick, precision, aligned)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The first call of a rank and element size goes through all tiles.
COMPILED = (
    compiled(BF16, (4096, 768), 16, g=5, ids=[0] * 4096, activation="gelu_tanh", name="bank-r16", quick=(90,)),
    compiled(FP16, (4096, 1024), 32, **EVERYTHING),
    compiled(BF16, (16384, 768), 64, **EVERYTHING, parameters=FP32, quick=(90, 100, "gfx942")),
    compiled(FP16, (4096, 2048), 128, **EVERYTHING, parameters=FP32),
    compiled(BF16, (4096, 4096), 256, **EVERYTHING, quick=(80, 86)),
    compiled(FP32, (4096, 768), 16),
    compiled(FP32, (4096, 768), 32, g=5, ids=[0] * 4096, activation="silu", name="bank-r32"),
    compiled(FP32, (4096, 768), 64, **EVERYTHING, quick=(80,)),
    compiled(FP32, (4096, 768), 128, activation="gelu_tanh"),
    compiled(FP32, (4096, 768), 256, **EVERYTHING, quick=(120,)),
    compiled(FP32, (16384, 768), 64, **EVERYTHING, precision="tf32"),
    compiled(FP32, (4096, 768), 256, **EVERYTHING, precision="tf32"),
    compiled(BF16, (16384, 1024), 64, name="plain-r64", quick=(89,)),
    compiled(FP16, (17, 769), 7, activation="tanh", aligned=False),
)


def rounded(a, unit, points):
    """The docstring's formula in float64, and its roundings."""
    shape, ids, scale = a["x"].shape, a.get("adapter_ids"), a["scale"]
    x = a["x"].reshape(-1, shape[-1])
    value, gradient = (points.value, points.gradient) if unit != "vector" else (lambda t: t,) * 2
    nothing = torch.zeros((), dtype=x.dtype, device=x.device)
    if ids is None:
        product, bias = F.linear, lambda name: a.get(name, nothing)
    else:
        ids = ids.reshape(ids.shape + (1,) * (len(shape) - 1 - ids.dim())).expand(shape[:-1]).flatten()
        product = lambda t, weight: torch.einsum("mi,moi->mo", t, weight[ids.clamp(min=0)])  # noqa: E731
        bias = lambda name: a[name][ids.clamp(min=0)] if name in a else nothing  # noqa: E731

    down, up = a["down_weight"], a["up_weight"]
    if "norm_weight" in a:
        n, shift = F.layer_norm(x, shape[-1:], eps=a.get("norm_eps", 1e-5)), a.get("norm_bias", nothing)
        if unit == "amx":
            z = product(value(n), value(down * a["norm_weight"])) + product(shift.expand(x.shape), down)
        else:
            z = product(value(n * a["norm_weight"] + shift), value(down))
    else:
        z = product(x, value(down))
    z = gradient(z) + bias("down_bias")
    hidden = ACTIVATIONS[a["activation"]](z)
    hidden = value(hidden + a["hidden_skip_weight"] * z if "hidden_skip_weight" in a else hidden)

    # The gradients of up_weight and of hidden come from products of their own, with roundings of their own.
    factor = scale.detach() if isinstance(scale, torch.Tensor) else scale
    channels = isinstance(scale, torch.Tensor) and scale.dim() == 1
    if unit == "amx":
        back = product(hidden, value((factor[:, None] if channels else factor) * up).detach())
    else:
        back = product(hidden, value(up).detach())
        back = factor * (gradient(back) if channels else back)
    y = points.also(scale * (product(hidden.detach(), value(up)) + bias("up_bias")), back)
    y = y + a["skip_weight"] * x if "skip_weight" in a else y
    if ids is not None:
        y = torch.where((ids >= 0)[:, None], y, 0.0)
    return y.view(shape) if a.get("residual") is None else a["residual"] + y.view(shape)


def predicted(a, unit):
    """What ``rounded`` predicts to the bit. On matrix units a rounded norm moves too many hidden values over the edge for the
    gradients, and those of biases may be sums of rounded terms."""
    if a["down_weight"].dtype != a["x"].dtype or (unit != "vector" and "norm_weight" in a):
        return ("y",)
    if unit != "vector":
        return ("y", "x", *WEIGHTS)
    return ("y", "x", *WEIGHTS, "down_bias", "up_bias", "norm_weight", "norm_bias", "skip_weight", "hidden_skip_weight")


def fuzz(draw, st):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    leading = pick((0,), (1,), (2,), (3, 5), (16,), (17,), (2, 3, 5), (33,), (64,), (5, 19), (130,))
    g, ids = pick(None, None, 1, 3), None
    if g is not None:
        n = math.prod(leading) if draw(st.booleans()) else leading[0]
        ids = draw(st.lists(st.integers(-1, g - 1), min_size=n, max_size=n))
        if n != leading[0]:
            ids = torch.tensor(ids).view(leading).tolist()
    norm = pick(None, None, "weight", "bias")
    return case(
        "fuzz",
        shape=(*leading, pick(*((2,) if norm else (1, 2)), 3, 8, 15, 16, 31, 40, 63, 65, 96)),
        r=pick(1, 2, 5, 8, 16, 17, 24, 33, 64), g=g, ids=ids, residual=pick("x", "other", "none"),
        scale=pick(0.5, 1.0, "0-d", "channel"), activation=pick(*ACTIVATIONS), bias=draw(st.booleans()), norm=norm,
        skip=draw(st.booleans()), hidden_skip=draw(st.booleans()), parameters=pick(None, None, torch.float32),
    )  # fmt: skip


WEIGHTS = ("down_weight", "up_weight")
NUMERICS = Numerics(
    rounded=rounded,
    predicted=predicted,
    exact=(
        case("integers", shape=(67, 65), r=17, scale=2.0, skip=True, hidden_skip=True),
        case("integers-in-a-bank", shape=(2, 6, 40), r=8, g=4, ids=[TOKENS[:6], TOKENS[6:]], scale="channel", residual="other"),
    ),
    rows=("adapter_ids",),
    alone={"native": 48},
    paths=(
        case("rows", shape=(130, 70), r=20, **EVERYTHING),
        case("columns-of-few-rows", shape=(40, 300), r=17, scale="channel", skip=True, activation="gelu"),
        case("long-ranks", shape=(140, 60), r=1000),
        case("columns-of-some-rows", shape=(270, 1500), r=132, residual="other", scale="0-d", activation="silu"),
    ),
    fuzz=fuzz,
)


SPEC = OpSpec(
    op=bottleneck,
    reference=bottleneck_reference,
    fwd=_fwd,
    bwd=_bwd,
    leaf_args=leaf_args,
    bwd_leaf_args=lambda grad_y, args, mask: (grad_y, *args[:5], *args[6:], mask),
    bwd_outputs=(
        "x", "down_weight", "up_weight", "down_bias", "up_bias", "scale", "norm_weight", "norm_bias", "skip_weight",
        "hidden_skip_weight",
    ),  # fmt: skip
    activations=("x", "residual"),
    cases=CASES,
    bench=tuple(bench(m, d, r) for d, r, m in itertools.product((384, 768, 1024, 4096), (8, 16, 48, 64), (32, 128, 512, 2048))),
    bench_cuda=tuple(bench(m, d, r) for d, r, m in itertools.product((768, 4096), (16, 64, 256), (512, 4096, 16384))),
    bad=BAD,
    numerics=NUMERICS,
    compiled=COMPILED,
    huge=(
        case("bank-of-sequences", shape=(2101, 1024, 1024), r=16, g=3, ids=[i % 4 - 1 for i in range(2101)], **EVERYTHING),
        case("bank-of-many", shape=(64, 1024), r=64, g=40_000, ids=[0, 39_999] * 32, **EVERYTHING),
    ),
    many=(
        (case("rows", shape=(2**22 + 5, 2), r=1), ("x",)),
        (case("adapters", shape=(40, 40), r=8, g=65535, ids=[0, 65534] * 20), (*WEIGHTS, "down_bias", "up_bias")),
    ),
    tiled=(
        *(case(f"r{r}", shape=(67, 131), r=r, **EVERYTHING) for r in (20, 48, 100, 130)),
        case("bank-r7", shape=(67, 131), r=7, g=3, ids=[2, -1, 0, *[2] * 64], **EVERYTHING),
        # Rows at multiples of 16 bytes and nothing beside the products: asynchronous copies feed wgmma.
        *(case(f"aligned-r{r}", shape=(200, 192), r=r) for r in (16, 64, 256)),
    ),
    planted=(
        case("looped", shape=(8448, 200), r=20, **EVERYTHING),  # so many rows that tiles are high enough for wgmma
        case("looped-bank", shape=(1100, 1000), r=20, g=2, ids=[0, 1, -1, 1, 0] * 220, **{**EVERYTHING, "scale": "0-d"}),
    ),
    large=lambda elements: case("large", shape=(elements // 1024 + 2048, 1024), r=16, **EVERYTHING),
)
