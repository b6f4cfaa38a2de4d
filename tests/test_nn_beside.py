"""What stands in the place of a frozen layer, in a model that was not made for it."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn

from fastadapt.nn import (
    KronALinear,
    LoRABank,
    LoRALinear,
    LoRAMultiheadAttention,
    PrefixMultiheadAttention,
    attach,
    route,
)  # fmt: skip

from .battery import DEVICE

D = 16
IDS = torch.tensor([0, -1, 1], device=DEVICE)


def bank(base):
    made = LoRABank(base, 2, 4)
    for _ in range(2):
        made.add(LoRALinear(base, 4))
    return made


AROUND = {"lora": lambda base: LoRALinear(base, 4), "kron": KronALinear, "bank": bank}
over_kinds = pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)


@over_kinds
@pytest.mark.parametrize("place", ["linear1", "linear2"])
def test_encoder_layers_run_it_in_evaluation(around, place):
    """Without gradients PyTorch has one function of the weights for a whole layer."""
    layer = nn.TransformerEncoderLayer(D, 2, 24, dropout=0.0, batch_first=True, device=DEVICE)
    frozen, x = copy.deepcopy(layer).eval(), torch.randn(3, 5, D, device=DEVICE)
    setattr(layer, place, around(getattr(layer, place)))
    for name, parameter in layer.named_parameters():
        if any(part in name for part in ("lora_A", "lora_B", "kron.")):
            nn.init.normal_(parameter, std=0.3)
    layer.eval()
    routed = route if around is bank else lambda model, ids: contextlib.nullcontext()
    with routed(layer, IDS):
        expected = layer(x).detach()
    for copied in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad(), routed(copied, IDS):
            y, without = copied(x), frozen(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(y, without, atol=1e-2)


OF_ATTENTION = {"lora-attention": LoRAMultiheadAttention, "prefix-attention": lambda base: PrefixMultiheadAttention(base, 2)}


@pytest.mark.parametrize("kind", [*AROUND, *OF_ATTENTION])
def test_layers_with_hooks_are_refused(kind):
    """It would not call the layer, and lose what they do."""
    around = {**AROUND, **OF_ATTENTION}[kind]
    make = (lambda: nn.MultiheadAttention(D, 2)) if kind in OF_ATTENTION else (lambda: nn.Linear(D, D))
    around(make())
    hooked = [make() for _ in range(4)]
    for base, register in zip(hooked, ("forward", "forward_pre", "full_backward", "full_backward_pre")):
        getattr(base, f"register_{register}_hook")(lambda *call: None)
    adapted = nn.Sequential(make())
    attach(adapted, "bottleneck", targets="0", r=2)
    for base in (*hooked, adapted[0]):
        with pytest.raises(ValueError, match=f"base must have no hooks, .* got a {type(base).__name__} with hooks"):
            around(base)
        assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("kind", [*AROUND, *OF_ATTENTION])
def test_layers_with_a_forward_of_their_own_are_refused(kind):
    """But for the class's, which hooks leave behind, and the one that moves inputs to the layer's device."""
    hooks = pytest.importorskip("accelerate.hooks")
    around = {**AROUND, **OF_ATTENTION}[kind]
    base = nn.MultiheadAttention(D, 2, device=DEVICE) if kind in OF_ATTENTION else nn.Linear(D, D, device=DEVICE)
    bound, base.forward = base.forward, lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=f"base must have the forward of its class, got a {type(base).__name__} with one that"):
        around(base)
    assert all(p.requires_grad for p in base.parameters())
    base.forward = bound
    around(base)
    around(hooks.add_hook_to_module(base, hooks.AlignDevicesHook(execution_device=DEVICE)))


@over_kinds
def test_a_weight_that_is_assigned_is_that_of_the_base(around):
    layer, x = around(nn.Linear(D, D, device=DEVICE)), torch.randn(3, D, device=DEVICE)
    weight, bias = nn.Parameter(torch.randn(D, D, device=DEVICE)), nn.Parameter(torch.randn(D, device=DEVICE))
    layer.weight, layer.bias = weight, bias
    assert layer.weight is layer.base.weight is weight and layer.bias is layer.base.bias is bias
    assert not {"weight", "bias"} & layer.state_dict().keys()
    y = layer(x, adapter_ids=IDS) if around is bank else layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, weight, bias))
    if around is not bank:
        layer.merge()
        with pytest.raises(RuntimeError, match="weight: unmerge the adapter first"):
            layer.weight = weight
        layer.unmerge()
        assert layer.weight is weight


@pytest.mark.parametrize("around", [AROUND["lora"], KronALinear])
def test_a_parametrized_weight_is_not_merged(around):
    base = nn.utils.parametrizations.weight_norm(nn.Linear(D, D, device=DEVICE))
    layer, x = around(base), torch.randn(3, D, device=DEVICE)
    for parameter in (*layer.lora_B.parameters(),) if around is not KronALinear else (layer.kron.b,):
        nn.init.normal_(parameter)
    y = layer(x)
    assert not torch.equal(y, base(x))
    with pytest.raises(RuntimeError, match="merge: base must have its weight as a parameter"):
        layer.merge()
    assert not layer.merged and torch.equal(layer(x), y)
