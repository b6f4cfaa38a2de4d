import itertools
import math
from functools import partial

import torch

from fastadapt.ops import adapter_fusion, adapter_fusion_reference
from fastadapt.ops.adapter_fusion import _bwd, _fwd

from ..spec import Bad, Case, Compiled, Numerics, OpSpec


def make(dtype, device, *, shape, g, shared=False, scale=1.0, gain=1.0):
    """Arguments of a call. ``shared`` keys are the values too, ``gain`` is the size of the queries."""
    randn = lambda *s: torch.randn(s, dtype=torch.float32, device=device)  # noqa: E731
    keys = randn(g, *shape).to(dtype)
    return {
        "query": (gain * randn(*shape) / math.sqrt(shape[-1])).to(dtype),
        "keys": keys,
        "values": keys if shared else randn(g, *shape).to(dtype),
        "scale": randn().abs().add(0.5).to(dtype) if scale == "0-d" else scale,
    }


def case(name, **options):
    return Case(name, partial(make, **options))


def bench(m, d, g):
    return Case(
        f"m{m}-d{d}-g{g}", partial(make, shape=(m, d), g=g, shared=True),
        flops=4 * m * d * g, bytes=lambda item: (g + 2) * m * d * item,
    )  # fmt: skip


EVERYTHING = {"scale": "0-d", "gain": 2.0}
CASES = (
    case("small", shape=(5, 36), g=3, scale=0.5),
    case("one", shape=(1, 1), g=1),
    case("empty", shape=(0, 8), g=2),
    case("vector", shape=(42,), g=3),
    case("one-adapter", shape=(19, 40), g=1, shared=True),
    case("two", shape=(19, 64), g=2, shared=True),
    case("m33-d65-r17", shape=(33, 65), g=7),
    case("many-adapters", shape=(9, 40), g=67, scale=0.25),
    case("many-shared-adapters", shape=(9, 136), g=40, shared=True),
    case("many-rows", shape=(300, 40), g=3, shared=True),
    case("wide", shape=(18, 1032), g=5),
    case("wide-and-shared", shape=(7, 2056), g=4, shared=True),
    case("4-d", shape=(2, 3, 2, 24), g=4, shared=True),
    case("steep", shape=(33, 48), g=5, gain=30.0),
    case("cold", shape=(33, 48), g=5, shared=True, scale=-0.02),
    case("learned-scale", shape=(19, 40), g=4, shared=True, scale="0-d"),
    case("everything", shape=(3, 7, 72), g=5, **EVERYTHING),
)


def change(**edits):
    """Replace arguments; an edit that is a function gets all arguments of the good call."""
    return lambda a: {**a, **{name: edit(a) if callable(edit) else edit for name, edit in edits.items()}}


def cut(name, *index):
    return lambda a: a[name][index]


# Edits of the case "small": query (5, 36), keys and values (3, 5, 36).
BAD = (
    Bad("query-integer", change(query=lambda a: a["query"].long()), TypeError, "query must be .*float32.*, got torch.int64"),
    Bad("query-not-a-tensor", change(query=[1.0]), TypeError, "query must be a tensor, got list"),
    Bad("query-without-columns", change(query=cut("query", ..., slice(0, 0))), ValueError,
        r"query must be \(..., d\) with d above zero, got \(5, 0\)"),
    Bad("query-of-no-dims", change(query=lambda a: a["query"].sum()), ValueError,
        r"query must be \(..., d\) with d above zero, got \(\)"),
    Bad("width", change(query=cut("query", ..., slice(30))), ValueError,
        r"keys must be \(g, ..., d\) = \(g, 5, 30\) .* to match query, got \(3, 5, 36\)"),
    Bad("rows", change(keys=cut("keys", slice(None), slice(4))), ValueError,
        r"keys must be \(g, ..., d\) = \(g, 5, 36\) .* to match query, got \(3, 4, 36\)"),
    Bad("keys-of-one-adapter", change(keys=cut("keys", 0)), ValueError,
        r"keys must be \(g, ..., d\) = \(g, 5, 36\) .* to match query, got \(5, 36\)"),
    Bad("no-adapters", change(keys=cut("keys", slice(0)), values=cut("values", slice(0))), ValueError,
        r"keys must be .* with g above zero to match query, got \(0, 5, 36\)"),
    Bad("fewer-values", change(values=cut("values", slice(2))), ValueError,
        r"values must be \(3, 5, 36\) like keys, got \(2, 5, 36\)"),
    Bad("widths-differ", change(values=cut("values", ..., slice(30))), ValueError,
        r"values must be \(3, 5, 36\) like keys, got \(3, 5, 30\)"),
    Bad("values-missing", change(values=None), TypeError, "values must be a tensor, got NoneType"),
    Bad("keys-missing", change(keys=None), TypeError, "keys must be a tensor, got NoneType"),
    Bad("keys-dtype", change(keys=lambda a: a["keys"].double()), TypeError,
        "keys must be torch.float32 like query, got torch.float64"),
    Bad("values-dtype", change(values=lambda a: a["values"].half()), TypeError,
        "values must be torch.float32 like query, got torch.float16"),
    Bad("values-device", change(values=lambda a: a["values"].to("meta")), ValueError,
        "values must be on .* like query, got meta"),
    Bad("scale-shape", change(scale=lambda a: a["query"][0]), ValueError, r"scale must be 0-d = \(\), got \(36,\)"),
    Bad("scale-dtype", change(scale=lambda a: a["query"].double().sum()), TypeError,
        "scale must be torch.float32 like query, got torch.float64"),
    Bad("scale-type", change(scale="big"), TypeError, "scale must be a number or a 0-d tensor, got str"),
    Bad("backend", change(backend="cuda"), ValueError, "backend must be None or one of .*'native'.*, got 'cuda'"),
)  # fmt: skip


