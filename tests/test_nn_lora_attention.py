"""LoRAMultiheadAttention against its base with the updates added to its weights."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fastadapt.nn import LoRAMultiheadAttention

from .battery import DEVICE
from .test_nn_lora import HEADS, E, R, randomised

SELF, CROSS = (0, 0, 0), (0, 1, 1)
OTHERS = (0, 1, 2)
ATTENTION = {  # options of nn.MultiheadAttention, of ours, which of three inputs are q, k and v
    "self": ({}, {}, SELF),
    "batch-first": ({"batch_first": True}, {"rslora": True, "alpha": 2}, SELF),
    "all": ({"batch_first": True}, {"targets": ("q", "k", "v", "out")}, SELF),
    "k-out": ({"bias": False}, {"targets": ("out", "k")}, SELF),
    "cross": ({"batch_first": True}, {}, CROSS),
    "cross-k": ({}, {"targets": ("k",)}, CROSS),
    "apart": ({"batch_first": True}, {"targets": ("q", "k", "v")}, OTHERS),
    "widths": ({"batch_first": True, "kdim": 10, "vdim": 14}, {"targets": ("q", "k", "v")}, OTHERS),
}


def attention_with_delta(layer, *args, **kwargs):
    """``base`` with the updates added to its weights, differentiable."""
    delta = {name: layer.scale * layer.lora_B[name].weight @ layer.lora_A[name].weight for name in layer.targets}
    weights = dict(layer.base.named_parameters())
    if "out" in delta:
        weights["out_proj.weight"] = weights["out_proj.weight"] + delta["out"]
    if layer.base.in_proj_weight is None:
        weights |= {f"{n}_proj_weight": weights[f"{n}_proj_weight"] + delta[n] for n in "qkv" if n in delta}
    else:
        zeros = layer.base.in_proj_weight.new_zeros(E, E)
        weights["in_proj_weight"] = weights["in_proj_weight"] + torch.cat([delta.get(n, zeros) for n in "qkv"])
    return functional_call(layer.base, weights, args, kwargs)


def inputs_of(base, which, t=5, s=7, b=3, widths=(E, E, E)):
    shapes = [(b, length, width) if base.get("batch_first") else (length, b, width) for length, width in zip((t, s, s), widths)]
    tensors = [torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for shape in shapes]
    return tensors, [tensors[i] for i in which]


def assert_same_attention(layer, args, **kwargs):
    """Outputs, weights and gradients, in float64: the two round in places of their own."""
    wanted = [*{id(t): t for t in args}.values(), *(p for p in layer.parameters() if p.requires_grad)]
    results = []
    for fn in (layer, lambda *a, **k: attention_with_delta(layer, *a, **k)):
        y, weights = fn(*args, **kwargs)
        torch.manual_seed(5)
        results.append([y, weights, *torch.autograd.grad(y, wanted, torch.randn(y.shape).to(y))])
    for ours, theirs in zip(*results):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("base, ours, which", ATTENTION.values(), ids=ATTENTION)
def test_attention_equals_its_base_with_updated_weights(base, ours, which, need_weights):
    layer = randomised(LoRAMultiheadAttention(nn.MultiheadAttention(E, HEADS, **base), R, **ours)).double()
    tensors, args = inputs_of(base, which, widths=(E, base.get("kdim", E), base.get("vdim", E)))
    assert_same_attention(layer, args, need_weights=need_weights)
    unbatched = [t[0] if base.get("batch_first") else t[:, 0] for t in tensors]
    assert_same_attention(layer, [unbatched[i] for i in which], need_weights=need_weights)


def masks():
    causal = torch.triu(torch.ones(5, 5, dtype=torch.bool, device=DEVICE), 1)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool, device=DEVICE)
    minus = torch.where(causal, -torch.inf, 0.0).double()
    return {
        "causal": {"attn_mask": causal},
        "hint": {"attn_mask": causal, "is_causal": True},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
        "floating": {"attn_mask": minus, "key_padding_mask": torch.where(padding, -torch.inf, 0.0).double()},
        "heads": {"attn_mask": torch.randn(3 * HEADS, 5, 5, dtype=torch.float64, device=DEVICE)},
        "not-averaged": {"attn_mask": minus, "average_attn_weights": False},
    }


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", masks().values(), ids=masks())
def test_attention_masks(mask, need_weights):
    base = {"batch_first": True}
    layer = randomised(LoRAMultiheadAttention(nn.MultiheadAttention(E, HEADS, **base), R)).double()
    assert_same_attention(layer, inputs_of(base, SELF)[1], **mask, need_weights=need_weights)


def test_attention_starts_as_its_base_and_stands_in_for_it():
    """Also in evaluation, where the encoder layer has a fast path that would run the frozen weights alone."""
    encoder = nn.TransformerEncoderLayer(E, HEADS, 32, batch_first=True, device=DEVICE).eval()
    x = torch.randn(3, 5, E, device=DEVICE)
    plain = encoder(x)
    encoder.self_attn = LoRAMultiheadAttention(encoder.self_attn, R)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), plain)
        randomised(encoder.self_attn)
        adapted = encoder(x)
        assert not torch.allclose(adapted, plain)
        merged = copy.deepcopy(encoder)
        merged.self_attn.forward = lambda *a, **k: attention_with_delta(encoder.self_attn, *a, **k)
        torch.testing.assert_close(adapted, merged(x))
    keys = ["base.in_proj_weight", "base.out_proj.weight", "lora_A.q.weight", "lora_A.v.weight", "lora_B.q.weight"]
    assert set(keys) <= set(encoder.self_attn.state_dict())


def test_attention_dropout():
    layer = randomised(LoRAMultiheadAttention(nn.MultiheadAttention(E, HEADS, batch_first=True), R, dropout=0.5))
    x = torch.randn(3, 5, E, device=DEVICE)
    assert torch.equal(layer.eval()(x, x, x)[0], layer(x, x, x)[0])
    assert not torch.equal(layer.train()(x, x, x)[0], layer(x, x, x)[0])
    layer = randomised(LoRAMultiheadAttention(nn.MultiheadAttention(E, HEADS, dropout=0.5), R))
    for need_weights in (True, False):
        first, second = (layer(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"attn_mask": torch.zeros(5, 4)}, ValueError, r"attn_mask must be \(5, 5\) or \(12, 5, 5\), got \(5, 4\)"),
        ({"key_padding_mask": torch.zeros(5, 3)}, ValueError, r"key_padding_mask must be \(3, 5\), got \(5, 3\)"),
        ({"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, TypeError, "attn_mask must be bool or floating, got torch.int64"),
        ({"is_causal": True}, ValueError, "attn_mask must be the causal mask with is_causal=True, got None"),
        ({"key": torch.zeros(5, E)}, ValueError, "query, key and value must be all 2-d or all 3-d, got 3, 2, 3"),
    ],
)
def test_attention_refuses(change, error, message):
    layer = LoRAMultiheadAttention(nn.MultiheadAttention(E, HEADS, batch_first=True), R)
    x = torch.zeros(3, 5, E)
    with pytest.raises(error, match=message):
        layer(**{"query": x, "key": x, "value": x, **change})
    with pytest.raises(ValueError, match="query must not be nested"):
        layer(torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged), x, x)
