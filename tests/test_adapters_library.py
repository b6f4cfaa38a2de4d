"""Bottleneck adapters of the library ``adapters``, weights and wiring its own, against the modules built from them."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .modules import pooled

adapters = pytest.importorskip("adapters", reason="the library adapters is not installed (pip install fastadapt[peers])")

from transformers import BertConfig, BertModel  # noqa: E402

from fastadapt.integrations.adapters import from_adapters, to_adapters  # noqa: E402

D = 48


def norm(sublayer, h):
    """The transformer's own LayerNorm after a sublayer, in ordinary PyTorch."""
    layer_norm = sublayer.LayerNorm
    return F.layer_norm(h, (D,), layer_norm.weight, layer_norm.bias, layer_norm.eps)


# What each configuration does with h, the output of a sublayer, and res, its input: the library writes it as flags.
def sequential(sublayer, adapter, h, res):
    return norm(sublayer, adapter(norm(sublayer, h + res), h) + res)


def double_sequential(sublayer, adapter, h, res):
    return norm(sublayer, adapter(h) + res)


def parallel(sublayer, adapter, h, res):
    return norm(sublayer, adapter(res, h) + res)


def adapter_plus(sublayer, adapter, h, res):
    return adapter(norm(sublayer, h + res))


def after_the_sum(sublayer, adapter, h, res):
    return norm(sublayer, adapter(norm(sublayer, h + res), h + res) + res)


def plus(**options):
    # Stochastic depth draws at random, and needs torchvision.
    return adapters.AdapterPlusConfig(**{"stochastic_depth": 0.0, "reduction_factor": 8, **options})


CASES = {
    "SeqBn": (lambda: adapters.SeqBnConfig(), "output", sequential),
    "SeqBn-ln-gelu": (lambda: adapters.SeqBnConfig(ln_before=True, non_linearity="gelu"), "output", sequential),
    "SeqBn-scaled": (lambda: adapters.SeqBnConfig(scaling="learned", non_linearity="gelu_new"), "output", sequential),
    "SeqBn-post-add": (lambda: adapters.SeqBnConfig(residual_before_ln="post_add"), "output", after_the_sum),
    "DoubleSeqBn-attention": (lambda: adapters.DoubleSeqBnConfig(), "attention.output", double_sequential),
    "DoubleSeqBn-output": (lambda: adapters.DoubleSeqBnConfig(reduction_factor=3), "output", double_sequential),
    "DoubleSeqBn-tanh": (lambda: adapters.DoubleSeqBnConfig(non_linearity="tanh"), "output", double_sequential),
    "ParBn": (lambda: adapters.ParBnConfig(), "output", parallel),
    "ParBn-learned": (lambda: adapters.ParBnConfig(scaling="learned", ln_before=True), "output", parallel),
    "ParBn-channel": (lambda: adapters.ParBnConfig(scaling="channel"), "output", parallel),
    "AdapterPlus": (plus, "output", adapter_plus),
    "AdapterPlus-attention": (lambda: plus(mh_adapter=True, reduction_factor=96), "attention.output", adapter_plus),
}


def build(config):
    """A small BERT with one adapter, every parameter of it away from its start."""
    sizes = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    model = BertModel(BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    adapters.init(model)
    model.add_adapter("task", config=config)
    model.set_active_adapters("task")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name or "LayerNorm" in name:
                spread, middle = 0.5 if parameter.dim() == 1 else 0.3, 1.0 if "Norm.weight" in name else 0.0
                parameter.copy_(torch.randn(parameter.shape) * spread + middle)
    return model.to(DEVICE)


def sublayer_of(model, path):
    return model.encoder.layer[0].get_submodule(path)


def their_names(module):
    """Our parameter names for those of the library."""
    down = 1 if module.add_layer_norm_before else 0
    table = {f"adapter_down.{down}": "down", "adapter_up": "up", "adapter_norm_before": "norm", "scaling": "scale"}
    names = {}
    for name, _ in module.named_parameters():
        stem = next(stem for stem in table if name == stem or name.startswith(stem + "."))
        names[name] = table[stem] + name[len(stem) :]
    return names


def outcome(forward, sublayer, parameters, h, res, grad_y):
    """Output and gradients: of the inputs, of the transformer's LayerNorm, of each parameter of the adapter."""
    h, res = (t.detach().clone().requires_grad_() for t in (h, res))
    layer_norm = {f"LayerNorm.{name}": p for name, p in sublayer.LayerNorm.named_parameters()}
    wanted = {"h": h, "res": res, **layer_norm, **parameters}
    y = forward(h, res)
    grads = torch.autograd.grad(y, list(wanted.values()), grad_y.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads))}


