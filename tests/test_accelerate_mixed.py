"""Several adapters in one batch: ``adapter_names`` of an accelerated model of ``peft`` against the library's own loop."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import fastadapt

from .accuracy import assert_within_reference_error
from .battery import DEVICE

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")

from peft.utils.hotswap import prepare_model_for_compiled_hotswap  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration  # noqa: E402

from . import test_accelerate as single  # noqa: E402
from .test_accelerate import DORA, K, N, assert_equal_outcomes, build, calls, config, target  # noqa: E402, F401

NAMES = ["adapter1", "__base__", "adapter0", "adapter2", "adapter1"]
# Options of adapter0, adapter1 and adapter2
CASES = {
    "same": ({}, {}, {}),
    "ranks and scales": ({"r": 2, "lora_alpha": 3}, {"use_rslora": True}, {"r": 8}),
    "biases": ({"lora_bias": True}, {}, {"lora_bias": True, "r": 3}),
    "mica": ({"init_lora_weights": "mica"}, {}, {}),
}
over_cases = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def pair(*options, **more):
    """A model of peft and an accelerated copy, with dropout off."""
    library = build("linear", *options, **more).eval()
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    return fast, library


@pytest.mark.parametrize("dtype, autocast", [("float32", False), ("bfloat16", False), ("float32", True)])
@over_cases
def test_equals_the_library(calls, options, dtype, autocast):  # noqa: F811
    dtype = getattr(torch, dtype)
    fast, library = pair(*options, dtype=dtype)
    assert_equal_outcomes(fast, library, dtype=dtype, autocast=autocast, adapter_names=NAMES)
    assert len(calls) == 16 and all(call["adapter_ids"].tolist() == [1, -1, 0, 2, 1] for call in calls)


def test_tensor_scales_equal_the_library(calls):  # noqa: F811
    fast, library = pair({}, {"r": 2, "lora_alpha": 3}, {})
    for model in (fast, library):
        prepare_model_for_compiled_hotswap(model, target_rank=7)
    assert_equal_outcomes(fast, library, adapter_names=NAMES)
    assert len(calls) == 16 and calls[0]["scale"].shape == (3,)


ONE, NONE = ["adapter2"] * 4, ["__base__"] * 4


@pytest.mark.parametrize("names, ids", [(ONE, [None]), (NONE, []), (ONE[:2] + NONE[:2], [[0, 0, -1, -1]])])
def test_batches_of_one_adapter_and_of_none(calls, names, ids):  # noqa: F811
    """One adapter for all is no bank, and none is the base layer."""
    fast, library = pair({}, {}, {"r": 3})
    x = torch.randn(len(names), 7, K, device=DEVICE)
    torch.testing.assert_close(target(fast)(x, adapter_names=names), target(library)(x, adapter_names=names))
    assert [call["adapter_ids"].tolist() if "adapter_ids" in call else None for call in calls] == ids


def test_the_library_s_objections_stay():
    fast, _ = pair({}, {}, DORA)
    layer, x = target(fast), torch.randn(2, K, device=DEVICE)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        layer(x, adapter_names=["adapter0"])
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        layer(x, adapter_names=["adapter0", "adapter2"])
    with pytest.raises(ValueError, match="non-existing adapter"):
        fast(x, adapter_names=["adapter0", "x"])
    layer.merge(adapter_names=["adapter0"])
    with pytest.raises(ValueError, match="when there are merged adapters"):
        layer(x, adapter_names=["adapter0", "adapter1"])
    layer.unmerge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x, adapter_names=["adapter0", "adapter1"]), layer.base_layer(x))


def llama(names, **options):
    """A small random model with grouped queries, and an adapter of another rank for each of ``names``."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    for i, name in enumerate(names):
        more = config(r=2 + i, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(model, more, name) if not i else (model.add_adapter(name, more), model)[1]
    model.base_model.set_adapter(list(names))
    return single.randomised(model)


def test_generate_and_its_banks(calls, monkeypatch):  # noqa: F811
    """A bank is stacked once for all steps of a generate, and anew for the next, whatever way the weights have changed."""
    library = llama(["a", "b"]).eval()
    fast = copy.deepcopy(library)
    report = fastadapt.accelerate(fast)
    banks = []
    monkeypatch.setattr(single.peft_lora, "_bank", lambda *args, bank=single.peft_lora._bank: banks.append(1) or bank(*args))
    ids = torch.randint(1, 61, (3, 5), device=DEVICE)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "adapter_names": ["b", "a", "__base__"]}
    outputs = []
    for _ in range(2):
        expected = library.generate(input_ids=ids, **options)
        assert torch.equal(fast.generate(input_ids=ids, **options), expected)
        outputs.append(expected)
        for model in (library, fast):
            for name, p in model.named_parameters():
                if "lora_B.b" in name:
                    p.data.copy_(5 * p.data.flip(0))  # as hot-swapping writes: no version counter sees it
    assert not torch.equal(*outputs)
    assert len(banks) == 2 * len(report.rows) and len(calls) == 2 * 6 * len(report.rows)
    beams = {**options, "num_beams": 2}
    assert torch.equal(fast.generate(input_ids=ids, **beams), library.generate(input_ids=ids, **beams))


