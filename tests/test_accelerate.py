"""Layers of ``peft`` accelerated in place against the same layers as they were: outputs, gradients, state, files."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import fastadapt
from fastadapt.ops import dropout

from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .modules import pooled, spied
from .test_peft_library import BASES, VOCAB, K, N, R

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")

from transformers.pytorch_utils import Conv1D  # noqa: E402

import fastadapt.integrations.peft as ours  # noqa: E402
from fastadapt.integrations import peft_lora  # noqa: E402

DORA, OTHER = {"use_dora": True}, {"r": 3, "lora_alpha": 2}
# base, options of each adapter; all of them are active
CASES = {
    "lora": ("linear", {}),
    "no-bias": ("linear-no-bias", {}),
    "rslora": ("linear", {"use_rslora": True}),
    "lora-bias": ("linear", {"lora_bias": True}),
    "dora": ("linear", DORA),
    "dora-no-bias": ("linear-no-bias", DORA),
    "dora-dropout": ("linear", {**DORA, "lora_dropout": 0.4}),
    "mica": ("linear", {"init_lora_weights": "mica"}),
    "conv1d": ("conv1d", {"fan_in_fan_out": True}),
    "conv1d-dora": ("conv1d", {**DORA, "fan_in_fan_out": True}),
    "same-scale": ("linear", {}, {}),
    "other-scale": ("linear", {}, OTHER, {"lora_bias": True}),
    "dora-lora": ("linear", DORA, OTHER),
    "lora-dora": ("linear", OTHER, DORA),
    "embedding": ("embedding", {}),
    "embedding-two": ("embedding", {}, OTHER),
    "embedding-dora": ("embedding", DORA),
}
over_cases = pytest.mark.parametrize("base, options", [(base, tuple(options)) for base, *options in CASES.values()], ids=CASES)


def config(**options):
    return peft.LoraConfig(**{"r": R, "lora_alpha": 9, "target_modules": ["target"], **options})


def randomised(model):
    """Every parameter of the adapters away from its start; their part in the output is a third to a half of the frozen one.

    The library keeps that part in float32 where the base has 16 bits. The larger it is, the less of that shows in its error:
    the gradient of a DoRA magnitude, which is summed from the output, would err less than one from an output in 16 bits.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D):
                p.normal_(std=0.1)  # as large as those of nn.Linear
            elif "lora_" in name:
                p.copy_(torch.randn(p.shape) * 0.1 + ("magnitude" in name))
    return model.to(DEVICE)


def build(base, *options, dtype=torch.float32):
    """A model of peft with one adapted layer and an adapter for each of ``options``, all active and trainable."""
    model = nn.Sequential()
    model.target = BASES[base]().to(dtype)
    names = [f"adapter{i}" for i in range(len(options))]
    model = peft.get_peft_model(model, config(**options[0]), adapter_name=names[0])
    for name, more in zip(names[1:], options[1:]):
        model.add_adapter(name, config(**more))
    model.base_model.set_adapter(names)
    return randomised(model)


def target(model):
    return model.base_model.model.target


def inputs(base, dtype=torch.float32, draws=16):
    if base == "embedding":
        return torch.randint(VOCAB, (draws, 5, 7), device=DEVICE), torch.randn(draws, 5, 7, N, device=DEVICE).to(dtype)
    return torch.randn(draws, 5, 7, K, device=DEVICE).to(dtype), torch.randn(draws, 5, 7, N, device=DEVICE).to(dtype)


def outcome(model, x, grad_y, **options):
    """Output and gradients of the input and of the adapters."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if x.is_floating_point():
        wanted = {"x": (x := x.clone().requires_grad_()), **wanted}
    torch.manual_seed(5)  # of dropout
    y = target(model)(x, **options)
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad_y.to(y.dtype))))}


def assert_equal_outcomes(fast, library, base="linear", dtype=torch.float32, autocast=False, drawn=None, **options):
    """The error of ``fast`` against a float64 run of the library is at most twice the library's own."""
    double = copy.deepcopy(library).double()
    x, grad_y = drawn or inputs(base, dtype)
    oracle = pooled(partial(outcome, double, **options), x.double() if x.is_floating_point() else x, grad_y.double())
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        expected, actual = (pooled(partial(outcome, model, **options), x, grad_y) for model in (library, fast))
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert value.any(), f"{name} has no part in the result"
        assert_within_reference_error(actual[name], value, oracle[name], name)


@pytest.fixture
def calls(monkeypatch):
    return spied(monkeypatch, peft_lora, "lora_linear")


def dropped(expected, x, p, training=True, inplace=False):
    """Dropout with a mask that is no matter of chance."""
    if not training:
        return x
    assert p == expected
    return x * (torch.arange(x.numel(), device=x.device).view(x.shape) % 5 > 1) / (1 - p)


HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "dtype, own, cast, served",
    [
        (BRAIN, BRAIN, HALF, False), (HALF, HALF, BRAIN, False), (BRAIN, torch.float32, HALF, False),
        (torch.float32, HALF, HALF, True), (HALF, HALF, HALF, True), (HALF, torch.float32, HALF, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, DORA], ids=["lora", "dora"])
