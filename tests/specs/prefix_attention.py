import math
from functools import partial

import torch

from fastadapt.ops import prefix_attention, prefix_attention_reference
from fastadapt.ops.dropout import kept, kept_scale
from fastadapt.ops.prefix_attention import _bwd, _fwd, own_column

from ..spec import Bad, Case, Compiled, Numerics, OpSpec

HIDDEN = -128  # in a bias: the key is not seen


def biased(fn):
    """``fn`` with a floating ``attn_mask`` given as integers, in eighths: of floats the battery expects a gradient."""

    def call(q, *tensors, bias=None, **options):
        if bias is not None:
            mask = (bias.to(torch.promote_types(q.dtype, torch.float32)) / 8).masked_fill(bias == HIDDEN, -math.inf)
            options["attn_mask"] = mask.to(q.dtype)
        return fn(q, *tensors, **options)

    return call


def make(
    dtype, device, *, b, h, t, e, p, t_k=None, h_kv=None, causal=False, lengths=None, mask=None, bias=None, gate=False,
    dropout=0.0, seed=2**61 + 3, each=False, g=None, ids=None, parameters=None, scale=None, gain=1.0,
):  # fmt: skip
    """Arguments of a call. ``mask`` is the shape of a bool mask, ``bias`` that of a floating one; both hide nothing of
    the first of several sequences, and of the last query not the first two keys. ``parameters`` is a dtype of their own,
    ``gain`` a size of the queries."""
    t_k, h_kv = t if t_k is None else t_k, h if h_kv is None else h_kv
    parameters = dtype if parameters is None or dtype == torch.float64 else parameters
    randn = lambda *s: torch.randn(s, dtype=torch.float32, device=device)  # noqa: E731
    several = (g,) if g is not None else (b,) if each else ()
    arguments = {"q": (gain * randn(b, h, t, e)).to(dtype), "k": randn(b, h_kv, t_k, e).to(dtype)}
    arguments["v"] = randn(b, h_kv, t_k, e).to(dtype)
    arguments |= {f"prefix_{name}": randn(*several, h_kv, p, e).to(parameters) for name in "kv"}
    if gate:
        arguments["gate"] = (randn(h) * {"drawn": 0.5, "zero": 0.0}[gate]).to(parameters)
    for name, shape in (("attn_mask", mask), ("bias", bias)):
        if shape is not None:
            drawn = torch.randint(-20, 20, shape, dtype=torch.int8, device=device)
            hidden = torch.rand(shape, device=device) < 0.3
            hidden[: shape[0] > 1] = False
            hidden.view(-1, shape[-1])[-1, :2] = False
            arguments[name] = ~hidden if name == "attn_mask" else drawn.masked_fill(hidden, HIDDEN)
    integers = {"key_lengths": lengths, "adapter_ids": ids}
    arguments |= {n: torch.tensor(v, dtype=torch.int64, device=device) for n, v in integers.items() if v is not None}
    if dropout:
        arguments |= {"dropout_p": dropout, "dropout_seed": torch.tensor(seed, device=device)}
    return arguments | {"is_causal": causal, "scale": scale}


def case(name, **options):
    return Case(name, partial(make, **options))