def test_beams_of_an_encoder_and_decoder():
    """The encoder sees every sentence once, the decoder each of its beams."""
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    model = peft.get_peft_model(model, config(target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM"), "a")
    model.add_adapter("b", config(target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM"))
    library = single.randomised(model).eval()
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    ids = torch.randint(2, 40, (2, 5), device=DEVICE)
    options = {"max_new_tokens": 4, "num_beams": 3, "adapter_names": ["b", "a"]}
    assert torch.equal(fast.generate(input_ids=ids, **options), library.generate(input_ids=ids, **options))


def train(model, ids, names=None):
    loss = model(input_ids=ids, labels=ids, **({} if names is None else {"adapter_names": names})).loss
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def test_training():
    """What the library refuses: each adapter gets the gradients of its own sequences, as if it had been trained alone."""
    model = llama(["a", "b"]).train()
    fast = copy.deepcopy(model)
    ids = torch.randint(1, 61, (4, 6), device=DEVICE)
    with pytest.raises(ValueError, match="when the model is in training mode"):
        train(model, ids, ["a"] * 4)
    fastadapt.accelerate(fast)
    mixed = dict(zip((name for name, p in fast.named_parameters() if p.requires_grad), train(fast, ids, ["a", "b", "b", "a"])))
    for name, rows in (("a", [0, 3]), ("b", [1, 2])):
        model.set_adapter(name)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        for parameter, *grads in zip(names, train(model, ids[rows]), train(copy.deepcopy(model).double(), ids[rows])):
            assert_within_reference_error(2 * mixed[parameter], *grads, parameter)
    assert fast.base_model.training
    fast.base_model.model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="adapter_names must be None in training with gradient checkpointing"):
        train(fast, ids, ["a"] * 4)
    assert fast.base_model.training and not any(m._forward_pre_hooks for m in fast.modules())
    fastadapt.restore(fast)
    assert type(fast.base_model) is peft.tuners.lora.LoraModel


@pytest.mark.parametrize("rates, kernel", [((0.3, 0.3), True), ((0.3, 0.5), False)])
def test_dropout_in_training(calls, rates, kernel):  # noqa: F811
    """One rate serves the whole bank; with several the library's own loop runs. Rows without an adapter are untouched."""
    fast = build("linear", *({"lora_dropout": p} for p in rates)).train()
    fastadapt.accelerate(fast)
    x = torch.randn(1, K, device=DEVICE).expand(4000, K)
    names = ["adapter0", "adapter1", "__base__", "adapter1"] * 1000
    with torch.no_grad():
        y = target(fast)(x, adapter_names=names).view(1000, 4, N)
        expected = target(fast).eval()(x[:4], adapter_names=names[:4])
    assert len(calls) == 1 + kernel and (y[0, 0] != y[1, 0]).all()
    torch.testing.assert_close(y[:, 2], expected[2].expand(1000, N))
    spread = y.std(0)[[0, 1, 3]] / 1000**0.5
    assert ((y.mean(0) - expected)[[0, 1, 3]].abs() < 5 * spread).all()


def test_compilation():
    """One graph; a list of names is a constant of it, as with the library."""
    fast, library = pair({}, {"r": 3}, {})
    compiled = torch.compile(target(fast), fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(5, 7, K, device=DEVICE)
    torch.testing.assert_close(compiled(x, adapter_names=NAMES), target(library)(x, adapter_names=NAMES))


class Around(nn.Module):
    """Unlike nn.Sequential what Dynamo makes a graph of, with the layer in it."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, x):
        return 2 * self.target(x)


def test_compilation_of_a_model():
    """Names come by hooks, which a graph heeds only where Dynamo guards them: README says how, for another list."""
    library = peft.get_peft_model(Around(nn.Linear(K, N)), config(), adapter_name="adapter0")
    for name in ("adapter1", "adapter2"):
        library.add_adapter(name, config())
    library = single.randomised(library).eval()
    fast, x = copy.deepcopy(library), torch.randn(5, 7, K, device=DEVICE)
    fastadapt.accelerate(fast)
    compiled = torch.compile(fast, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        for names in (NAMES, NAMES[::-1], None, NAMES):
            torch.testing.assert_close(compiled(x, adapter_names=names), library(x, adapter_names=names))


def test_embeddings_take_the_library_s_way():
    library = build("embedding", {}, {"r": 3}).eval()
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    ids = torch.randint(single.VOCAB, (2, 5), device=DEVICE)
    forward = partial(nn.Module.__call__, adapter_names=["adapter1", "adapter0"])
    assert torch.equal(forward(target(fast), ids), forward(target(library), ids))
