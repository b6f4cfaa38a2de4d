"""PrefixEncoder and PrefixAttention against PyTorch's attention over concatenated keys and values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastadapt.nn import PrefixAttention, PrefixEncoder, freeze_except

from .accuracy import assert_within_reference_error
from .battery import DEVICE

D, H, P, B, T, S = 32, 4, 5, 3, 7, 6
LAYERS = {
    "plain": {},
    "grouped": {"h_kv": 2},
    "one-head": {"h_kv": 1, "e": 16, "bias": False},
    "per-head-gate": {"gate": "per_head", "h_kv": 2},
    "scalar-gate": {"gate": "scalar"},
}
over_layers = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)


def randomised(module, dtype=torch.float64):
    """Every parameter away from its start, and no weight so large that one key takes all."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * (0.15 if p.dim() == 2 and p.shape[0] > 1 else 0.5))
    return module.to(DEVICE, dtype)


def rand(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def integers(*values):
    return torch.tensor(values, device=DEVICE)


def plain(layer, x, context=None, seen=None, past=None, prefixes=None):
    """The layer by its own linear layers and PyTorch's attention; ``seen`` is ``(b, 1, t, t_k)``, ``prefixes`` one a row."""
    source = x if context is None else context
    heads = lambda y: y.unflatten(-1, (-1, layer.e)).transpose(1, 2)  # noqa: E731
    q, k, v = heads(layer.q_proj(x)), heads(layer.k_proj(source)), heads(layer.v_proj(source))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    seen = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool, device=x.device) if seen is None else seen
    rows = []
    for i, prefix in enumerate(prefixes or [layer.prefixes["default"]()[0]] * len(x)):
        own = q[i : i + 1], k[i : i + 1], v[i : i + 1]
        attend = lambda *args, mask=None: F.scaled_dot_product_attention(*args, attn_mask=mask, enable_gqa=True)  # noqa: E731
        if prefix is None:
            rows.append(attend(*own, mask=seen[i]))
        elif prefix.gate is None:
            both = (torch.cat([p[None].to(t.dtype), t], 2) for p, t in zip(prefix, own[1:]))
            rows.append(attend(own[0], *both, mask=F.pad(seen[i], (prefix.key.shape[1], 0), value=True)))
        else:
            added = attend(own[0], prefix.key[None], prefix.value[None])
            rows.append(attend(*own, mask=seen[i]) + prefix.gate[:, None, None] * added)
    return layer.o_proj(torch.cat(rows).transpose(1, 2).flatten(2))