def test_autocast_of_16_bits(calls, options, dtype, own, cast, served):
    """Autocast casts all of a product; what is neither in its dtype nor in float32 the library computes."""
    library = build("linear", options, dtype=dtype)
    for p in library.parameters():
        if p.requires_grad:
            p.data = p.data.to(own)
    fast, double, (x, grad_y) = copy.deepcopy(library), copy.deepcopy(library).double(), inputs("linear", dtype)
    fastadapt.accelerate(fast)
    oracle = pooled(partial(outcome, double), x.double(), grad_y.double())
    autocast = torch.autocast(DEVICE, cast)  # as a decorator, since it can't stack tensors in another dtype
    expected, actual = (pooled(autocast(partial(outcome, model)), x, grad_y) for model in (library, fast))
    for name, value in expected.items():
        assert_within_reference_error(actual[name], value, oracle[name], name)
    assert bool(calls) == served


@pytest.mark.parametrize("dtype, autocast", [("float32", False), ("bfloat16", False), ("float32", True)])
@over_cases
def test_equals_the_library(calls, monkeypatch, base, options, dtype, autocast):
    """In bfloat16 the library keeps the adapters in float32.

    With DoRA and dropout it also computes the frozen product in float32; there it is compared as it is under autocast.
    """
    # The library drops a float32 copy of a bfloat16 input, whose mask would be another one.
    monkeypatch.setattr(nn.functional, "dropout", partial(dropped, options[0].get("lora_dropout")))
    dtype = getattr(torch, dtype)
    library = build(base, *options, dtype=dtype)
    fast = copy.deepcopy(library)
    report = fastadapt.accelerate(fast)
    assert report.rows == (("base_model.model.target", "accelerated", ""),)
    wider = dtype == torch.bfloat16 and "lora_dropout" in options[0]
    assert_equal_outcomes(fast, library, base, dtype, autocast or wider)
    assert len(calls) == (0 if base == "embedding" or options[1:] == (DORA,) else 16)


def replayed(model, x, names):
    """What the active adapters make of ``x`` with the masks that are drawn after one seed, the first by the kernels."""
    torch.manual_seed(5)
    layer = target(model)
    y = layer.base_layer(x)
    for i, name in enumerate(names):
        p = layer.lora_dropout[name].p
        if i:
            dropped = nn.functional.dropout(x, p)
        else:
            stays = dropout.kept(dropout.draw_seed(x.device), x.shape[:-1].numel(), K, p).view(x.shape)
            dropped = torch.where(stays, x * dropout.kept_scale(p), 0.0)
        y = y + layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](dropped))
    return y


@pytest.mark.parametrize("count", [1, 2])
def test_each_adapter_has_a_dropout_of_its_own(calls, count):
    library = build("linear", *[{"lora_dropout": 0.4}, {**OTHER, "lora_dropout": 0.25}][:count])
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    x, _ = inputs("linear", draws=1)
    names = [f"adapter{i}" for i in range(count)]
    torch.manual_seed(5)
    oracle = replayed(copy.deepcopy(library).double(), x.double(), names)
    expected = replayed(library, x, names)
    torch.manual_seed(5)
    assert_within_reference_error(target(fast)(x), expected, oracle, "y")
    assert [call["dropout_p"] for call in calls] == [0.4]
    assert_equal_outcomes(fast.eval(), library.eval())  # both adapters at once
    assert len(calls) == 1 + 16


def test_a_dropout_in_evaluation_of_the_layer_alone_is_off():
    """The library asks the dropout itself whether it is in training, not the layer."""
    fast = build("linear", {"lora_dropout": 0.9})
    fastadapt.accelerate(fast)
    target(fast).lora_dropout.eval()
    x, _ = inputs("linear", draws=1)
    assert torch.equal(target(fast)(x), target(fast)(x))


def test_caching_of_dora(calls):
    """The library's switch; norms are kept until training, for its own forward too."""
    library = build("linear", DORA)
    fast = copy.deepcopy(library).eval()
    fastadapt.accelerate(fast)
    x, _ = inputs("linear", draws=1)
    with peft.helpers.DoraCaching():
        assert_equal_outcomes(fast, library.eval())
        assert not any("magnitude" in call for call in calls)
        first = target(fast)(x)
        with torch.no_grad():
            target(fast).base_layer.weight.mul_(2)
        assert not torch.allclose(target(fast)(x), first)  # the product, with the norms of before
        kept = target(fast).lora_magnitude_vector["adapter0"]._dora_cache
        assert list(kept) == ["weight-norm-adapter0"]
        fast.train()
        assert not kept
        target(fast)(x)
    assert "magnitude" in calls[-1]