def leaf_args(arguments):
    return adapter_fusion.arguments(*(arguments[name] for name in ("query", "keys", "values", "scale")))


def bwd_leaf_args(grad_y, args, mask):
    """The weights are those that the reference gives: backward is tested alone with them."""
    query, keys, _, scale, scale_value = args
    precise = torch.promote_types(query.dtype, torch.float32)
    q, k, s = (None if t is None else t.to(precise) for t in (query, keys, scale))
    weights = ((scale_value if s is None else s) * torch.einsum("...d,g...d->...g", q, k)).softmax(-1)
    return grad_y, weights, *args, mask


def compiled(dtype, shape, g, quick=(), aligned=True, **options):
    name = f"m{shape[0]}-d{shape[1]}-g{g}"
    return Compiled(case(name, shape=shape, g=g, **options), dtype, quick, aligned=aligned)


def rounded(a, unit, points):
    """Nothing but the output and the gradients is rounded."""
    return adapter_fusion_reference(**a)


def fuzz(draw, st):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    leading = pick((), (0,), (1,), (2,), (3, 5), (16,), (17,), (2, 3, 5), (33,), (64,), (5, 19), (130,))
    return case(
        "fuzz", shape=(*leading, pick(1, 2, 7, 8, 16, 17, 33, 64, 65, 130, 520)), g=pick(1, 2, 3, 4, 5, 8, 9, 16, 33),
        shared=draw(st.booleans()), scale=pick(0.5, 1.0, -1.0, "0-d"), gain=pick(1.0, 4.0),
    )  # fmt: skip


def predicted(a, unit):
    """Steep scores leave one weight near 1: what is left of the gradients of scores is the rounding of what cancels."""
    scores = torch.einsum("...d,g...d->...g", a["query"].double(), a["keys"].double())
    steep = scores.numel() and scores.abs().max() > 30
    return ("y",) if steep else ("y", "query", "keys", "values")


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NUMERICS = Numerics(
    rounded=rounded,
    predicted=predicted,
    exact=(),  # no exponential is
    rows=(),
    along={"keys": 1, "values": 1},
    alone={},
    paths=(
        case("rows", shape=(130, 72), g=5, **EVERYTHING),
        case("shared", shape=(70, 200), g=8, shared=True),
        case("many-of-few", shape=(5, 768), g=33),
    ),
    fuzz=fuzz,
    rounds_inside=False,
)

SPEC = OpSpec(
    op=adapter_fusion,
    reference=adapter_fusion_reference,
    fwd=_fwd,
    bwd=_bwd,
    leaf_args=leaf_args,
    bwd_leaf_args=bwd_leaf_args,
    bwd_outputs=("query", "keys", "values", "scale"),
    activations=("query", "keys", "values"),
    autocast=("query", "keys", "values"),
    cases=CASES,
    bench=tuple(bench(m, d, g) for d, m, g in itertools.product((384, 768), (512, 2048), (2, 4, 8))),
    bench_cuda=tuple(bench(m, d, g) for d, m, g in itertools.product((768, 4096), (2048, 16384), (2, 8))),
    bad=BAD,
    numerics=NUMERICS,
    compiled=(
        compiled(FP16, (512, 4096), 3),  # first, since it can be walked in pieces too
        compiled(BF16, (4096, 768), 8, quick=(90,), shared=True),
        compiled(FP32, (4096, 1024), 4, quick=(80,), **EVERYTHING),
        compiled(FP32, (512, 8192), 2, **EVERYTHING),
        compiled(FP16, (17, 65), 5, aligned=False),
    ),
    large=lambda elements: case("large", shape=(elements // 1024 + 2048, 1024), g=2, **EVERYTHING),
    many=((case("rows", shape=(2**22 + 5, 2), g=2), ("query", "keys", "values")),),
    tiled=(
        case("narrow", shape=(37, 140), g=5, **EVERYTHING),
        case("wide", shape=(9, 1100), g=3, shared=True),
    ),
    planted=(  # rows of a multiple of 16 columns, which asynchronous copies fetch
        case("looped", shape=(70, 208), g=9, **EVERYTHING),
        case("looped-shared", shape=(70, 608), g=9, shared=True, scale="0-d"),
        case("looped-wide", shape=(3, 2064), g=9, **EVERYTHING),
    ),
)  # fmt: skip