def assert_same(layer, fast, slow, *inputs):
    """Outputs and the gradients of inputs and parameters, in float64: the two round in places of their own."""
    inputs = [t.requires_grad_() for t in inputs]
    wanted = [*inputs, *layer.parameters()]
    results = []
    for fn in (fast, slow):
        y = fn(*inputs)
        grads = torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y), allow_unused=True)
        results.append([y, *(torch.zeros(()) if grad is None else grad for grad in grads)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def causal(t, t_k):
    return torch.ones(t, t_k, dtype=torch.bool, device=DEVICE).tril(t_k - t)


@over_layers
def test_attention_equals_concatenation(options):
    layer = randomised(PrefixAttention(D, H, p=P, **options))
    x = rand(B, T, D)
    assert_same(layer, layer, lambda x: plain(layer, x), x)
    seen = causal(T, T).expand(B, 1, T, T)
    assert_same(layer, lambda x: layer(x, is_causal=True), lambda x: plain(layer, x, seen=seen), x)


def calls():
    lengths = integers(7, 1, 4)
    own = lambda t_k: torch.arange(t_k, device=DEVICE)  # noqa: E731
    right, left = own(T) < lengths[:, None, None, None], own(T) >= 7 - lengths[:, None, None, None]
    some = torch.rand(B, 1, T, S, device=DEVICE) < 0.7
    return {
        "lengths": ({"key_lengths": lengths}, {"seen": right.expand(B, 1, T, T)}),
        "left-padding": ({"is_causal": True, "attn_mask": left}, {"seen": left & causal(T, T)}),
        "context": ({"context": rand(B, S, D), "attn_mask": some}, {"seen": some}),
        "past": ({"is_causal": True, "past": True}, {"seen": causal(T, S + T).expand(B, 1, T, S + T), "past": True}),
    }


@pytest.mark.parametrize("call", ["lengths", "left-padding", "context", "past"])
@pytest.mark.parametrize("options", [LAYERS["grouped"], LAYERS["per-head-gate"]], ids=["prefix", "gate"])
def test_masks_context_and_past(options, call):
    layer = randomised(PrefixAttention(D, H, p=P, **options))
    fast, slow = calls()[call]
    past = {"past": (rand(B, 2, S, D // H), rand(B, 2, S, D // H))} if "past" in fast else {}
    if "context" in fast:
        slow = {**slow, "context": fast["context"]}
    assert_same(layer, lambda x: layer(x, **{**fast, **past}), lambda x: plain(layer, x, **{**slow, **past}), rand(B, T, D))


@over_layers
def test_decoding_with_a_cache(options):
    layer = randomised(PrefixAttention(D, H, p=P, **options))
    x = rand(B, T, D)
    y, past = layer(x[:, :3], is_causal=True, use_cache=True)
    steps = [y]
    for i in range(3, T):
        y, past = layer(x[:, i : i + 1], is_causal=True, past=past, use_cache=True)
        steps.append(y)
    assert past[0].shape == (B, layer.h_kv, T, layer.e)
    torch.testing.assert_close(torch.cat(steps, 1), layer(x, is_causal=True))


def test_names_switch_at_run_time():
    layer = randomised(PrefixAttention(D, H, 2))
    assert layer.names == [] and layer.active is None
    x = rand(B, T, D)
    without = layer(x)
    torch.testing.assert_close(without, plain(layer, x, prefixes=[None] * B))
    first, second = layer.add("first", P), layer.add("second", PrefixEncoder(2, 3, D // H, h=H, dtype=torch.float64))
    assert torch.equal(layer(x), without)
    for name, encoder in (("first", first), ("second", second)):
        layer.activate(name)
        torch.testing.assert_close(layer(x), plain(layer, x, prefixes=[encoder()[0]] * B))
    assert layer.remove("second") is second and layer.active is None and layer.names == ["first"]
    assert torch.equal(layer(x), without)
    layer.activate("first")
    layer.activate(None)
    assert torch.equal(layer(x), without)
    assert [name for name in layer.state_dict() if "prefix" in name] == ["prefixes.first.prefix"]


@pytest.mark.parametrize(
    "options", [{"h_kv": 2}, {"gate": "per_head"}, {"gate": "scalar", "h_kv": 2}], ids=["prefix", "per-head", "scalar"]
)
def test_every_row_has_its_own_prefix(options):
    layer = PrefixAttention(D, H, **options)
    layer.add("a", P)
    layer.add("b", P, hidden=6)
    layer = randomised(layer)
    names = ["b", None, "a"]
    ids = layer.ids(names)
    assert ids.tolist() == [1, -1, 0]

    def slow(x):
        return plain(layer, x, prefixes=[None if name is None else layer.prefixes[name]()[0] for name in names])

    assert_same(layer, lambda x: layer(x, adapter_ids=ids), slow, rand(B, T, D))


def test_one_encoder_for_several_layers():
    """Deep prefixes: the encoder runs once, and its gradient is that of the concatenated prefixes."""
    layers = randomised(nn.ModuleList(PrefixAttention(D, H, 2) for _ in range(3)))
    encoder = layers.encoder = randomised(PrefixEncoder(2, P, D // H, 3, hidden=6, h=H, gate="per_head"))
    runs = []
    encoder.hidden.register_forward_hook(lambda module, args, y: runs.append(args[0].shape))

    def deep(attend):
        def call(x):
            for layer, prefix in zip(layers, encoder()):
                x = x + attend(layer, x, prefix)
            return x

        return call

    fast = deep(lambda layer, x, prefix: layer(x, prefix=prefix))
    assert_same(layers, fast, deep(lambda layer, x, prefix: plain(layer, x, prefixes=[prefix] * B)), rand(B, T, D))
    assert runs == [(P, 2 * D // H)] * 2  # one a pass, and of p rows, not b * p


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_reparametrisation(dropout):
    encoder = randomised(PrefixEncoder(2, P, 8, 3, hidden=6, width=10, dropout=dropout)).eval()
    assert list(encoder.state_dict()) == ["embedding.weight", "hidden.weight", "hidden.bias", "output.weight", "output.bias"]
    hidden = torch.tanh(encoder.embedding.weight @ encoder.hidden.weight.T + encoder.hidden.bias)
    flat = (hidden @ encoder.output.weight.T + encoder.output.bias).view(P, 3, 2, 2, 8)
    before = encoder()
    for i, (key, value, gate, ids, _) in enumerate(before):
        torch.testing.assert_close(key, flat[:, i, 0].transpose(0, 1))
        torch.testing.assert_close(value, flat[:, i, 1].transpose(0, 1))
        assert gate is None and ids is None
    trained = torch.cat([t.flatten() for prefix in encoder.train()() for t in prefix[:2]])
    assert bool((trained == 0).any()) == bool(dropout)
    assert encoder.flatten() is encoder and list(encoder.state_dict()) == ["prefix"] and encoder.prefix.requires_grad
    for ours, theirs in zip(before, encoder.eval()()):
        assert torch.equal(ours.key, theirs.key) and torch.equal(ours.value, theirs.value)
    fresh = PrefixEncoder(2, P, 8, 3, dtype=torch.float64, device=DEVICE)
    fresh.load_state_dict(encoder.state_dict())
    assert torch.equal(fresh()[2].value, before[2].value)


def test_prefixes_are_those_of_peft():
    """The flat prompt that peft saves is the prefix here, of ``(p, layers, 2, h_kv, e)``."""
    pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")
    from peft import PrefixEncoder as Theirs
    from peft import PrefixTuningConfig

    config = PrefixTuningConfig(
        peft_type="PREFIX_TUNING", num_virtual_tokens=P, token_dim=16, num_transformer_submodules=1, num_attention_heads=2,
        num_layers=3, encoder_hidden_size=6, prefix_projection=True,
    )  # fmt: skip
    theirs, ours = Theirs(config), PrefixEncoder(2, P, 8, 3, hidden=6)
    pairs = {"embedding": theirs.embedding, "hidden": theirs.transform[0], "output": theirs.transform[2]}
    ours.load_state_dict({f"{name}.{key}": t for name, layer in pairs.items() for key, t in layer.state_dict().items()})
    past = theirs(torch.arange(P)[None]).view(1, P, 6, 2, 8).permute(2, 0, 3, 1, 4).split(2)
    for (key, value, *_), pair in zip(ours(), past, strict=True):
        assert torch.equal(key, pair[0, 0]) and torch.equal(value, pair[1, 0])


@pytest.mark.parametrize("gate", ["per_head", "scalar"])
def test_a_new_gate_changes_nothing_and_learns(gate):
    layer = PrefixAttention(D, H, 2, p=P, gate=gate, device=DEVICE)
    x = rand(B, T, D, dtype=torch.float32)
    y = layer(x)
    layer.activate(None)
    assert torch.equal(y, layer(x))
    gates = layer.prefixes["default"].gate
    assert gates.shape == (1, H if gate == "per_head" else 1)
    y.square().sum().backward()
    assert gates.grad.abs().min() > 0 and layer.prefixes["default"].prefix.grad.abs().max() == 0


def test_float32_prefix_under_16_bits_and_autocast():
    layer = randomised(PrefixAttention(D, H, 2, p=P), torch.float32)
    x = rand(B, T, D, dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, reference = layer(x), plain(layer, x)
    assert y.dtype == torch.bfloat16
    assert_within_reference_error(y, reference, plain(copy.deepcopy(layer).double(), x.double()), "autocast")
    cast, x = copy.deepcopy(layer).bfloat16(), x.bfloat16()
    cast.prefixes.float()
    z = cast(x)
    assert_within_reference_error(z, plain(cast, x), plain(copy.deepcopy(cast).double(), x.double()), "bfloat16")
    z.sum().backward()
    assert cast.prefixes["default"].prefix.grad.dtype == torch.float32


def test_dropout_of_the_weights_and_checkpointing():
    layer = randomised(PrefixAttention(D, H, 2, p=P, dropout=0.5))
    x = rand(B, T, D)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        y = call(x)
        grads.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    for kept, replayed in zip(*grads):
        assert torch.equal(kept, replayed)


def test_compiles_without_graph_break():
    layer = randomised(PrefixAttention(D, H, 2, gate="scalar"), torch.float32)
    layer.add("a", P)
    layer.add("b", P, hidden=6)
    layer = randomised(layer, torch.float32)
    layer.activate("b")
    x, ids = rand(B, T, D, dtype=torch.float32), layer.ids(["b", None, "a"])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for call in ({"is_causal": True}, {"adapter_ids": ids}):
        eager, traced = (
            [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()), allow_unused=True)]
            for y in (layer(x, **call), compiled(x, **call))
        )
        for ours, theirs in zip(traced, eager):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs)


def test_freeze_except_prefixes():
    layer = PrefixAttention(D, H, p=P, gate="per_head")
    assert list(freeze_except(layer, "prefix")) == ["prefixes.default.prefix", "prefixes.default.gate"]
    layer(torch.randn(B, T, D)).sum().backward()
    assert layer.q_proj.weight.grad is None and layer.prefixes["default"].gate.grad is not None


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: PrefixEncoder(2, 0, 8), ValueError, "p must be at least 1, got 0"),
        (lambda: PrefixEncoder(2, 3, 8, hidden=1.5), TypeError, "hidden must be an integer, got float"),
        (lambda: PrefixEncoder(2, 3, 8, gate="tanh"), ValueError, r"gate must be one of \(None, .*\), got 'tanh'"),
        (lambda: PrefixEncoder(2, 3, 8, dropout=1), ValueError, r"dropout must be a number in \[0, 1\), got 1"),
        (lambda: PrefixAttention(30, 4), ValueError, "d must be a multiple of h = 4 where e is None, got 30"),
        (lambda: PrefixAttention(32, 4, 3), ValueError, "h_kv must divide h = 4, got 3"),
        (lambda: PrefixAttention(32, 4, backend="fast"), ValueError, "backend must be one of .*, got 'fast'"),
        (lambda: PrefixAttention(32, 4).activate("a"), ValueError, r"name must be one of \[\], got 'a'"),
        (lambda: PrefixAttention(32, 4, p=3).add("default", 3), ValueError, "name must be a new one, got 'default'"),
        (lambda: PrefixAttention(32, 4).remove("a"), ValueError, r"name must be one of \[\], got 'a'"),
        (lambda: PrefixAttention(32, 4, p=3).ids(["a"]), ValueError, r"name must be one of \['default'\], got 'a'"),
        (
            lambda: PrefixAttention(32, 4).add("a", PrefixEncoder(2, 3, 8)),
            ValueError,
            r"prefix must have \(h_kv, e, layers, h\) = \(4, 8, 1, 4\), got \(2, 8, 1, 2\)",
        ),
        (lambda: PrefixAttention(32, 4)(torch.zeros(2, 3, 31)), ValueError, r"x must be \(b, t, 32\), got \(2, 3, 31\)"),
        (
            lambda: PrefixAttention(32, 4)(torch.zeros(2, 3, 32), adapter_ids=torch.zeros(2, dtype=torch.int64)),
            ValueError,
            "adapter_ids need prefixes, got none",
        ),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_banks_refuse_what_they_cannot_hold():
    ids, x = torch.tensor([0, 1]), torch.zeros(2, 3, D)
    layer = PrefixAttention(D, H, p=3)
    layer.add("longer", 4)
    with pytest.raises(ValueError, match="prefixes of one length"):
        layer(x, adapter_ids=ids)
    layer = PrefixAttention(D, H, 2, p=3, gate="per_head")
    with pytest.raises(ValueError, match="adapter_ids need gate='scalar' or h_kv = h = 4"):
        layer(x, adapter_ids=ids)
