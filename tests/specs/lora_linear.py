import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F

from fastadapt.ops import lora_linear, lora_linear_reference
from fastadapt.ops.dropout import kept, kept_scale
from fastadapt.ops.lora_linear import _bwd, _fwd

from ..spec import Bad, Case, Compiled, Numerics, OpSpec


def make(
    dtype, device, *, shape, n, r, g=None, ids=None, bias=True, scale=0.5, dropout=0.0, dora=False, lora_bias=False,
    diagonal=False, transposed=False, parameters=None,
):  # fmt: skip
    """Arguments of a call. ``parameters`` is a dtype of their own for the parameters of the adapter; ``r`` of a bank is its
    rank, or a tuple: the ranks of its adapters, which zeros fill up; ``ids`` of 32 bits come as a tensor."""
    k, bank = shape[-1], () if g is None else (g,)
    ranks, r = (r, max(r)) if isinstance(r, tuple) else (None, r)
    parameters = dtype if parameters is None or dtype == torch.float64 else parameters
    randn = lambda *s: torch.randn(s, dtype=torch.float32, device=device)  # noqa: E731
    parameter = lambda *s, gain=1.0: (gain * randn(*s)).to(parameters)  # noqa: E731
    weight = (randn(k, n).T if transposed else randn(n, k)) * k**-0.5
    arguments = {
        "x": randn(*shape).to(dtype),
        "weight": weight.to(dtype),
        "bias": randn(n).to(dtype) if bias else None,
        "lora_a": parameter(*bank, r, k, gain=k**-0.5),
        "lora_b": parameter(*bank, n, r, gain=r**-0.5),
        "scale": parameter(*bank) if scale == "each" else parameter() if scale == "0-d" else scale,
    }
    for i, rank in enumerate(ranks or ()):
        arguments["lora_a"][i, rank:] = arguments["lora_b"][i, :, rank:] = 0
    if dropout:
        arguments |= {"dropout_p": dropout, "dropout_seed": torch.tensor(0x0123456789ABCDEF, device=device)}
    if dora:
        arguments["magnitude"] = 1 + parameter(n, gain=0.2)
    if lora_bias:
        arguments["lora_bias"] = parameter(*bank, n)
    if diagonal:
        arguments["diagonal"] = parameter(*bank, r)
    if ids is not None:
        arguments["adapter_ids"] = ids.to(device) if torch.is_tensor(ids) else torch.tensor(ids, device=device).long()
    return arguments


def case(name, **options):
    return Case(name, partial(make, **options))


def unseeded(dtype, device, **options):
    """As users call: each call draws the seed of its dropout."""
    return {name: value for name, value in make(dtype, device, **options).items() if name != "dropout_seed"}


def bench(m, k, n, r, dropout=0.0, dora=False):
    frozen, branch = 2 * m * k * n, 2 * m * r * (k + n)
    return Case(
        f"dora-m{m}-k{k}-n{n}-r{r}" if dora else f"m{m}-k{k}-n{n}-r{r}-p{dropout}",
        partial(unseeded, shape=(m, k), n=n, r=r, dropout=dropout, dora=dora),
        flops=frozen + branch, backward_flops=frozen + 2 * branch, bytes=lambda item: (m * k + k * n + m * n) * item,
    )  # fmt: skip