def bench(b, h, t, e, p, h_kv=None):
    h_kv = h if h_kv is None else h_kv
    return Case(
        f"b{b}-h{h}-{h_kv}-t{t}-e{e}-p{p}", partial(make, b=b, h=h, h_kv=h_kv, t=t, e=e, p=p, causal=True),
        flops=4 * b * h * e * (t * p + t * (t + 1) // 2), bytes=lambda item: 2 * b * (h + h_kv) * t * e * item,
    )  # fmt: skip


# Of the first sequence the third query sees all, the third key is seen by all: there the checks of NaN and infinity put theirs.
EVERYTHING = {"h": 4, "h_kv": 2, "causal": True, "parameters": torch.float32, "scale": 0.3}
ONE_KEY_HEAD = EVERYTHING | {"h": 2, "h_kv": 1}
MASKED = {"lengths": [9, 5, 0], "bias": (3, 1, 3, 9)}
CASES = (
    case("small", b=2, h=2, t=5, e=16, p=3),
    case("one", b=1, h=1, t=1, e=8, p=1),
    case("empty", b=0, h=2, t=5, e=16, p=3),
    case("no-queries", b=2, h=2, t=0, t_k=5, e=16, p=3),
    case("no-own-keys", b=2, h=2, t=5, t_k=0, e=16, p=3),
    case("no-prefix", b=2, h=3, t=9, e=16, p=0, causal=True),
    case("no-keys", b=2, h=2, t=3, t_k=0, e=16, p=0),
    case("odd", b=2, h=3, t=33, e=40, p=17, causal=True),
    case("grouped", b=2, h=6, h_kv=2, t=19, e=32, p=5, causal=True),
    case("one-key-head", b=2, h=5, h_kv=1, t=18, e=24, p=16),
    case("narrow", b=2, h=2, t=20, e=8, p=4),
    case("wide", b=1, h=2, t=37, e=256, p=9, causal=True),
    case("long", b=1, h=2, t=150, e=16, p=130, causal=True),
    case("long-unmasked", b=1, h=2, t=70, t_k=200, e=32, p=64),
    case("decode", b=3, h=4, h_kv=2, t=1, t_k=65, e=32, p=7, causal=True),
    case("grouped-and-continued", b=1, h=2, h_kv=1, t=13, t_k=48, e=16, p=3, causal=True),
    case("continued", b=2, h=2, t=21, t_k=50, e=16, p=3, causal=True),
    case("more-queries-than-keys", b=2, h=2, t=40, t_k=11, e=16, p=3, causal=True),
    case("more-queries-without-prefix", b=2, h=2, t=40, t_k=11, e=16, p=0, causal=True),
    case("key-lengths", b=4, h=2, t=33, e=16, p=5, lengths=[33, 0, 1, 20]),
    case("key-lengths-without-prefix", b=4, h=2, t=33, e=16, p=0, lengths=[33, 0, 1, 20], causal=True),
    case("left-padding", b=3, h=2, t=20, e=16, p=5, mask=(3, 1, 1, 20), causal=True),
    case("mask-of-pairs", b=2, h=2, t=20, t_k=31, e=16, p=5, mask=(20, 31)),
    case("mask-without-prefix", b=2, h=2, t=20, t_k=31, e=16, p=0, mask=(2, 2, 20, 31)),
    case("bias-of-heads", b=2, h=2, t=20, t_k=31, e=16, p=5, bias=(1, 2, 20, 31)),
    case("gate", b=2, h=3, t=20, e=24, p=10, gate="drawn", causal=True),
    case("gate-of-zero", b=2, h=3, t=20, e=24, p=10, gate="zero"),
    case("gate-without-prefix", b=2, h=3, t=20, e=24, p=0, gate="drawn"),
    case("gate-of-a-long-prefix", b=1, h=2, t=40, e=16, p=150, gate="drawn"),
    case("gate-alone", b=2, h=2, t=5, t_k=0, e=16, p=3, gate="drawn"),
    case("each", b=3, h=4, h_kv=2, t=17, e=16, p=6, each=True),
    case("dropout", b=2, h=2, t=33, e=16, p=11, dropout=0.2, causal=True),
    case("gate-with-dropout", b=2, h=2, t=20, e=16, p=9, dropout=0.3, gate="drawn"),
    case("steep", b=2, h=2, t=33, e=16, p=17, gain=8.0, causal=True),
    case("float32-parameters", b=2, h=2, t=19, e=16, p=5, parameters=torch.float32),
    case("everything", b=3, t=3, t_k=9, e=24, p=5, **MASKED, **EVERYTHING),
    case("dropout-with-everything", b=3, t=3, t_k=9, e=24, p=5, each=True, dropout=0.2, **MASKED, **EVERYTHING),
    case("gated-with-everything", b=3, t=3, t_k=9, e=24, p=5, gate="drawn", **MASKED, **EVERYTHING),
    case("bank-of-sequences", b=4, h=2, t=6, e=16, p=5, g=3, ids=[2, 0, -1, 2]),
    case("bank-with-everything", b=3, t=3, t_k=9, e=24, p=12, g=2, ids=[1, -1, 1], **MASKED, **EVERYTHING),
    case("bank-with-gate", b=4, h=2, t=6, e=16, p=5, g=3, ids=[2, 0, -1, 2], gate="drawn", parameters=torch.float32),
    case("bank-unused", b=3, h=2, t=5, e=16, p=4, g=2, ids=[-1] * 3),
    case("no-query-heads", b=2, h=0, h_kv=2, t=5, e=16, p=3),
)


def change(**edits):
    """Replace arguments; an edit that is a function gets all arguments of the good call."""
    return lambda a: {**a, **{name: edit(a) if callable(edit) else edit for name, edit in edits.items()}}


def cut(name, dim=0):
    return lambda a: a[name].narrow(dim, 1, a[name].shape[dim] - 1)


def integers(*values, dtype=torch.int64):
    return lambda a: torch.tensor(values, dtype=dtype, device=a["q"].device)


def bank(ids, **edits):
    three = {name: (lambda a, name=name: a[name].expand(3, -1, -1, -1)) for name in ("prefix_k", "prefix_v")}
    return change(**{**three, "adapter_ids": ids, **edits})


def mask(*shape, dtype=torch.bool):
    return change(attn_mask=lambda a: torch.zeros(shape, dtype=dtype, device=a["q"].device))


# Edits of the case "small": q, k, v (2, 2, 5, 16), a prefix (2, 3, 16).
BAD = (
    Bad("q-integer", change(q=lambda a: a["q"].long()), TypeError, "q must be .*float32.*, got torch.int64"),
    Bad("q-not-a-tensor", change(q=[1.0]), TypeError, "q must be a tensor, got list"),
    Bad("q-dims", change(q=lambda a: a["q"][0]), ValueError, r"q must be \(b, h, t, e\), got \(2, 5, 16\)"),
    Bad("q-width", change(q=lambda a: a["q"][..., :0], k=lambda a: a["k"][..., :0], v=lambda a: a["v"][..., :0]), ValueError,
        r"q must be \(b, h, t, e\) with e above zero, got \(2, 2, 5, 0\)"),
    Bad("k-dtype", change(k=lambda a: a["k"].double()), TypeError, "k must be torch.float32 like q, got torch.float64"),
    Bad("k-batch", change(k=cut("k")), ValueError,
        r"k must be \(b, h_kv, t_k, e\) = \(2, h_kv, t_k, 16\) to match q, got \(1, 2, 5, 16\)"),
    Bad("k-width", change(k=cut("k", 3)), ValueError,
        r"k must be \(b, h_kv, t_k, e\) = \(2, h_kv, t_k, 16\) to match q, got \(2, 2, 5, 15\)"),
    Bad("k-device", change(k=lambda a: a["k"].to("meta")), ValueError, "k must be on .* like q, got meta"),
    Bad("v-length", change(v=cut("v", 2)), ValueError, r"v must be \(2, 2, 5, 16\) like k, got \(2, 2, 4, 16\)"),
    Bad("heads", change(**{n: (lambda a, n=n: a[n].repeat(1, 2, 1, 1)[:, :3]) for n in "kv"}), ValueError,
        "k must have a number of heads that divides the 2 of q, got 3"),
    Bad("prefix-heads", change(prefix_k=cut("prefix_k")), ValueError,
        r"prefix_k must be \(h_kv, p, e\) = \(2, 3, 16\), got \(1, 3, 16\)"),
    Bad("prefix-width", change(prefix_v=cut("prefix_v", 2)), ValueError,
        r"prefix_v must be \(h_kv, p, e\) = \(2, 3, 16\), got \(2, 3, 15\)"),
    Bad("prefix-length", change(prefix_v=cut("prefix_v", 1)), ValueError,
        r"prefix_v must be \(h_kv, p, e\) = \(2, 3, 16\), got \(2, 2, 16\)"),
    Bad("prefix-dtype", change(prefix_k=lambda a: a["prefix_k"].double()), TypeError,
        "prefix_k must be torch.float32 like q, got torch.float64"),
    Bad("prefixes-differ", change(**{n: (lambda a, n=n: a[n].half()) for n in ("q", "k", "v", "prefix_k")}), TypeError,
        "prefix_v must be torch.float16 like prefix_k, got torch.float32"),
    Bad("prefix-device", change(prefix_v=lambda a: a["prefix_v"].to("meta")), ValueError,
        "prefix_v must be on .* like q, got meta"),
    Bad("prefix-dims", change(prefix_k=lambda a: a["prefix_k"][0]), ValueError,
        r"prefix_k must be \(h_kv, p, e\) or \(b, h_kv, p, e\), got \(3, 16\)"),
    Bad("bank-without-ids", bank(None), ValueError,
        r"prefix_k must be \(b, h_kv, p, e\) = \(2, 2, 3, 16\), got \(3, 2, 3, 16\); a bank .* needs adapter_ids"),
    Bad("ids-without-bank", change(adapter_ids=integers(0, 0)), ValueError,
        r"prefix_k must be a bank \(g, h_kv, p, e\) when adapter_ids is given, got \(2, 3, 16\)"),
    Bad("banks-differ", bank(integers(0, 1), prefix_v=lambda a: a["prefix_v"].expand(2, -1, -1, -1)), ValueError,
        r"prefix_v must be \(g, h_kv, p, e\) = \(3, 2, 3, 16\), got \(2, 2, 3, 16\)"),
    Bad("ids-dtype", bank(integers(0.0, 1.0, dtype=torch.float32)), TypeError,
        "adapter_ids must be an integer tensor, got torch.float32"),
    Bad("ids-length", bank(integers(0)), ValueError, r"adapter_ids must be \(b,\) = \(2,\), got \(1,\)"),
    Bad("ids-too-large", bank(integers(0, 3)), ValueError, r"adapter_ids must lie in \[-1, 2\] for a bank of 3, got 3",
        cpu_only=True),
    Bad("ids-too-small", bank(integers(-2, 0)), ValueError, r"adapter_ids must lie in \[-1, 2\] for a bank of 3, got -2",
        cpu_only=True),
    Bad("lengths-shape", change(key_lengths=integers(1, 2, 3)), ValueError, r"key_lengths must be \(b,\) = \(2,\), got \(3,\)"),
    Bad("lengths-dtype", change(key_lengths=integers(1.0, 2.0, dtype=torch.float32)), TypeError,
        "key_lengths must be an integer tensor, got torch.float32"),
    Bad("lengths-too-large", change(key_lengths=integers(5, 6)), ValueError,
        r"key_lengths must lie in \[0, 5\] for t_k = 5, got 6", cpu_only=True),
    Bad("lengths-negative", change(key_lengths=integers(-1, 5)), ValueError,
        r"key_lengths must lie in \[0, 5\] for t_k = 5, got -1", cpu_only=True),
    Bad("mask-shape", mask(2, 1, 4, 5), ValueError,
        r"attn_mask must broadcast to \(b, h, t, t_k\) = \(2, 2, 5, 5\), got \(2, 1, 4, 5\)"),
    Bad("mask-dims", mask(1, 1, 1, 5, 5), ValueError, r"attn_mask must broadcast to .*, got \(1, 1, 1, 5, 5\)"),
    Bad("mask-dtype", mask(5, 5, dtype=torch.int64), TypeError,
        "attn_mask must be torch.bool, torch.float32 .*, got torch.int64"),
    Bad("mask-not-a-tensor", change(attn_mask=True), TypeError, "attn_mask must be a tensor, got bool"),
    Bad("gate-shape", change(gate=lambda a: a["q"][0, 0, 0]), ValueError, r"gate must be \(h,\) = \(2,\), got \(16,\)"),
    Bad("causal-type", change(is_causal=1), TypeError, "is_causal must be a bool, got int"),
    Bad("scale-type", change(scale="big"), TypeError, "scale must be a number or None, got str"),
    Bad("dropout", change(dropout_p=1.0), ValueError, r"dropout_p must be a number in \[0, 1\), got 1.0"),
    Bad("seed", change(dropout_p=0.1, dropout_seed=integers(1)), ValueError,
        r"dropout_seed must be a 0-d int64 tensor, got \(1,\)"),
    Bad("backend", change(backend="cuda"), ValueError, "backend must be None or one of .*'native'.*, got 'cuda'"),
)  # fmt: skip


def leaf_args(arguments):
    names = prefix_attention.arguments.__code__.co_varnames[: prefix_attention.arguments.__code__.co_argcount]
    given = lambda *tensors, **options: prefix_attention.arguments(  # noqa: E731
        *tensors, *({"dropout_p": 0.0, **options}.get(name) for name in names[5:])
    )
    a = arguments
    tensors = [a[name] for name in names[:5]]
    return *biased(given)(*tensors, **{n: v for n, v in a.items() if n not in names[:5]}), True


def bwd_leaf_args(grad_y, args, mask):
    """What forward saves is drawn: those who call this look at shapes, dtypes and addresses."""
    y, lse = _fwd.fake(*args)
    return (grad_y, torch.randn_like(y), torch.randn_like(lse), *args[:-1], mask)


def compiled(dtype, name, quick=(), precision="ieee", aligned=True, **options):
    return Compiled(case(name, **options), dtype, quick, precision, aligned)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LOADED = {"dropout": 0.1, "gate": "drawn", "causal": True}
# The first of a width and element size goes through all tiles: of those that every call fits, with all that takes registers.
COMPILED = (
    compiled(BF16, "e64", b=8, h=12, t=512, e=64, p=16, causal=True, quick=(90,)),
    compiled(BF16, "e128", b=8, h=32, h_kv=8, t=1024, e=128, p=64, causal=True),
    compiled(FP16, "e256", b=8, h=8, t=512, e=256, p=64, causal=True),
    compiled(FP32, "e64", b=8, h=12, t=512, e=64, p=128, causal=True, quick=(80,)),
    compiled(FP32, "e128", b=8, h=12, t=512, e=128, p=200, mask=(8, 1, 1, 512), **LOADED),
    compiled(FP32, "e256", b=8, h=12, t=512, e=256, p=200, mask=(8, 1, 1, 512), **LOADED),
    compiled(FP32, "e64", b=8, h=12, t=512, e=64, p=128, causal=True, precision="tf32"),
    compiled(FP16, "masked", b=8, h=12, t=512, e=64, p=200, mask=(8, 1, 1, 512), **LOADED),
    compiled(BF16, "bank", b=8, h=24, h_kv=8, t=768, e=128, p=200, g=3, ids=[0] * 8, lengths=[768] * 8,
             bias=(1, 24, 768, 768), parameters=FP32, **LOADED),
    compiled(FP16, "odd", b=3, h=3, t=33, e=40, p=17, each=True, causal=True, aligned=False),
)  # fmt: skip


def rounded(a, unit, points):
    """The docstring's formula in float64, and its roundings."""
    value, gradient = (points.value, points.gradient) if unit != "vector" else (lambda t: t,) * 2
    q, k, v = a["q"], a["k"], a["v"]
    (b, h, t, e), t_k, p, device = q.shape, k.shape[2], a["prefix_k"].shape[-2], q.device
    of_query = lambda t: t.repeat_interleave(h // t.shape[-3], -3)  # noqa: E731
    ids, scale, drop = a.get("adapter_ids"), e**-0.5 if a["scale"] is None else a["scale"], a.get("dropout_p", 0.0)
    # A prefix in the dtype of q is as it was; its gradient isn't rounded on the way.
    prefix_k, prefix_v = (t + (points.value(t) - t).detach() for t in (a["prefix_k"], a["prefix_v"]))
    if ids is not None:
        prefix_k, prefix_v = (t[ids.clamp(min=0)] for t in (prefix_k, prefix_v))
    seen = torch.ones(b, h, t, t_k, dtype=torch.bool, device=device)
    if a["is_causal"]:
        seen = seen.tril(t_k - t)
    if "key_lengths" in a:
        seen = seen & (torch.arange(t_k, device=device) < a["key_lengths"][:, None, None, None])
    seen = seen & a["attn_mask"] if "attn_mask" in a else seen
    scores = scale * (q @ of_query(k).transpose(-1, -2))
    if "bias" in a:
        seen, scores = seen & (a["bias"] != HIDDEN), scores + a["bias"].to(scores.dtype) / 8
    prefix_scores = scale * (q @ of_query(prefix_k).transpose(-1, -2))
    prefix_seen = torch.ones_like(prefix_scores, dtype=torch.bool)
    prefix_seen = prefix_seen if ids is None else prefix_seen & (ids >= 0)[:, None, None, None]
    stays = torch.ones((), dtype=q.dtype, device=device).expand(b, h, t, own_column(p) + t_k)
    if drop:
        stays = kept(a["dropout_seed"], b * h * t, stays.shape[-1], drop).view(stays.shape) * kept_scale(drop)

    def attend(scores, seen, stays, values):
        scores = gradient(scores).masked_fill(~seen, -math.inf)
        top = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min) if scores.shape[-1] else 0.0
        weights = torch.where(seen, (scores - top).exp(), 0.0)
        total = weights.sum(-1, keepdim=True)
        mixed = (value(weights) * stays) @ torch.where(seen.any((-2,))[..., None], values, 0.0)
        y = torch.where(total == 0, 0.0, mixed / torch.where(total == 0, 1.0, total))
        if y.requires_grad:  # backward makes the weights anew, from a sum whose logarithm is a float32 number
            lse = (top + total.log()).detach()
            off = torch.where(lse.isfinite(), lse.float() - lse, 0.0).to(y.dtype)
            y.register_hook(lambda grad: grad * (1 + off))
        return y

    v, prefix_v = of_query(v), of_query(prefix_v).expand(b, h, p, e)
    own_stays, prefix_stays = stays[..., stays.shape[-1] - t_k :], stays[..., :p]
    if "gate" in a:
        return attend(scores, seen, own_stays, v) + a["gate"][:, None, None] * attend(
            prefix_scores, prefix_seen, prefix_stays, prefix_v
        )
    joined = ((prefix_scores, scores), (prefix_seen, seen), (prefix_stays, own_stays))
    return attend(*(torch.cat(pair, -1) for pair in joined), torch.cat([prefix_v, v], -2))


class _Rounds:
    value = gradient = staticmethod(lambda t: t)


def ordered(q, k, v, prefix_k, prefix_v, **options):
    """The formula with keys that no query of a sequence's head sees left out, as kernels leave them out."""
    a = {"q": q, "k": k, "v": v, "prefix_k": prefix_k.to(q), "prefix_v": prefix_v.to(q), "is_causal": False, "scale": None}
    return rounded(a | options, "vector", _Rounds)


def fuzz(draw, st):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    b, h_kv, t = pick(0, 1, 2, 3, 5), pick(1, 2, 3), draw(st.integers(0, 70))
    h, t_k = h_kv * pick(1, 1, 2, 3), draw(st.one_of(st.none(), st.integers(0, 130), st.integers(0, 8).map(lambda n: n * 16)))
    # A softmax over one key has no gradient but rounding errors, of which PyTorch's way has none: a test of its own bounds
    # them. So no length is 1, and the last query of the last sequence sees two keys or more.
    t_k = 2 if t_k == 1 or t_k is None and t == 1 else t_k
    keys = t if t_k is None else t_k
    g = pick(None, None, None, 1, 3)
    shape = pick(b, 1), pick(h, 1), pick(t, 1), keys
    masks = pick({}, {}, {"mask": shape}, {"bias": shape}) if all(shape) else {}
    lengths = draw(st.lists(st.integers(0, keys), min_size=b, max_size=b)) if draw(st.booleans()) else None
    lengths = lengths and [*(n + (n == 1) for n in lengths[1:]), keys]
    return case(
        "fuzz", b=b, h=h, h_kv=h_kv, t=t, t_k=t_k, e=pick(8, 16, 24, 32, 64, 72, 128), p=pick(0, 3, 8, 16, 17, 40, 70),
        causal=draw(st.booleans()), gate=pick(False, False, "drawn"), dropout=pick(0.0, 0.0, 0.1, 0.5), g=g, lengths=lengths,
        ids=None if g is None else draw(st.lists(st.integers(-1, g - 1), min_size=b, max_size=b)),
        each=g is None and draw(st.booleans()), parameters=pick(None, None, torch.float32), **masks,
    )  # fmt: skip


NUMERICS = Numerics(
    rounded=rounded,
    # Matrix units round weights before they are divided by their sum, in an order of tiles that the model doesn't know.
    predicted=lambda a, unit: ("y",) if unit == "vector" else (),
    exact=(),  # no exponential is
    rows=("key_lengths", "adapter_ids", "bias"),
    alone={},
    paths=(
        case("rows", b=2, h=2, t=130, e=40, p=20, **{k: v for k, v in EVERYTHING.items() if k not in ("h", "h_kv")}),
        case("decoded", b=3, h=4, h_kv=2, t=1, t_k=300, e=64, p=20, causal=True, gain=4.0),
        case("wide-heads", b=1, h=2, t=50, e=256, p=270, causal=True, gate="drawn"),
        case("dropped", b=2, h=2, t=70, t_k=250, e=24, p=20, causal=True, dropout=0.2, lengths=[250, 133]),
    ),
    fuzz=fuzz,
    ordered=ordered,
)
SIZES = ((8, 12, 512, 64, 16), (8, 12, 512, 64, 128), (16, 12, 128, 64, 16), (16, 12, 128, 64, 256), (1, 8, 1024, 128, 64))
SPEC = OpSpec(
    op=biased(prefix_attention),
    reference=biased(prefix_attention_reference),
    fwd=_fwd,
    bwd=_bwd,
    leaf_args=leaf_args,
    bwd_leaf_args=bwd_leaf_args,
    bwd_outputs=("q", "k", "v", "prefix_k", "prefix_v", "gate"),
    activations=("q", "k", "v"),
    autocast=("q", "k", "v"),
    cases=CASES,
    bench=(*(bench(*size) for size in SIZES), bench(4, 24, 768, 128, 200, h_kv=8), bench(8, 12, 512, 64, 0)),
    bench_cuda=(
        *(bench(*size) for size in SIZES[1::2]), bench(8, 32, 1024, 128, 32, h_kv=8), bench(32, 32, 1024, 128, 2048, h_kv=8),
    ),
    quiet=(("dropout_p", 0.0),),
    bad=BAD,
    numerics=NUMERICS,
    compiled=COMPILED,
    large=lambda elements: case("large", b=elements // 2**20 + 2, h=8, t=1024, t_k=16, e=128, p=8),
    many=((case("sequences", b=2**16 + 5, h=1, t=1, e=8, p=1), ("q", "k", "v")),),
    tiled=(
        case("width-of-40", b=1, t=70, t_k=80, e=40, p=70, **ONE_KEY_HEAD),
        case("width-of-72", b=1, t=70, t_k=135, e=72, p=40, **ONE_KEY_HEAD),
        case("width-of-136", b=1, t=37, t_k=70, e=136, p=40, gate="drawn", **ONE_KEY_HEAD),
    ),
    planted=(
        case("looped", b=2, t=70, t_k=140, e=24, p=140, dropout=0.2, **EVERYTHING),
        case("looped-gate", b=2, t=70, t_k=140, e=24, p=140, gate="drawn", lengths=[140, 135], **EVERYTHING),
    ),
)  # fmt: skip