@pytest.mark.parametrize("options", [{}, DORA, {"lora_dropout": 0.3}], ids=["lora", "dora", "dropout"])
def test_checkpointing_and_compilation(options):
    """Forward runs again in backward with the same masks; one graph, and for another scale no other result."""
    model = build("linear", options)
    fastadapt.accelerate(model)
    layer = target(model)
    x, grad_y = (t[0] for t in inputs("linear", draws=1))
    plain = outcome(model, x, grad_y)
    forward = layer.forward
    layer.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)
    assert all(torch.equal(value, plain[name]) for name, value in outcome(model, x, grad_y).items())
    del layer.forward
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for scale in (1.0, 0.5):
        layer.set_scale("adapter0", scale)
        torch.manual_seed(5)
        expected = layer(x)
        torch.manual_seed(5)
        torch.testing.assert_close(compiled(x), expected)


def test_other_dtypes_are_the_library_s(calls):
    """Adapters in 16 bits under float32 have no kernel; the library casts the input."""
    model = build("linear", {})
    fast = copy.deepcopy(model)
    fastadapt.accelerate(fast)
    x, _ = inputs("linear", draws=1)
    for m in (model, fast):
        target(m).lora_A.bfloat16()
        target(m).lora_B.bfloat16()
    assert torch.equal(target(fast)(x), target(model)(x)) and not calls


def int8_base():
    torchao = pytest.importorskip("torchao.quantization", reason="the library torchao is not installed")
    model = nn.Sequential(nn.Linear(64, 32, device=DEVICE))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model[0], lambda weight: weight.dequantize()


def nf4_base():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the library bitsandbytes is not installed")
    base = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32).to(DEVICE)
    return base, lambda weight: bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


@pytest.mark.parametrize("make, kind", [(int8_base, "TorchaoLoraLinear"), (nf4_base, "Linear4bit")], ids=["int8", "nf4"])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, DORA], ids=["lora", "dropout", "dora"])
def test_quantised_bases(calls, make, kind, options):
    """Against the library on a dense base layer of the same weight."""
    models = []
    for dense in (False, True):
        torch.manual_seed(4)
        base, dequantised = make()
        weight = dequantised(base.weight).to(torch.float32)
        if dense:
            bias, base = base.bias, nn.Linear(64, 32).to(DEVICE)
            base.load_state_dict({"weight": weight, "bias": bias})
        model = nn.Sequential()
        model.target, model.is_loaded_in_4bit = base, make is nf4_base and not dense
        model = peft.get_peft_model(model, config(**options))
        torch.manual_seed(6)
        models.append(randomised(model))
    fast, library = models
    assert fastadapt.accelerate(fast).left == [] and type(target(fast)) is getattr(ours, kind)
    x, grad_y = torch.randn(16, 5, 64, device=DEVICE), torch.randn(16, 5, 32, device=DEVICE)
    for model in models:
        model.train("lora_dropout" not in options)  # masks are drawn elsewhere
    assert_equal_outcomes(fast, library, drawn=(x, grad_y))
    assert len(calls) == 16
    if make is nf4_base and options != DORA:
        # A single row is a kernel of bitsandbytes, which on some CPUs packs the weight anew; the library's DoRA misreads that.
        with torch.no_grad():
            expected = target(library)(x[0])
            torch.testing.assert_close(target(fast.eval())(x[0, :1]), expected[:1], rtol=0.02, atol=0.02)
            torch.testing.assert_close(target(fast)(x[0]), expected, rtol=0.02, atol=0.02)


def with_quantised_inputs(config):
    torchao = pytest.importorskip("torchao.quantization", reason="the library torchao is not installed")
    base = nn.Sequential(nn.Linear(64, 32, device=DEVICE))
    torchao.quantize_(base, getattr(torchao, config)())
    return base[0]


def with_scaled_inputs():
    base, _ = int8_base()
    base.weight.act_pre_scale = torch.rand(64, device=DEVICE) + 1
    return base


@pytest.mark.parametrize(
    "make",
    [
        with_scaled_inputs,
        partial(with_quantised_inputs, "Int8DynamicActivationInt8WeightConfig"),
        partial(with_quantised_inputs, "Int8DynamicActivationIntxWeightConfig"),
    ],
    ids=["scaled", "int8", "intx"],
)
def test_bases_that_read_other_inputs_are_the_library_s(calls, make):
    """The weight of such a layer alone doesn't say what it computes."""
    model = nn.Sequential()
    model.target, model.other = make(), nn.Linear(64, 32, device=DEVICE)
    library = randomised(peft.get_peft_model(model, config(target_modules=["target", "other"])))
    fast = copy.deepcopy(library)
    first, _ = fastadapt.accelerate(fast).rows
    assert first[1:] == ("left", "its base layer scales or quantises its input")
    x = torch.randn(3, 64, device=DEVICE)
    assert torch.equal(target(fast)(x), target(library)(x)) and not calls
    a, b = torch.ones(2, 64, device=DEVICE), torch.ones(32, 2, device=DEVICE)
    with pytest.raises(ValueError, match="weight must leave the input as it is, got a Int.*Tensor that scales or quantises it"):
        fastadapt.lora_linear(x, target(fast).base_layer.weight, None, a, b)
