"""A prefix in PyTorch's attention: what the formula says, called as nn.MultiheadAttention is."""

import copy

import pytest
import torch
from torch import nn

from fastadapt.nn import PrefixMultiheadAttention, attach, drop_adapters, freeze_except

from .battery import DEVICE

D, H, P, B, T, S = 16, 2, 3, 3, 5, 4


def formula(module, query, key, value, blocked):
    """Keys and values with the prefix in front; ``blocked`` ``(b, t, s)`` are the own keys that aren't seen."""
    base, count = module.base, query.shape[0]
    projected = []
    biases = (None,) * 3 if base.in_proj_bias is None else base.in_proj_bias.chunk(3)
    for x, w, b in zip((query, key, value), base.in_proj_weight.chunk(3), biases):
        projected.append(nn.functional.linear(x, w, b).unflatten(-1, (H, -1)).transpose(1, 2))
    q, k, v = projected
    prefix = module.encoder()[0]
    own = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(blocked[:, None], float("-inf"))
    first = q @ prefix.key.expand(count, -1, -1, -1).mT * q.shape[-1] ** -0.5
    if prefix.gate is None:
        weights = torch.cat([first, own], -1).softmax(-1)
        y = weights @ torch.cat([prefix.value.expand(count, -1, -1, -1), v], 2)
    else:
        y = own.softmax(-1) @ v + prefix.gate[:, None, None] * (first.softmax(-1) @ prefix.value)
    return nn.functional.linear(y.transpose(1, 2).flatten(2), base.out_proj.weight, base.out_proj.bias)


@pytest.mark.parametrize("options", [{}, {"bias": False, "batch_first": False}], ids=["batch-first", "no-bias-time-first"])
@pytest.mark.parametrize("gate", [None, "per_head"])
@pytest.mark.parametrize("masked", ["none", "padding", "causal", "causal-padding", "across", "causal-across"])
def test_equals_the_formula(options, gate, masked):
    options = {"batch_first": True, **options}
    module = PrefixMultiheadAttention(nn.MultiheadAttention(D, H, **options), P, gate=gate).to(DEVICE, torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    shapes = [(B, T, D)] if "across" not in masked else [(B, T, D), (B, S, D)]
    sources = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in shapes]
    blocked, call = torch.zeros(B, T, shapes[-1][1], dtype=torch.bool, device=DEVICE), {}
    if "causal" in masked:
        call |= {"attn_mask": torch.ones_like(blocked[0]).triu(1), "is_causal": True}
        blocked |= call["attn_mask"]
    if "padding" in masked:
        call["key_padding_mask"] = torch.arange(T, device=DEVICE) >= torch.tensor([[T], [3], [4]], device=DEVICE)
        blocked |= call["key_padding_mask"][:, None]

    def values(fused):
        inputs = [t.clone().requires_grad_() for t in sources]
        q, k = inputs[0], inputs[-1]
        if not fused:
            y = formula(module, q, k, k, blocked)
        elif options["batch_first"]:
            y, _ = module(q, k, k, **call)
        else:
            first = q.transpose(0, 1)
            second = first if k is q else k.transpose(0, 1)
            y = module(first, second, second, **call)[0].transpose(0, 1)
        wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
        return [y, *torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y))]

    assert not any(p.requires_grad for p in module.base.parameters())
    actual, expected = values(True), values(False)
    assert len(actual) == 1 + len(shapes) + (1 if gate is None else 2)
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_attached_to_an_encoder(causal):
    layer = nn.TransformerEncoderLayer(D, H, 24, dropout=0.0, batch_first=True, device=DEVICE)
    model = nn.TransformerEncoder(layer, 2)
    bare, x = copy.deepcopy(model), torch.randn(B, T, D, device=DEVICE)
    mask = torch.ones(T, T, dtype=torch.bool, device=DEVICE).triu(1) if causal else None
    padding = torch.arange(T, device=DEVICE) >= torch.tensor([[T], [3], [4]], device=DEVICE)
    before = bare(x, mask, padding)
    assert attach(model, "prefix", p=P, gate="scalar") == ["layers.0.self_attn", "layers.1.self_attn"]
    torch.testing.assert_close(model(x, mask, padding), before)
    with torch.no_grad():
        for module in model.layers:
            module.self_attn.encoder.gate.fill_(0.5)
    y = model(x, mask, padding)
    own = [f"layers.{i}.self_attn.encoder.{name}" for i in range(2) for name in ("prefix", "gate")]
    assert list(freeze_except(model, "prefix")) == own
    y.sum().backward()
    with torch.no_grad():
        assert torch.equal(model.eval()(x, mask, padding)[~padding], y[~padding]) and not torch.allclose(y, before, atol=1e-2)
    with drop_adapters(model, 2):
        torch.testing.assert_close(model(x, mask, padding)[~padding], before[~padding], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="targets must have no adapter yet, got 'layers.0.self_attn'"):
        attach(model, "mam", p=P, r=4)
    assert attach(model, "parallel", r=4) == [f"layers.{i}.linear2.attached" for i in range(2)]


def test_bad_input():
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 8}):
        with pytest.raises(ValueError, match="base must have add_bias_kv=False, add_zero_attn=False, and kdim"):
            PrefixMultiheadAttention(nn.MultiheadAttention(D, H, **options), P)
    with pytest.raises(TypeError, match="base must be a torch.nn.MultiheadAttention, got Linear"):
        PrefixMultiheadAttention(nn.Linear(D, D), P)
    base = nn.MultiheadAttention(D, H, batch_first=True)
    with pytest.raises(ValueError, match="backend must be one of"):
        PrefixMultiheadAttention(base, P, backend="cuda")
    assert base.in_proj_weight.requires_grad
    module, x = PrefixMultiheadAttention(base, P), torch.randn(B, T, D)
    for args, options, message in (
        ((x, x, x), {"need_weights": True}, "need_weights must be False for attention with a prefix"),
        ((x[0], x[0], x[0]), {}, "query, key and value must be 3-d and not nested, got 2, 2, 2"),
        ((x, x, x), {"is_causal": True}, "attn_mask must be the causal mask with is_causal=True, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            module(*args, **options)
