"""What the battery can't say of prefix_attention."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

import fastadapt
from fastadapt._leaf import INTERPRET
from fastadapt.ops.dropout import kept, kept_scale
from fastadapt.ops.prefix_attention import _bwd, _fwd, prefix_attention

from . import numerics
from .accuracy import assert_within_reference_error
from .battery import BACKENDS, DEVICE, check, on_cpu, run
from .peak import extra_bytes
from .specs.prefix_attention import SPEC, case, make

KERNELS = [b for b in BACKENDS if (b, DEVICE) in _fwd.available]
kernels = pytest.mark.parametrize("backend", KERNELS)
backends = pytest.mark.parametrize("backend", KERNELS if INTERPRET else [*KERNELS, "reference"])
on_device = pytest.mark.skipif(("triton", DEVICE) not in _fwd.available, reason="needs a GPU or TRITON_INTERPRET=1")


SMALL = {"b": 2, "h": 2, "t": 5, "e": 16, "p": 3}


def call(**options):
    return make(torch.float32, DEVICE, **SMALL | options)


def visible(p, t, t_k, h=2, b=2, e=16):
    """Every seen key of a query has the same weight, and the output is the weights: of the prefix, then of the own keys."""
    eye = torch.eye(e, device=DEVICE)
    prefix_v, v = eye[:p].expand(h, p, e), eye[p : p + t_k].expand(b, h, t_k, e)
    return {"q": torch.zeros(b, h, t, e, device=DEVICE), "k": torch.randn_like(v), "v": v,
            "prefix_k": torch.randn_like(prefix_v), "prefix_v": prefix_v}  # fmt: skip


@pytest.mark.parametrize("p", [3, 0])
@pytest.mark.parametrize("t, t_k, seen", [
    (4, 4, (1, 2, 3, 4)), (3, 8, (6, 7, 8)), (1, 8, (8,)), (6, 3, (0, 0, 0, 1, 2, 3)), (2, 0, (0, 0)),
])  # fmt: skip
@backends
def test_causality_counts_from_the_last_query_and_key(backend, t, t_k, seen, p):
    arguments = visible(p, t, t_k)
    weights = prefix_attention(**arguments, is_causal=True, backend=backend)[..., : p + t_k]
    expected = torch.tensor([[1.0] * (p + n) + [0.0] * (t_k - n) for n in seen], device=DEVICE)
    expected /= expected.sum(-1, keepdim=True).clamp(min=1)
    assert torch.equal(weights != 0, (expected != 0).expand_as(weights))
    torch.testing.assert_close(weights, expected.expand_as(weights))


def concatenated(q, k, v, prefix_k, prefix_v, *, is_causal, scale, key_lengths=None, adapter_ids=None, gate=None):
    """PyTorch's attention for each sequence: over concatenated keys of its own, or with ``gate`` over each kind by itself."""
    outputs = []
    for i in range(len(q)):
        own = slice(None if key_lengths is None else int(key_lengths[i]))
        keys, values = k[i, :, own], v[i, :, own]
        seen = torch.ones(q.shape[2], keys.shape[1], dtype=torch.bool, device=q.device)
        seen = seen.tril(k.shape[2] - q.shape[2]) if is_causal else seen
        n = i if adapter_ids is None else int(adapter_ids[i])
        prefixes = [(x[n] if x.dim() == 4 else x).to(q.dtype)[:, : None if n >= 0 else 0] for x in (prefix_k, prefix_v)]
        attend = lambda keys, values, seen: F.scaled_dot_product_attention(  # noqa: E731
            q[i], *(x.repeat_interleave(len(q[i]) // len(x), 0) for x in (keys, values)), attn_mask=seen, scale=scale  # noqa: B023
        )
        if gate is None:
            seen = F.pad(seen, (prefixes[0].shape[1], 0), value=True)
            outputs.append(attend(*(torch.cat(pair, 1) for pair in zip(prefixes, (keys, values))), seen))
        else:
            outputs.append(attend(keys, values, seen) + gate.to(q.dtype)[:, None, None] * attend(*prefixes, None))
    return torch.stack(outputs)


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRET else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [
    {"h": 6, "h_kv": 2, "t": 19, "t_k": 40, "causal": True, "lengths": [40, 33]},
    {"t": 33, "p": 0, "causal": True},
    {"g": 3, "ids": [2, -1], "h": 4, "h_kv": 2, "parameters": torch.float32},
    {"each": True, "t": 1, "t_k": 20, "causal": True},
    {"gate": "zero", "t": 18, "causal": True},
], ids=["grouped", "no-prefix", "bank", "each-decodes", "gate-of-zero"])  # fmt: skip
@backends
def test_equals_pytorchs_attention_over_concatenated_keys(backend, options, dtype):
    check(replace(SPEC, reference=concatenated), backend, lambda: make(dtype, DEVICE, **SMALL | options))


@kernels
def test_the_gradient_of_a_gate_of_zero_is_what_opens_it(backend):
    """Of LLaMA-Adapter's first step: the part of the prefix alone, which a gate of zero hides in the output."""
    arguments, grad_y = call(gate="zero", b=3, t=20), torch.randn(3, 2, 20, 16, device=DEVICE)
    result = run(prefix_attention, arguments, grad_y, backend=backend)
    found = {}
    for dtype in (torch.float32, torch.float64):
        q, *prefix = (arguments[name].to(dtype) for name in ("q", "prefix_k", "prefix_v"))
        mixed = F.scaled_dot_product_attention(q, *(x.expand(3, -1, -1, -1) for x in prefix))
        found[dtype] = (mixed * grad_y).sum((0, 2, 3))
    assert_within_reference_error(result["gate"], *found.values(), "gate")
    assert not result["prefix_k"].any() and not result["prefix_v"].any()


HIDING = {
    "causality": {"causal": True, "t": 20, "t_k": 4},
    "lengths": {"lengths": [0, 0], "t": 20},
    "mask": {"t": 20, "attn_mask": torch.zeros(1, 1, 20, 20, dtype=torch.bool)},
    "bias": {"t": 20, "attn_mask": torch.full((2, 1, 1, 20), -torch.inf)},
}


def hiding(how, **options):
    """A call whose first 16 queries see no own key, and which queries those are."""
    options = {**HIDING[how], **options}
    mask = options.pop("attn_mask", None)
    arguments = call(**options) | ({} if mask is None else {"attn_mask": mask.to(DEVICE)})
    return arguments, 16 if how == "causality" else 20


def run_masked(arguments, grad_y=None, backend=None):
    """``run``, whose gradients are of all floating tensors, with a floating mask that has none."""
    mask = {"attn_mask": arguments["attn_mask"]} if "attn_mask" in arguments else {}
    rest = {name: value for name, value in arguments.items() if name != "attn_mask"}
    return run(lambda **a: prefix_attention(**a, **mask, backend=backend), rest, grad_y)


@pytest.mark.parametrize("how", HIDING)
@backends
def test_a_query_that_sees_nothing_gives_zero_and_takes_none(backend, how):
    for arguments, dead in (hiding(how, p=0), hiding(how, g=2, ids=[-1, -1]), hiding(how, p=0, gate="drawn")):
        result = run_masked(arguments, torch.randn_like(arguments["q"]), backend)
        assert all(t.isfinite().all() for t in result.values())
        assert not result["y"][:, :, :dead].any() and not result["q"][:, :, :dead].any()
        assert dead < 20 or not any(t.any() for t in result.values())
        assert dead == 20 or result["y"][:, :, dead:].any()


@pytest.mark.parametrize("how", HIDING)
@kernels
def test_a_query_that_sees_no_own_key_attends_to_the_prefix(backend, how):
    arguments, dead = hiding(how)
    result = run_masked(arguments, backend=backend)
    tensors = {name: arguments[name] for name in ("q", "prefix_k", "prefix_v")}
    alone = [F.scaled_dot_product_attention(*(t.expand(2, -1, -1, -1) for t in map(cast, tensors.values())))
             for cast in (torch.Tensor.float, torch.Tensor.double)]  # fmt: skip
    assert_within_reference_error(result["y"][:, :, :dead], *(y[:, :, :dead] for y in alone), "output")
    assert dead < 20 or not (result["k"].any() or result["v"].any())


@pytest.mark.parametrize("p, gate", [(0, False), (5, False), (8, False), (5, True)])
@backends
def test_forward_and_backward_drop_the_documented_weights(backend, p, gate):
    t, t_k = 10, 7
    arguments, seed = visible(p, t, t_k), torch.tensor(2**61 + 3, device=DEVICE)
    first = {0: 0, 5: 8, 8: 8}[p]
    mask = kept(seed, 4 * t, first + t_k, 0.3).view(2, 2, t, -1)
    mask = torch.cat([mask[..., :p], mask[..., first:]], -1)
    assert mask.any() and not mask.all()
    arguments |= {"dropout_p": 0.3, "dropout_seed": seed, **({"gate": torch.ones(2, device=DEVICE)} if gate else {})}
    grad_y = torch.eye(t, 16, device=DEVICE).expand(2, 2, t, 16)  # column i of a gradient of values has the weights of query i
    result = run(prefix_attention, arguments, grad_y, backend=backend)
    seen = torch.tensor([p] * p + [t_k] * t_k if gate else [p + t_k] * (p + t_k), device=DEVICE)
    expected = mask * kept_scale(0.3) / seen
    weights = result["y"][..., : p + t_k]
    assert torch.equal(weights != 0, mask)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(result["v"][..., :t], expected[..., p:].transpose(2, 3))
    torch.testing.assert_close(result["prefix_v"][..., :t], expected[..., :p].transpose(2, 3).sum(0))


@backends
def test_the_seed_comes_from_torch(backend):
    arguments = call() | {"dropout_p": 0.5}
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs += [prefix_attention(**arguments, backend=backend) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(outputs[:2], outputs[2:4]))
    distinct = [outputs[0], outputs[1], outputs[4], outputs[5]]
    assert not any(torch.equal(distinct[i], distinct[j]) for i in range(4) for j in range(i))


@kernels
def test_the_gradient_of_a_prefix_is_no_chain_of_float32_sums(backend):
    """A large batch of equal sequences: equal terms, whose sum one after the other would drift."""
    b, t = (12, 40) if INTERPRET else (256, 128)
    layout = lambda name, x: x[:1].expand(x.shape) if name in ("q", "k", "v", "grad_y") else x  # noqa: E731
    check(SPEC, backend, lambda: call(b=b, t=t, t_k=2, h=1, e=8), {"prefix_k", "prefix_v"}, layout)


@kernels
def test_an_adapter_reaches_no_sequence_but_its_own(backend):
    """Not even with NaN or infinity for a prefix, nor do other sequences reach its gradients."""
    good = call(b=6, t=7, g=3, ids=[0, 1, -1, 2, 1, 0])
    bad = {**good, **{name: good[name].index_fill(0, torch.tensor([1], device=DEVICE), value)
                      for name, value in (("prefix_k", torch.nan), ("prefix_v", torch.inf))}}  # fmt: skip
    expected, actual = (run(prefix_attention, a, backend=backend) for a in (good, bad))
    rows = good["adapter_ids"] != 1
    for name in ("y", "q", "k", "v"):
        assert torch.equal(actual[name][rows], expected[name][rows]) and not actual[name][~rows].isfinite().any(), name
    for name in ("prefix_k", "prefix_v"):
        assert torch.equal(actual[name][[0, 2]], expected[name][[0, 2]]), name


@backends
@pytest.mark.parametrize("dtype", [torch.int8] if INTERPRET else [torch.int32, torch.int16, torch.int8])
def test_integers_of_any_dtype(backend, dtype):
    arguments = SPEC.case("bank-with-everything").make(torch.float32, DEVICE)
    expected = run(SPEC.op, arguments, backend=backend)
    for name in ("adapter_ids", "key_lengths"):
        arguments[name] = arguments[name].to(dtype)
    actual = run(SPEC.op, arguments, backend=backend)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@on_device
def test_integers_out_of_range_on_the_device():
    """Reading them on a GPU would stall its stream: such ids make their sequences NaN, such lengths are none or all keys."""
    good = call(b=5, t=7, g=3, ids=[0, 1, -1, 2, 1], lengths=[7, 0, 7, 3, 4])
    bad = {**good, "adapter_ids": good["adapter_ids"].clone(), "key_lengths": good["key_lengths"].clone()}
    bad["adapter_ids"][3], bad["adapter_ids"][4] = 3, -2
    bad["key_lengths"][0], bad["key_lengths"][1], bad["key_lengths"][2] = 8, -1, 2**40
    expected, actual = (_fwd.triton(*SPEC.leaf_args(a))[0] for a in (good, bad))
    assert torch.equal(actual[:3], expected[:3]) and actual[3:].isnan().all()


@kernels
def test_one_tensor_in_two_places_gets_the_sum_of_their_gradients(backend):
    apart = call(t=7)
    x, prefix = apart["k"], apart["prefix_k"]
    apart |= {"q": x.clone(), "v": x.clone(), "prefix_v": prefix.clone()}
    together = apart | {"q": x, "v": x, "prefix_v": prefix}
    expected, actual = (run(prefix_attention, a, backend=backend) for a in (apart, together))
    assert torch.equal(actual["y"], expected["y"])
    torch.testing.assert_close(actual["q"], expected["q"] + expected["k"] + expected["v"])
    torch.testing.assert_close(actual["prefix_k"], expected["prefix_k"] + expected["prefix_v"])
    torch._dynamo.reset()
    traced = run(torch.compile(prefix_attention, fullgraph=True, backend="aot_eager"), together, backend=backend)
    for name, value in actual.items():
        torch.testing.assert_close(traced[name], value)


@kernels
def test_heads_lie_side_by_side(backend):
    """To merge the heads is a view, and so is what a projection's gradient is taken of."""
    q, k, v, *rest = [t for t in call(h=4, h_kv=2).values() if isinstance(t, torch.Tensor)]
    inputs = [t.requires_grad_() for t in (q, k, v)]
    y = prefix_attention(*inputs, *rest, backend=backend)
    for t in (y, *torch.autograd.grad(y.sum(), inputs)):
        assert t.transpose(1, 2).flatten(2).data_ptr() == t.data_ptr() and t.transpose(1, 2).is_contiguous()


@kernels
def test_a_mask_that_is_learned_goes_to_the_reference(backend):
    arguments = call()
    mask = torch.randn(2, 1, 5, device=DEVICE, requires_grad=True)
    given = {**arguments, "attn_mask": mask}
    with pytest.raises(RuntimeError, match=f"prefix_attention_fwd: backend '{backend}' does not differentiate attn_mask"):
        prefix_attention(**given, backend=backend)
    if not INTERPRET:  # which has no place in the order
        assert f"not {backend}: " in fastadapt.explain(prefix_attention, **given)
    grads = [torch.autograd.grad(prefix_attention(**given, backend=b).square().sum(), mask)[0] for b in (None, "reference")]
    assert torch.equal(*grads) and grads[0].any()
    with torch.no_grad():
        learned, plain = (prefix_attention(**arguments, attn_mask=m, backend=backend) for m in (mask, mask.detach()))
    assert torch.equal(learned, plain)


def test_explain_gives_reasons(monkeypatch):
    monkeypatch.setattr(_fwd, "available", {("native", "cuda"), ("triton", "cuda")})
    for e, dtype, reason in (
        (12, torch.float32, "supports head widths e up to 256 that 8 divides, got 12"),
        (264, torch.float32, "supports head widths e up to 256 that 8 divides, got 264"),
        (16, torch.float64, "does not support float64"),
    ):
        args = SPEC.leaf_args(make(dtype, "cpu", b=1, h=1, t=2, e=e, p=1))[:-1]
        meta = tuple(t.to("meta") if isinstance(t, torch.Tensor) else t for t in args)
        assert _fwd.explain(None, "cuda", meta).split("\n") == [
            "prefix_attention_fwd on cuda: reference (first of triton > native > reference)",
            *(f"  not {name}: prefix_attention_fwd: backend {name!r} {reason}" for name in ("triton", "native")),
        ]


@kernels
def test_decoding_by_steps_is_one_call(backend):
    """Keys in a cache that is longer than what it holds; what lies behind is never looked at."""
    b, h, t, e = 2, 2, 6, 16
    whole = call(t=t, h=4, h_kv=h, causal=True)
    cache = [torch.full((b, 16, h, e), torch.nan, device=DEVICE).transpose(1, 2) for _ in range(2)]
    steps = []
    for i in range(t):
        for kept_so_far, name in zip(cache, "kv"):
            kept_so_far[:, :, i] = whole[name][:, :, i]
        k, v = (x[:, :, : i + 1] for x in cache)
        steps.append(prefix_attention(**{**whole, "q": whole["q"][:, :, i : i + 1], "k": k, "v": v}, backend=backend))
    exact = concatenated(**{name: t.double() if torch.is_tensor(t) else t for name, t in whole.items()})
    assert_within_reference_error(torch.cat(steps, 2), concatenated(**whole), exact, "output")


@pytest.mark.skipif(INTERPRET, reason="the graph is the same")
@kernels
def test_other_lengths_ids_and_seeds_cost_no_recompilation(backend):
    arguments = call(g=2, ids=[0, -1], lengths=[5, 2], dropout=0.3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prefix_attention, fullgraph=True, backend=counter)
    for other in range(3):
        assert torch.equal(compiled(**arguments, backend=backend), prefix_attention(**arguments, backend=backend))
        for name in ("adapter_ids", "key_lengths", "dropout_seed"):
            arguments[name] = arguments[name].flip(0) if arguments[name].dim() else arguments[name] + other
    assert counter.frame_count == 1


@kernels
def test_leaf_of_nothing_wanted(backend):
    arguments = SPEC.case("small").make(torch.float32, DEVICE)
    args = SPEC.leaf_args(arguments)
    outputs = getattr(_bwd, backend)(*SPEC.bwd_leaf_args(torch.ones_like(arguments["q"]), args, [False] * 6))
    assert [tuple(t.shape) for t in outputs] == [(0,)] * 6


@on_cpu
@pytest.mark.parametrize("chosen", [
    SPEC.case("bank-with-everything"), SPEC.case("gate-of-a-long-prefix"), *SPEC.numerics.paths,
    case("batch", b=40, h=2, t=40, e=16, p=40, causal=True),
], ids=lambda chosen: chosen.name)  # fmt: skip
def test_bits_do_not_depend_on_the_number_of_threads(chosen):
    numerics.threads_change_no_bit(SPEC, chosen, torch.float32)


@pytest.mark.parametrize("options", [{"p": 0}, {"gate": "drawn"}], ids=["without-prefix", "gate"])
@kernels
def test_a_softmax_over_one_key_has_no_gradient_but_rounding_errors(backend, options):
    """Its weight is 1 whatever its score is: what kernels take from ``grad_y @ v`` is ``grad_y @ y``, and both are rounded."""
    a = call(t=35, lengths=[1, 1], **options)
    grad_y, v = torch.randn_like(a["q"]), a["v"][:, :, :1]
    results = run(SPEC.op, a, grad_y, backend=backend)
    terms = ((results["y"].abs() + v.abs()) * grad_y.abs()).sum(-1, keepdim=True) * a["q"].abs() * a["q"].shape[-1] ** -0.5
    grad_k, bound = results["k"], 2 * torch.finfo(torch.float32).eps * terms.sum(2)
    assert (grad_k[:, :, 0].abs() <= bound).all() and not grad_k[:, :, 1:].any()


@pytest.mark.parametrize("gate", [False, "drawn"])
@kernels
def test_what_is_kept_for_backward_is_q_k_v_y_and_a_number_a_query(backend, gate):
    arguments = call(t=40, p=50, gate=gate, lengths=[40, 3], dropout=0.2)
    arguments["q"].requires_grad_()
    given = {t.untyped_storage().data_ptr() for t in arguments.values() if torch.is_tensor(t)}
    kept_tensors = {}

    def pack(t):
        kept_tensors[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = prefix_attention(**arguments, backend=backend)
    beyond = sum(nbytes for pointer, nbytes in kept_tensors.items() if pointer not in given)
    assert beyond == y.nbytes + (2 if gate else 1) * 4 * y[..., 0].numel()
    assert {arguments[name].untyped_storage().data_ptr() for name in "qkv"} <= kept_tensors.keys()


MEMORY = """
from types import SimpleNamespace
def prepare(b, h, t, e, p, training):
    q, k, v = (torch.ones(b, h, t, e, requires_grad=training) for _ in range(3))
    prefix = [torch.ones(h, p, e, requires_grad=training) for _ in range(2)]
    def call(q):
        parts = [q, k[:len(q)], v[:len(q)], *prefix]
        y = fastadapt.prefix_attention(*parts, backend="native")
        results = y, *(torch.autograd.grad(y, parts, y) if training else ())
        return SimpleNamespace(nbytes=sum(t.nbytes for t in results) + training * b * h * t * 4)
    return q, call
"""


@on_cpu
def test_strided_inputs_and_broadcast_masks_are_read_in_place():
    q, k, v = (torch.randn(4, 512, 16, 128)[..., ::2].transpose(1, 2) for _ in range(3))
    options = {"attn_mask": torch.ones(512, dtype=torch.bool), "key_lengths": torch.tensor([512] * 4)}
    with torch.profiler.profile(profile_memory=True) as profile:
        y = prefix_attention(q, k, v, *torch.randn(2, 16, 4, 64), **options, is_causal=True, backend="native")
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert y.nbytes <= allocated <= y.nbytes + 2**21


@on_cpu
@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_peak_memory_does_not_grow_with_batch_and_prefix(training):
    """Copies of the prefix for each of the batch would take 256 MiB, and so would scores or weights."""
    assert extra_bytes(MEMORY, f"8, 2, 8, 64, 8, {training}", f"128, 4, 16, 64, 1024, {training}") <= 32 * 2**20