def bench_bank(m, d):
    """A batch of eight sequences, each with an adapter of its own."""
    frozen, branch = 2 * m * d * d, 4 * m * 16 * d
    return Case(
        f"bank-m{m}-k{d}-n{d}-r16", partial(make, shape=(8, m // 8, d), n=d, r=16, g=8, ids=[5, 2, 7, 0, 3, 6, 1, 4]),
        flops=frozen + branch, backward_flops=frozen + 2 * branch, bytes=lambda item: (2 * m * d + d * d) * item,
    )  # fmt: skip


EVERYTHING = {"scale": "0-d", "lora_bias": True, "diagonal": True}
BANK = {"scale": "each", "lora_bias": True, "diagonal": True}
DROPPED = {**BANK, "dropout": 0.3}
TOKENS = [2, -1, 0, 2, 2, 0, -1, 2, 0, 2, 2, 2]
STRIDED = torch.tensor([TOKENS, TOKENS[::-1]], dtype=torch.int32).T.reshape(2, 6, 2)[..., 0]
CASES = (
    case("small", shape=(5, 33), n=21, r=7),
    case("one", shape=(1, 1), n=1, r=1),
    case("empty", shape=(0, 8), n=6, r=4),
    case("vector", shape=(40,), n=24, r=4),
    *(
        case(f"m{m}-d{d}-r{r}", shape=(m, d), n=n, r=r)
        for m, d, n, r in ((31, 63, 33, 15), (32, 64, 96, 16), (33, 65, 31, 17), (65, 129, 130, 48))
    ),
    case("wide", shape=(18, 200), n=90, r=130),
    case("many-rows", shape=(150, 24), n=40, r=3),
    case("4-d", shape=(2, 3, 2, 24), n=40, r=8),
    case("bare", shape=(19, 40), n=24, r=8, bias=False, scale=1.0),
    case("learned-scale", shape=(19, 40), n=24, r=8, scale="0-d"),
    case("diagonal", shape=(19, 40), n=24, r=8, diagonal=True, bias=False),
    case("lora-bias", shape=(19, 40), n=24, r=8, lora_bias=True, bias=False),
    case("transposed", shape=(19, 40), n=24, r=5, transposed=True),
    case("dropout", shape=(19, 43), n=24, r=8, dropout=0.1),
    case("dora", shape=(19, 40), n=27, r=8, dora=True),
    case("dora-with-everything", shape=(3, 7, 70), n=45, r=20, dora=True, **EVERYTHING),
    case("everything", shape=(3, 7, 70), n=45, r=20, **EVERYTHING),
    case("dropout-with-everything", shape=(3, 7, 70), n=45, r=20, dora=True, dropout=0.3, **EVERYTHING),
    case("float32-parameters", shape=(19, 40), n=24, r=8, parameters=torch.float32, **EVERYTHING),
    case("bank-of-sequences", shape=(4, 6, 40), n=24, r=8, g=3, ids=[2, 0, -1, 2]),
    case("bank-of-tokens", shape=(2, 6, 40), n=31, r=8, g=4, ids=STRIDED, bias=False, scale="0-d"),
    case("bank-with-everything", shape=(12, 70), n=45, r=20, g=3, ids=TOKENS, **BANK),
    case("bank-of-ranks", shape=(12, 33), n=21, r=(7, 1, 4), g=3, ids=TOKENS, scale="each"),
    case("bank-of-float32", shape=(4, 3, 40), n=24, r=8, g=3, ids=[2, 0, -1, 2], parameters=torch.float32, **DROPPED),
    case("bank-sorted", shape=(40, 33), n=40, r=30, g=11, ids=[max(-1, 7 * i % 12 - 2) for i in range(40)], **DROPPED),
    case("bank-of-one-vector", shape=(24,), n=20, r=4, g=2, ids=1),
    case("bank-unused", shape=(5, 24), n=20, r=4, g=2, ids=[-1] * 5),
    case("bank-of-no-rows", shape=(0, 8), n=6, r=4, g=2, ids=[]),
)


def change(**edits):
    """Replace arguments; an edit that is a function gets all arguments of the good call."""
    return lambda a: {**a, **{name: edit(a) if callable(edit) else edit for name, edit in edits.items()}}


def cut(name):
    return lambda a: a[name][1:]


def bank(**edits):
    """Three adapters in place of one, and what else is changed."""
    three = {name: (lambda a, name=name: a[name].expand(3, -1, -1)) for name in ("lora_a", "lora_b")}
    return change(**{**three, "adapter_ids": integers(0, 2, -1, 0, 1), **edits})


def integers(*values):
    return lambda a: torch.tensor(values, device=a["x"].device)


# Edits of the case "small": x (5, 33), n = 21, r = 7.
BAD = (
    Bad("x-integer", change(x=lambda a: a["x"].long()), TypeError, "x must be .*float32.*, got torch.int64"),
    Bad("x-not-a-tensor", change(x=[1.0]), TypeError, "x must be a tensor, got list"),
    Bad("weight-shape", change(weight=lambda a: a["weight"].T), ValueError,
        r"weight must be \(n, k\) = \(n, 33\) to match x, got \(33, 21\)"),
    Bad("weight-dtype", change(weight=lambda a: a["weight"].double()), TypeError,
        "weight must be torch.float32 like x, got torch.float64"),
    Bad("weight-device", change(weight=lambda a: a["weight"].to("meta")), ValueError,
        "weight must be on .* like x, got meta"),
    Bad("bias", change(bias=cut("bias")), ValueError, r"bias must be \(n,\) = \(21,\), got \(20,\)"),
    Bad("ranks-differ", change(lora_b=lambda a: a["lora_b"][:, 1:]), ValueError,
        r"lora_b must be \(n, r\) = \(21, 7\), got \(21, 6\)"),
    Bad("zero-rank", lambda a: {**a, "lora_a": a["lora_a"][:0], "lora_b": a["lora_b"][:, :0]}, ValueError,
        r"lora_a must be \(r, k\) with r at least 1, got \(0, 33\)"),
    Bad("lora-a-shape", change(lora_a=lambda a: a["lora_a"][:, :32]), ValueError,
        r"lora_a must be \(r, k\) = \(7, 33\), got \(7, 32\)"),
    Bad("lora-a-none", change(lora_a=None), TypeError, "lora_a must be a tensor, got NoneType"),
    Bad("lora-b-dtype",
        lambda a: {k: v.half() if k in ("x", "weight", "bias", "lora_a") else v for k, v in a.items()}, TypeError,
        "lora_b must be torch.float16 like lora_a, got torch.float32"),
    Bad("scale-not-finite", change(scale=math.inf), ValueError, "scale must be finite, got inf"),
    Bad("scale-shape", change(scale=lambda a: a["bias"]), ValueError, r"scale must be 0-d = \(\), got \(21,\)"),
    Bad("scale-type", change(scale="big"), TypeError, "scale must be a number or a 0-d tensor, got str"),
    Bad("dropout-one", change(dropout_p=1.0), ValueError, r"dropout_p must be a number in \[0, 1\), got 1.0"),
    Bad("dropout-nearly-one", change(dropout_p=0.999999), ValueError,
        "dropout_p must leave at least one element in 65536, got 0.999999"),
    Bad("dropout-negative", change(dropout_p=-0.1), ValueError, r"dropout_p must be a number in \[0, 1\), got -0.1"),
    Bad("seed-dtype", change(dropout_p=0.5, dropout_seed=lambda a: a["bias"][0]), ValueError,
        r"dropout_seed must be a 0-d int64 tensor, got \(\) torch.float32"),
    Bad("magnitude", change(magnitude=lambda a: a["x"][0]), ValueError, r"magnitude must be \(n,\) = \(21,\), got \(33,\)"),
    Bad("lora-bias", change(lora_bias=lambda a: a["x"][0]), ValueError, r"lora_bias must be \(n,\) = \(21,\), got \(33,\)"),
    Bad("diagonal", change(diagonal=lambda a: a["bias"]), ValueError, r"diagonal must be \(r,\) = \(7,\), got \(21,\)"),
    Bad("bank-without-ids", bank(adapter_ids=None), ValueError,
        r"adapter_ids is needed when lora_a is a bank, got None with \(3, 7, 33\)"),
    Bad("ids-without-bank", change(adapter_ids=integers(0, 0, 0, 0, 0)), ValueError,
        r"lora_a must be a bank \(g, r, k\) when adapter_ids is given, got \(7, 33\)"),
    Bad("bank-of-one-side", bank(lora_b=lambda a: a["lora_b"]), ValueError,
        r"lora_b must be \(g, n, r\) = \(3, 21, 7\), got \(21, 7\)"),
    Bad("bank-of-none", bank(lora_a=lambda a: a["lora_a"].expand(3, -1, -1)[:0]), ValueError,
        r"lora_a must be \(g, r, k\) with g and r at least 1, got \(0, 7, 33\)"),
    Bad("bank-with-magnitude", bank(magnitude=lambda a: a["bias"]), ValueError,
        "magnitude must be None with adapter_ids, got a tensor"),
    Bad("bank-scale", bank(scale=lambda a: a["bias"][:2]), ValueError, r"scale must be 0-d or \(g,\) = \(3,\), got \(2,\)"),
    Bad("bank-lora-bias", bank(lora_bias=lambda a: a["bias"]), ValueError,
        r"lora_bias must be \(g, n\) = \(3, 21\), got \(21,\)"),
    Bad("bank-diagonal", bank(diagonal=lambda a: a["lora_a"][:, 0]), ValueError,
        r"diagonal must be \(g, r\) = \(3, 7\), got \(7,\)"),
    Bad("ids-dtype", bank(adapter_ids=lambda a: a["bias"][:5]), TypeError,
        "adapter_ids must be an integer tensor, got torch.float32"),
    Bad("ids-length", bank(adapter_ids=integers(0, 1)), ValueError, r"adapter_ids must be \(5,\).*got \(2,\)"),
    Bad("ids-too-large", bank(adapter_ids=integers(0, 1, 3, 0, 0)), ValueError,
        r"adapter_ids must lie in \[-1, 2\] for a bank of 3, got 3", cpu_only=True),
    Bad("ids-too-small", bank(adapter_ids=integers(0, 1, -2, 0, 0)), ValueError,
        r"adapter_ids must lie in \[-1, 2\] for a bank of 3, got -2", cpu_only=True),
    Bad("ids-checked-on-the-host", bank(adapter_ids=integers(0, 1, 3, 0, 0), check_ids=True), ValueError,
        r"adapter_ids must lie in \[-1, 2\] for a bank of 3, got 3"),
    Bad("backend", change(backend="cuda"), ValueError, "backend must be None or one of .*'native'.*, got 'cuda'"),
)  # fmt: skip


def leaf_args(arguments):
    names = lora_linear.arguments.__code__.co_varnames[: lora_linear.arguments.__code__.co_argcount]
    defaults = {"scale": 1.0, "dropout_p": 0.0}
    args = lora_linear.arguments(*(arguments.get(name, defaults.get(name)) for name in names))
    return *args, arguments.get("magnitude") is not None  # as where all is trained


def bwd_leaf_args(grad_y, args, mask):
    """What forward saves is drawn: those who call this look at shapes, dtypes and addresses."""
    y, u, _ = _fwd.fake(*args)
    return (grad_y, args[0], torch.randn_like(u), torch.randn_like(y), *args[1:-1], mask)


def compiled(dtype, shape, n, r, quick=(), precision="ieee", aligned=True, **options):
    name = options.pop("name", f"m{shape[0]}-k{shape[1]}-n{n}-r{r}")
    return Compiled(case(name, shape=shape, n=n, r=r, **options), dtype, quick, precision, aligned)


def rounded(a, unit, points):
    """The docstring's formula in float64, and its roundings."""
    value, gradient = (points.value, points.gradient) if unit == "matrix" else (lambda t: t,) * 2
    shape, scale = a["x"].shape, a["scale"]
    x = a["x"].reshape(shape[:-1].numel(), shape[-1])
    p, weight, lora_a, lora_b = a.get("dropout_p", 0.0), a["weight"], a["lora_a"], a["lora_b"]
    dropped = x if unit == "matrix" else points.gradient(x)
    dropped = dropped * kept(a["dropout_seed"], *x.shape, p) * kept_scale(p) if p else dropped
    ids, product, own = a.get("adapter_ids"), F.linear, lambda t: t
    if ids is not None:
        ids = ids.reshape(ids.shape + (1,) * (len(shape) - 1 - ids.dim())).expand(shape[:-1]).flatten()
        own = lambda t: t[ids.clamp(min=0)]  # noqa: E731
        product = lambda t, weight: torch.einsum("mi,moi->mo", t, own(weight))  # noqa: E731
        scale = own(scale)[:, None] if isinstance(scale, torch.Tensor) and scale.dim() else scale
    u = gradient(product(dropped, value(lora_a)))
    u = value(scale * (u * own(a["diagonal"]) if "diagonal" in a else u))
    frozen, branch, gain, shift, after = F.linear(x, weight), product(u, value(lora_b)), None, 0.0, None
    branch = branch if ids is None else torch.where((ids >= 0)[:, None], branch, 0.0)
    if "magnitude" in a:
        update = scale * (lora_b * a["diagonal"] if "diagonal" in a else lora_b)
        mixed = weight @ lora_a.T + 0.5 * update @ (lora_a @ lora_a.T)
        gain = a["magnitude"] / (weight.square().sum(1) + 2 * (mixed * update).sum(1)).sqrt().detach()
    if "lora_bias" in a and ids is not None:
        after = torch.where((ids >= 0)[:, None], scale * own(a["lora_bias"]), 0.0)
    elif "lora_bias" in a:
        shift = scale * a["lora_bias"] * (1.0 if gain is None else gain)
    if a["bias"] is not None:
        shift = shift + a["bias"]
    if unit == "matrix":
        y = gradient(frozen + branch)
        if gain is not None:  # whose own gradient comes from what is kept
            y = y * gain.detach() + points.value(y).detach() * (gain - gain.detach())
        y = y + shift
    elif gain is None:  # on a CPU a library adds the frozen product to what is rounded already
        y = points.value(branch + shift) + frozen
    else:
        y = gain * points.value(points.value(branch) + points.gradient(frozen)) + shift
    y = y if after is None else points.value(y) + after
    return y.view(*shape[:-1], weight.shape[0])


def predicted(a, unit):
    """A norm of DoRA that rounds to the other side moves a column of the gradients, and with it grad_u, on which few elements
    of lora_a's gradient hang."""
    if a["lora_a"].dtype != a["x"].dtype:
        return ("y",)
    names = ("y", "x", "weight", "bias", "lora_b")
    return names if unit == "matrix" and "magnitude" in a else (*names, "lora_a")


def fuzz(draw, st):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    leading = pick((0,), (1,), (2,), (3, 5), (16,), (17,), (2, 3, 5), (33,), (64,), (5, 19), (130,))
    g, ids = pick(None, None, 1, 3, 20), None
    if g is not None:
        ids = torch.tensor(draw(st.lists(st.integers(-1, g - 1), min_size=math.prod(leading), max_size=math.prod(leading))))
        ids = ids.long().view(leading)
        ids = ids if draw(st.booleans()) else ids.view(leading[0], -1)[:, 0] if ids.numel() else ids.new_empty(leading[:1])
    return case(
        "fuzz",
        shape=(*leading, pick(1, 2, 3, 8, 15, 16, 31, 40, 63, 65, 96)), g=g, ids=ids,
        n=pick(1, 2, 7, 8, 17, 32, 33, 64, 70), r=pick(1, 2, 3, 5, 8, 16, 17, 24, 33, 64), bias=draw(st.booleans()),
        scale=pick(0.5, 1.0, "0-d", *(() if g is None else ("each",))), dropout=pick(0.0, 0.0, 0.1, 0.5),
        dora=g is None and draw(st.booleans()),
        lora_bias=draw(st.booleans()), diagonal=draw(st.booleans()), transposed=draw(st.booleans()),
        parameters=pick(None, None, torch.float32),
    )  # fmt: skip


NUMERICS = Numerics(
    rounded=rounded,
    predicted=predicted,
    exact=(
        case("integers", shape=(33, 65), n=31, r=1, scale=2.0, diagonal=True, lora_bias=True),
        case("integers-in-a-bank", shape=(24, 33), n=31, r=1, g=4, ids=TOKENS + TOKENS[::-1], scale="each", lora_bias=True),
    ),
    rows=("adapter_ids",),
    alone={"native": 0},  # the vendor's products
    paths=(
        case("rows", shape=(130, 70), n=45, r=20, dropout=0.2, **EVERYTHING),
        case("dora-rows", shape=(130, 70), n=45, r=20, dora=True, **EVERYTHING),
        case("long-ranks", shape=(140, 60), n=50, r=1000),
        case("few-rows", shape=(90, 300), n=280, r=30, scale="0-d"),
        case("strips", shape=(400, 1200), n=300, r=20, scale="0-d"),
        case("long-products", shape=(60, 1100), n=1030, r=5, dora=True, lora_bias=True),
        case("two-blocks-of-rows", shape=(450, 40), n=30, r=30, dropout=0.2, **EVERYTHING),
        case("bank-rows", shape=(450, 70), n=45, r=20, g=3, ids=[i % 4 - 1 for i in range(450)], **DROPPED),
    ),
    fuzz=fuzz,
)
ALL = {"dora": True, "dropout": 0.1, **EVERYTHING}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The first call of a rank and element size goes through all tiles.
COMPILED = (
    compiled(BF16, (4096, 1024), 1024, 16, **ALL, quick=(90,)),
    compiled(FP16, (4096, 1024), 1024, 32, dropout=0.1),
    compiled(BF16, (4096, 2048), 1024, 64, **ALL, parameters=FP32, quick=(80,)),
    compiled(FP16, (4096, 1024), 2048, 128, **EVERYTHING, parameters=FP32),
    compiled(BF16, (4096, 1024), 4096, 256, **ALL),
    compiled(FP32, (4096, 768), 768, 16, **ALL),
    compiled(FP32, (4096, 768), 768, 32, dropout=0.1),
    compiled(FP32, (4096, 768), 768, 64, **ALL),
    compiled(FP32, (4096, 768), 768, 128, **EVERYTHING),
    compiled(FP32, (4096, 768), 768, 256, **ALL),
    compiled(FP32, (4096, 768), 768, 16, dropout=0.1, precision="tf32"),
    compiled(BF16, (4096, 4096), 4096, 16, name="plain", quick=(90,)),
    compiled(BF16, (16, 4096), 1024, 8, transposed=True, name="plain-transposed"),
    compiled(FP16, (17, 769), 71, 7, **ALL, aligned=False),
    compiled(BF16, (16384, 1024), 1024, 16, g=8, ids=[0] * 16384, **DROPPED, name="bank-of-many-rows", quick=(90,)),
    compiled(BF16, (512, 2048), 2048, 16, g=8, ids=[0] * 512, **DROPPED, name="bank-of-few-rows"),
    compiled(BF16, (4096, 1024), 2048, 64, g=8, ids=[0] * 4096, **DROPPED, parameters=FP32, name="bank-sorted", quick=(80,)),
    compiled(FP32, (4096, 768), 768, 16, g=8, ids=[0] * 4096, **DROPPED, name="bank"),
)
SIZES = ((384, 384), (768, 768), (768, 3072), (3072, 768), (2048, 2048), (4096, 1024))
# In and out features of the layers of Llama 3.2 1B and Llama 3.1 8B.
LLAMA = ((2048, 2048), (2048, 512), (2048, 8192), (8192, 2048), (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
SPEC = OpSpec(
    op=lora_linear,
    reference=lora_linear_reference,
    fwd=_fwd,
    bwd=_bwd,
    leaf_args=leaf_args,
    bwd_leaf_args=bwd_leaf_args,
    bwd_outputs=("x", "weight", "bias", "lora_a", "lora_b", "diagonal", "magnitude"),
    activations=("x",),
    copies_scattered_rows=True,
    autocast=("x", "weight", "bias"),
    cases=CASES,
    bench=(
        *(bench(m, k, n, r, p) for (k, n), r, m, p in itertools.product(SIZES, (8, 16, 64), (64, 512, 2048), (0.0, 0.1))),
        *(bench(m, d, d, 16, dora=True) for d, m in itertools.product((768, 2048), (64, 512, 2048))),
        *(bench_bank(m, d) for d, m in itertools.product((768, 2048), (64, 512, 2048))),
    ),
    bench_cuda=(
        *(bench(m, k, n, r, p) for (k, n), r, m, p in itertools.product(LLAMA, (8, 16, 64), (512, 8192), (0.0, 0.1))),
        *(bench(8192, d, d, 16, dora=True) for d in (2048, 4096)),
        *(bench_bank(m, d) for d, m in itertools.product((2048, 4096), (512, 8192))),
    ),
    frozen=("weight", "bias"),
    quiet=(("dropout_p", 0.0),),
    bad=BAD,
    numerics=NUMERICS,
    compiled=COMPILED,
    huge=(
        case("wide-output", shape=(40_000, 64), n=70_000, r=16, **ALL),
        case("wide-weight", shape=(40, 70_000), n=70_000, r=64, **ALL),
        case("bank-of-many", shape=(64, 1024), n=1032, r=64, g=40_000, ids=[0, 39_999] * 32, **DROPPED),
    ),
    many=(
        (case("rows", shape=(2**22 + 5, 2), n=2, r=1), ("x",)),
        (case("adapters", shape=(40, 72), n=72, r=2, g=65535, ids=[0, 65534] * 20, diagonal=True),
         ("lora_a", "lora_b", "diagonal")),
    ),
    tiled=(
        case("r7", shape=(131, 72), n=136, r=7, **ALL),
        *(case(f"r{r}", shape=(67, 136), n=72, r=r, **ALL) for r in (20, 100, 130)),
        case("r48-of-odd-widths", shape=(67, 131), n=75, r=48, **ALL),
        case("bank-r20", shape=(67, 136), n=72, r=20, g=3, ids=[i % 4 - 1 for i in range(67)], **DROPPED),
        case("bank-r100", shape=(67, 136), n=72, r=100, g=4, ids=[i % 5 - 1 for i in range(67)], **DROPPED),
    ),
    planted=(
        case("looped", shape=(720, 200), n=6000, r=20, **ALL),
        case("looped-high-rank", shape=(1100, 1000), n=40, r=50, **ALL),
        case("looped-bank", shape=(720, 200), n=1000, r=60, g=5, ids=[*range(-1, 5)] * 3 + [1] * 300 + [4] * 402, **DROPPED),
    ),
    # Compared a part of the rows at a time, which dropout would draw anew.
    large=lambda elements: case("large", shape=(elements // 1024 + 2048, 1024), n=64, r=16, **{**ALL, "dropout": 0.0}),
)
