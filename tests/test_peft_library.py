"""LoRA layers of the library ``peft`` against the modules here with the same weights."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from fastadapt.nn import LoRAEmbedding, LoRALinear

from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .modules import pooled

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")

from transformers.pytorch_utils import Conv1D  # noqa: E402

K, N, R, VOCAB = 40, 24, 6, 50
BASES = {
    "linear": lambda: nn.Linear(K, N),
    "linear-no-bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": lambda: Conv1D(N, K),
    "embedding": lambda: nn.Embedding(VOCAB, N, padding_idx=3),
}
# base, options of ours, options of theirs
CASES = {
    "lora": ("linear", {}, {}),
    "no-bias": ("linear-no-bias", {}, {}),
    "rslora": ("linear", {"rslora": True}, {"use_rslora": True}),
    "lora-bias": ("linear", {"lora_bias": True}, {"lora_bias": True}),
    "dora": ("linear", {"dora": True}, {"use_dora": True}),
    "dora-no-bias": ("linear-no-bias", {"dora": True, "rslora": True}, {"use_dora": True, "use_rslora": True}),
    "conv1d": ("conv1d", {}, {"fan_in_fan_out": True}),
    "conv1d-dora": ("conv1d", {"dora": True}, {"use_dora": True, "fan_in_fan_out": True}),
    "embedding": ("embedding", {}, {}),
}
over_cases = pytest.mark.parametrize("base, ours, theirs", CASES.values(), ids=CASES)


def parameters_of(layer):
    """The adapter's parameters of a layer of peft or of ours, under our names."""
    if isinstance(layer, LoRALinear | LoRAEmbedding):
        return {name: p for name, p in layer.named_parameters() if not name.startswith("base.")}
    found = {}
    for name, p in layer.named_parameters():
        if not name.startswith("base_layer."):
            name = name.replace("lora_embedding_", "lora_").replace("lora_magnitude_vector", "magnitude")
            name = name.replace(".default", "")
            name = {"magnitude.weight": "magnitude", "lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}.get(name, name)
            found[name] = p
    return found


def build(base, ours, theirs):
    """A layer of peft with every parameter away from its start, and ours with the same weights."""
    model = nn.Sequential()
    model.target = BASES[base]()
    config = peft.LoraConfig(r=R, lora_alpha=9, lora_dropout=0.0, target_modules=["target"], **theirs)
    library = peft.get_peft_model(copy.deepcopy(model), config).base_model.model.target
    kind = LoRAEmbedding if base == "embedding" else LoRALinear
    layer = kind(model.target, R, alpha=9, **ours)
    mine, other = parameters_of(layer), parameters_of(library)
    assert set(mine) == set(other)
    with torch.no_grad():
        if "magnitude" in mine:
            torch.testing.assert_close(mine["magnitude"], other["magnitude"])
        for name, p in other.items():
            p.copy_(torch.randn(p.shape) * 0.3 + (1.0 if name == "magnitude" else 0.0))
            mine[name].copy_(p)
    return layer.to(DEVICE), library.to(DEVICE)


def outcome(layer, x, grad_y):
    """Output and gradients of the input and of the adapter."""
    wanted = parameters_of(layer)
    if x.is_floating_point():
        wanted = {"x": (x := x.clone().requires_grad_()), **wanted}
    y = layer(x)
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad_y.to(y.dtype))))}


def drawn(base, dtype=torch.float32):
    """Inputs and gradients of 16 draws; the error of one says little."""
    if base == "embedding":
        return torch.randint(VOCAB, (16, 5, 7), device=DEVICE), torch.randn(16, 5, 7, N, device=DEVICE).to(dtype)
    return torch.randn(16, 5, 7, K, device=DEVICE).to(dtype), torch.randn(16, 5, 7, N, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype, autocast", [("float32", False), ("bfloat16", False), ("float32", True)])
@over_cases
def test_equals_the_library(base, ours, theirs, dtype, autocast):
    """Our error against a float64 run of the library is at most twice its own."""
    layer, library = build(base, ours, theirs)
    dtype = getattr(torch, dtype)
    double = copy.deepcopy(library.to(dtype)).double()
    x, grad_y = drawn(base, dtype)
    oracle = pooled(partial(outcome, double), x.double() if x.is_floating_point() else x, grad_y.double())
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        expected, actual = (pooled(partial(outcome, module.to(dtype)), x, grad_y) for module in (library, layer))
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert value.any(), f"{name} has no part in the result"
        assert_within_reference_error(actual[name], value, oracle[name], name)


@over_cases
def test_merge_equals_the_library(base, ours, theirs):
    layer, library = build(base, ours, theirs)
    double = copy.deepcopy(library).double()
    before = layer.base.weight.detach().clone()
    for module in (layer, library, double):
        module.merge()
    for name, value in library.base_layer.named_parameters():
        oracle = double.base_layer.get_parameter(name)
        assert_within_reference_error(layer.base.get_parameter(name), value, oracle, name)
    layer.unmerge()
    assert torch.equal(layer.base.weight, before)
    library.unmerge()


def test_dropout_of_dora_differs_as_documented():
    """The library drops the input of the frozen product too; here that of the adapter alone."""
    layer, library = build("linear", {"dora": True}, {"use_dora": True})
    layer.dropout, library.lora_dropout["default"] = 0.5, nn.Dropout(0.5)
    x = torch.randn(3, K, device=DEVICE)
    with torch.no_grad():
        for module in (layer, library):  # without an adapter, and with a gain that isn't one
            parameters_of(module)["lora_B.weight"].zero_()
            parameters_of(module)["magnitude"].mul_(2)
        torch.testing.assert_close(layer.train()(x), layer.eval()(x))
        assert not torch.allclose(library.train()(x), library.eval()(x))
