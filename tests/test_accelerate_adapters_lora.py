"""LoRA of the library ``adapters``, accelerated in place, against the same as it was."""

from functools import partial

import pytest
import torch

import fastadapt

from .battery import DEVICE
from .modules import spied

adapters = pytest.importorskip("adapters", reason="the library adapters is not installed (pip install fastadapt[peers])")

from adapters.composition import Average, BatchSplit, Parallel, Stack  # noqa: E402
from adapters.methods import lora  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from fastadapt.integrations import adapters_lora as ours  # noqa: E402

from .test_accelerate_adapters import (  # noqa: E402
    KINDS,
    accelerated,
    assert_equal_outcomes,
    batch,
    build,
    of_models,
    sequences,
    single,
    sizes,
)

EVERYWHERE = {"attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True}
CONFIGS = {
    "attention": adapters.LoRAConfig(r=3, alpha=6),
    "everywhere": adapters.LoRAConfig(r=4, alpha=5, **EVERYWHERE),
    "dropout": adapters.LoRAConfig(r=4, dropout=0.3, **EVERYWHERE),
}


def moved(model):
    """Every LoRA away from its start, at which B is zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    return model


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, lora.LoRALayer) and module.loras}


@pytest.fixture
def calls(monkeypatch):
    return spied(monkeypatch, ours, "lora_linear")


def assert_same_logits(fast, library):
    ids = batch()["input_ids"]
    torch.testing.assert_close(fast(ids).logits, library(ids).logits)


@pytest.mark.parametrize("dtype, autocast", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("config", [CONFIGS["attention"], CONFIGS["everywhere"]], ids=["attention", "everywhere"])
def test_equals_the_library(calls, config, dtype, autocast):
    library = moved(build(config)).to(dtype)
    fast, report = accelerated(library)
    assert report.accelerated == [f"{name}.loras.a" for name in layers(library)] and not report.left
    assert_equal_outcomes(fast, library, of_models, partial(sequences, 4), autocast)
    assert len(calls) % len(layers(library)) == 0 and calls[0]["scale"] == config.alpha / config.r


def test_float32_in_a_16_bit_model(calls):
    """As a LoRA that is added to a model in 16 bits, whose dtype the library's own products match under autocast alone."""
    library = moved(build(CONFIGS["everywhere"]))
    for name, p in library.named_parameters():
        if "lora_" not in name:
            p.data = p.data.bfloat16()
    fast, _ = accelerated(library)
    assert_equal_outcomes(fast, library, of_models, partial(sequences, 4), autocast=True)
    assert calls


def decoder(model, config=CONFIGS["everywhere"]):
    adapters.init(model)
    model.add_adapter("a", config=config)
    model.train_adapter("a")
    return moved(model).to(DEVICE)


def test_a_decoder():
    library = decoder(LlamaForCausalLM(LlamaConfig(**sizes())))
    fast, report = accelerated(library)
    assert len(report.accelerated) == len(layers(library)) > 0 and not report.left
    assert_equal_outcomes(fast, library, of_models, lambda: [(ids, ids) for ids, _ in sequences(3)])


@pytest.mark.parametrize("matrices", ["q", "qv", "kv", "qkv"])
def test_q_k_and_v_in_one_layer(calls, matrices):
    """GPT-2's, which keeps its weights transposed too."""
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=2, vocab_size=50, n_positions=32, **still))
    library = decoder(model, adapters.LoRAConfig(r=4, attn_matrices=list(matrices), intermediate_lora=True))
    fast, report = accelerated(library)
    assert len(report.accelerated) == 4 and not report.left
    assert all(layer.fan_in_fan_out for layer in layers(fast).values())
    assert_equal_outcomes(fast, library, of_models, lambda: [(ids, ids) for ids, _ in sequences(3)])
    assert len(calls) % 4 == 0 and calls
    fast.eval().merge_adapter("a")
    library.eval().merge_adapter("a")
    calls.clear()
    assert_same_logits(fast, library)
    assert not calls
    fastadapt.restore(fast)
    assert {type(layer) for layer in layers(fast).values()} == {lora.LoRAMergedLinear, lora.LoRALinearTorch}


def test_dropout_is_that_of_the_adapter(calls):
    library = moved(build(CONFIGS["dropout"]))
    fast, _ = accelerated(library)
    drawn = batch()
    torch.manual_seed(1)
    first = fast(**drawn).logits
    assert {call["dropout_p"] for call in calls} == {0.3} and not torch.equal(first, fast(**drawn).logits)
    torch.manual_seed(1)
    assert torch.equal(first, fast(**drawn).logits)
    calls.clear()
    assert_same_logits(fast.eval(), library.eval())
    assert {call["dropout_p"] for call in calls} == {0.0}