def theirs(model, path, *inputs):
    sublayer = sublayer_of(model, path)
    module = sublayer.adapters["task"]
    names = their_names(module)
    parameters = {names[name]: p for name, p in module.named_parameters()}
    forward = lambda h, res: sublayer.bottleneck_layer_forward(h, res, sublayer.LayerNorm)  # noqa: E731
    return pooled(partial(outcome, forward, sublayer, parameters), *inputs)


def ours(model, path, wiring, *inputs):
    sublayer = sublayer_of(model, path)
    adapter = from_adapters(sublayer.adapters["task"])
    forward = lambda h, res: wiring(sublayer, adapter, h, res)  # noqa: E731
    return pooled(partial(outcome, forward, sublayer, dict(adapter.named_parameters())), *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config, path, wiring", CASES.values(), ids=CASES)
def test_equals_the_library(config, path, wiring, dtype):
    """The whole of what follows a sublayer: our error against a float64 run of the library is at most twice its own."""
    model = build(config()).to(dtype)
    h, res, grad_y = torch.randn(3, 16, 3, 7, D, device=DEVICE).to(dtype)  # inputs and gradients of 16 draws
    oracle = theirs(copy.deepcopy(model).double(), path, h.double(), res.double(), grad_y.double())
    library, result = theirs(model, path, h, res, grad_y), ours(model, path, wiring, h, res, grad_y)
    assert set(result) == set(library)
    for name in library:
        assert library[name].any(), f"{name} has no part in the result"
        assert_within_reference_error(result[name], library[name], oracle[name], name)


@pytest.mark.parametrize("config, path, wiring", CASES.values(), ids=CASES)
def test_round_trip(config, path, wiring):
    """Weights go there and back without a change, and the library saves and loads what came back."""
    model = build(config())
    module = sublayer_of(model, path).adapters["task"]
    before = copy.deepcopy(module.state_dict())
    adapter = from_adapters(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert adapter.up.weight.any()  # a copy, not a view
    to_adapters(adapter, module)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_the_library_loads_what_was_trained_here(tmp_path):
    model = build(adapters.SeqBnConfig())
    module = sublayer_of(model, "output").adapters["task"]
    adapter = from_adapters(module)
    with torch.no_grad():
        adapter.up.weight.add_(1.0)
    to_adapters(adapter, module)
    model.save_adapter(str(tmp_path), "task", use_safetensors=True)
    other = copy.deepcopy(model)
    other.delete_adapter("task")
    other.load_adapter(str(tmp_path), load_as="task", use_safetensors=True)
    loaded = from_adapters(sublayer_of(other, "output").adapters["task"])
    assert all(torch.equal(t, adapter.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_keeps_what_is_frozen_and_where_it_lives():
    module = sublayer_of(build(adapters.SeqBnConfig()), "output").adapters["task"].to(torch.float64).eval()
    module.adapter_down.requires_grad_(False)
    adapter = from_adapters(module)
    assert not adapter.down.weight.requires_grad and adapter.up.weight.requires_grad
    assert adapter.up.weight.dtype == torch.float64 and not adapter.training


def test_dropout_counts_in_training_only():
    module = sublayer_of(build(adapters.SeqBnConfig(dropout=0.1)), "output").adapters["task"]
    with pytest.raises(ValueError, match="module must have dropout=0.0 in training mode, got 0.1"):
        from_adapters(module.train())
    x, residual = torch.randn(2, 3, 5, D, device=DEVICE)
    torch.testing.assert_close(from_adapters(module.eval())(x, residual), module(x, residual)[0])


BAD = {
    "gating": (lambda: adapters.SeqBnConfig(use_gating=True), "use_gating=False, got True"),
    "norm-after": (lambda: adapters.SeqBnConfig(ln_after=True), "ln_after=False, got True"),
    "activation": (lambda: adapters.SeqBnConfig(non_linearity="relu6"), "an activation among .*got ReLU6"),
}


@pytest.mark.parametrize("config, message", BAD.values(), ids=BAD)
def test_refuses_what_it_cannot_compute(config, message):
    with pytest.raises(ValueError, match=f"module must have {message}"):
        from_adapters(sublayer_of(build(config()), "output").adapters["task"])


def test_refuses_strangers():
    with pytest.raises(TypeError, match="module must be an adapters.methods.modeling.Adapter, got Linear"):
        from_adapters(torch.nn.Linear(3, 3))
    module = sublayer_of(build(adapters.SeqBnConfig()), "output").adapters["task"]
    other = sublayer_of(build(adapters.SeqBnConfig(reduction_factor=4)), "output").adapters["task"]
    with pytest.raises(ValueError, match=r"shapes of module, got \(12, 48\) for \(3, 48\)"):
        to_adapters(from_adapters(other), module)
    with pytest.raises(ValueError, match="adapter must have activation='relu' like module, got 'silu'"):
        to_adapters(from_adapters(sublayer_of(build(adapters.DoubleSeqBnConfig()), "output").adapters["task"]), module)