@pytest.mark.parametrize(
    "setup, served",
    [
        (Stack("a", "b"), False),
        (BatchSplit("a", "b", batch_sizes=[1, 3]), False),
        (Average("a", "b", weights=[0.3, 0.7]), False),
        (Parallel("a", "b"), False),
        (Stack("b"), True),
        (Stack("c", "a"), True),
        (None, False),
    ],
    ids=str,
)
def test_compositions(calls, setup, served):
    """A single LoRA is the op's, also beside adapters of other layers; what is more is the library's."""
    config = adapters.LoRAConfig(r=4)
    library = moved(build(config, config, single()))
    library.active_head = None
    fast, _ = accelerated(library)
    for model in (fast, library):
        model.eval().set_active_adapters(setup)
    ids = batch()["input_ids"]
    torch.testing.assert_close(fast.bert(ids).last_hidden_state, library.bert(ids).last_hidden_state)
    assert bool(calls) == served


def test_the_state_is_the_library_s(calls, tmp_path):
    library = moved(build(CONFIGS["everywhere"], CONFIGS["attention"]))
    fast, _ = accelerated(library)
    assert list(fast.state_dict()) == list(library.state_dict())
    assert all(isinstance(layer, lora.LoRALinearTorch) for layer in layers(fast).values())
    for model in (fast, library):
        model.eval()
        model.merge_adapter("a")
    calls.clear()
    assert_same_logits(fast, library)
    assert not calls
    for model in (fast, library):
        model.reset_adapter()
        model.set_active_adapters("b")
    assert_same_logits(fast, library)
    assert len(calls) == 4
    for model in (fast, library):
        model.save_adapter(str(tmp_path / type(layers(model).popitem()[1]).__name__), "a", use_safetensors=True)
    files = [path.read_bytes() for path in sorted(tmp_path.glob("*/adapter.safetensors"))]
    assert len(files) == 2 and files[0] == files[1]
    fast.delete_adapter("a")
    fast.load_adapter(str(tmp_path / "LoRALinearTorch"), load_as="new", set_active=True, use_safetensors=True)
    library.set_active_adapters("a")
    calls.clear()
    assert_same_logits(fast, library)
    assert len(calls) == 10
    fastadapt.restore(fast)
    assert {type(layer) for layer in layers(fast).values()} == {lora.LoRALinearTorch}
    assert not any("_fastadapt_backend" in vars(module) for module in fast.modules())
    calls.clear()
    assert_same_logits(fast, library)
    assert not calls


def test_layers_that_get_a_lora_later_need_a_second_call():
    library = moved(build(CONFIGS["attention"]))
    fast, report = accelerated(library)
    for model in (fast, library):
        torch.manual_seed(0)
        model.add_adapter("b", config=CONFIGS["everywhere"])
    assert len(fastadapt.accelerate(fast, backend="reference").accelerated) == len(report.accelerated) + 10
    assert {layer._fastadapt_backend for layer in layers(fast).values()} == {"reference"}


def test_compiles_without_graph_break():
    fast, _ = accelerated(moved(build(CONFIGS["everywhere"])).eval())
    drawn = batch()
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**drawn).logits, fast(**drawn).logits)


def test_hooks_that_come_later_are_respected(calls):
    fast, _ = accelerated(moved(build(CONFIGS["attention"])))
    drawn = batch()
    before = fast(**drawn).logits
    calls.clear()
    handles = [
        layer.loras["a"].register_forward_hook(lambda module, args, y: (2 * y[0], y[1])) for layer in layers(fast).values()
    ]
    assert not torch.allclose(fast(**drawn).logits, before) and not calls
    for handle in handles:
        handle.remove()
    assert torch.equal(fast(**drawn).logits, before)


def test_a_base_that_quantises_its_input_is_left(calls):
    """Before or after acceleration: what its weight alone gives isn't what it computes."""
    torchao = pytest.importorskip("torchao.quantization", reason="the library torchao is not installed")
    library = moved(build(CONFIGS["attention"]))
    fast, _ = accelerated(library)
    for model in (library, fast):
        only = lambda module, name: isinstance(module, lora.LoRALinearTorch) and module.loras  # noqa: E731
        torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig(), filter_fn=only)
    with torch.no_grad():
        assert_same_logits(fast, library)
    assert not calls
    with pytest.raises(ValueError, match="(?s)got only\n.*left +it scales or quantises its input"):
        fastadapt.accelerate(library)


def hooked():
    model = build(CONFIGS["attention"])
    for layer in layers(model).values():
        layer.loras["a"].register_forward_hook(lambda module, args, y: y)
    return model


def replaced():
    model = build(CONFIGS["attention"])
    for layer in layers(model).values():
        layer.forward = partial(type(layer).forward, layer)
    return model


LEFT = {
    "gating": (lambda: build(adapters.LoRAConfig(use_gating=True)), "use_gating"),
    "dora": (lambda: build(adapters.LoRAConfig(use_dora=True)), "use_dora"),
    "vera": (lambda: build(adapters.VeraConfig()), "no kernel for Vera"),
    "hook": (hooked, "hooks in it"),
    "forward": (replaced, "its forward has been replaced"),
}


@pytest.mark.parametrize("make, reason", LEFT.values(), ids=LEFT)
def test_what_is_not_covered_is_left_and_named(make, reason):
    library = make()
    with pytest.raises(ValueError, match=f"(?s)got only\n.*left +{reason}"):
        fastadapt.accelerate(library)
    assert {type(layer) for layer in layers(library).values()} == {lora.LoRALinearTorch}
