"""LLaMA-Adapter of ``peft`` accelerated in place against the same models as they were."""

import copy

import pytest
import torch

import fastadapt
from fastadapt.integrations import peft_adaption_prompt

from . import prefix_models
from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .prefix_models import P, T, assert_equal_outcomes, batch, gpt2, hf, llama, outcome, state

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")


@pytest.fixture
def calls(monkeypatch):
    return prefix_models.spy(monkeypatch)


def mistral(**options):
    return llama(hf.MistralConfig, **options)


def config(layers=1, length=P):
    return peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=length, adapter_layers=layers)


@torch.no_grad()
def randomised(model):
    """With gates away from zero, where they start, and prompts whose part is as large as that of the tokens."""
    for name, p in model.named_parameters():
        if "adaption_" in name or name.endswith("o_proj.bias"):
            p.copy_(torch.randn(p.shape) * (8.0 if "prompt" in name else 0.7))
    return model.to(DEVICE)


def build(make=llama, layers=2, dtype=torch.float32, **options):
    return randomised(peft.get_peft_model(make(**options)[0].to(dtype), config(layers)))


def pair(*args, **options):
    library = build(*args, **options)
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    return library, fast


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make, options", [(llama, {}), (llama, {"attention_bias": True}), (mistral, {"sliding_window": 4})])
def test_equals_the_library(calls, make, options, attention):
    """A bias of the output projection counts twice, as it does there; a window hides tokens, not the prompt."""
    library, fast = pair(make, **options, attn_implementation=attention)
    # Of a query that sees no token the eager attention makes NaN in float64.
    sides = (None, "right", "left") if attention == "sdpa" else (None, "right")
    count = assert_equal_outcomes(fast, library, lambda: [batch(library, side) for side in sides * 2])
    assert calls == [((3, 2, T, 8), (2, P, 8))] * 2 * count


@pytest.mark.parametrize("layers", [1, 2])
def test_equals_the_library_in_16_bits(calls, layers):
    """The topmost layers alone; the others keep their own attention."""
    library, fast = pair(layers=layers, dtype=torch.bfloat16)
    count = assert_equal_outcomes(fast, library, lambda: [batch(library, side) for side in (None, "left", "right") * 2])
    assert len(calls) == layers * count


@pytest.mark.parametrize("dtype, cast", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
@torch.no_grad()
def test_autocast_in_another_dtype(calls, dtype, cast):
    library, fast = pair(dtype=dtype)
    inputs, oracle = batch(library, "left"), copy.deepcopy(library).double()
    exact, results = oracle(**inputs).logits, []
    with torch.autocast(DEVICE, dtype=cast):
        for model in (fast, library):
            results.append(model(**inputs).logits)
    seen = inputs["attention_mask"].bool()
    assert_within_reference_error(*(logits[seen] for logits in (*results, exact)), "logits")
    assert len(calls) == 2


def test_gate_at_its_start(calls):
    """Zero: the prompt has no part in the output and no gradient, but the gate has."""
    library = build()
    for name, p in library.named_parameters():
        p.data.mul_("gate" not in name)
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    results = outcome(fast, batch(library))
    assert all(value.any() == ("prompt" not in name) for name, value in results.items()) and calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    _, model = pair()
    inputs = batch(model, "left")
    model.enable_input_require_grads()  # without which a reentrant run gives the library's own layers no gradient either
    plain = outcome(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = outcome(model, inputs)
    assert set(again) == set(plain) and all(torch.equal(value, plain[name]) for name, value in again.items())


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation(calls, options):
    library, fast = pair()
    inputs = {name: value for name, value in batch(library, "left").items() if name != "labels"}
    options = options | {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    expected, actual = (model.eval().generate(**inputs, **options) for model in (library, fast))
    assert torch.equal(actual.sequences, expected.sequences) and calls
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits))


def test_follows_every_change_of_state(calls):
    library, fast = pair(layers=1)
    inputs = batch(library, "right")

    def add(model):
        torch.manual_seed(1)
        model.add_adapter("more", config(2, P + 1))
        model.base_model.set_adapter("more")
        randomised(model).base_model.set_adapter("default")

    steps = {
        "add": (add, 1), "switch": (lambda model: model.set_adapter("more"), 2),
        "back": (lambda model: model.set_adapter("default"), 1), "eval": (lambda model: model.eval(), 1),
        "delete": (lambda model: model.delete_adapter("default"), 2),
    }  # fmt: skip
    for name, (step, count) in steps.items():
        for model in (library, fast):
            step(model)
        names = [row.module for row in fastadapt.accelerate(fast).rows]
        assert len(names) == (2 if name == "delete" else 3) and len(set(names)) == len(names)
        expected, actual = (model(**inputs).logits for model in (library, fast))
        torch.testing.assert_close(actual, expected)
        assert len(calls) == count, name
        calls.clear()
    with library.disable_adapter(), fast.disable_adapter():
        assert torch.equal(fast(**inputs).logits, library(**inputs).logits) and not calls


def test_what_a_kernel_cannot_give_is_the_library_s(calls):
    """Dropout of the tokens' weights alone, and weights that are asked for."""
    library, fast = pair(attention_dropout=0.5, attn_implementation="eager")
    assert {row[1:] for row in fastadapt.accelerate(fast).rows} == {("in part", "attention dropout in training")}
    inputs, logits = batch(library), []
    for model in (library, fast):
        torch.manual_seed(3)
        logits.append(model.train()(**inputs).logits)
    assert torch.equal(*logits) and not calls
    expected, actual = (model.eval()(**inputs, output_attentions=True) for model in (library, fast))
    assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.attentions[1], expected.attentions[1])
    torch.testing.assert_close(fast(**inputs).logits, library(**inputs).logits)
    assert len(calls) == 2


def test_files_are_the_library_s_own(tmp_path):
    library, fast = pair()
    assert list(fast.state_dict()) == list(library.state_dict())
    inputs = batch(library, "left")
    expected = library(**inputs).logits
    for name, model in (("library", library), ("fast", fast)):
        model.save_pretrained(tmp_path / name)
    for path in (tmp_path / "library").iterdir():
        assert path.read_bytes() == (tmp_path / "fast" / path.name).read_bytes(), path
    for source, faster in (("library", True), ("fast", False)):
        with library.disable_adapter():
            base = copy.deepcopy(library.get_base_model())
        model = peft.PeftModel.from_pretrained(base, tmp_path / source)
        if faster:
            fastadapt.accelerate(model)
        torch.testing.assert_close(model(**inputs).logits, expected)


def test_twice_has_no_effect_and_restore_undoes_it(calls):
    model = build()
    inputs, before = batch(model, "left"), state(model)
    expected = model(**inputs).logits
    first = fastadapt.accelerate(model, backend="reference")
    after = state(model)
    assert fastadapt.accelerate(model, backend="reference") == first and state(model) == after != before
    assert [row.module for row in first.rows] == [f"base_model.model.model.layers.{i}.self_attn" for i in range(2)]
    torch.testing.assert_close(copy.deepcopy(model)(**inputs).logits, expected)
    assert len(calls) == 2
    fastadapt.restore(model)
    assert torch.equal(model(**inputs).logits, expected) and len(calls) == 2 and state(model) == before


def test_gpt2_is_left_and_named():
    """The library adds the prompt's values past its output projection."""
    model = build(gpt2)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="no kernel for AdaptedAttentionGPT, which adds what the prompt gives"):
        fastadapt.accelerate(model)
    assert [type(module) for module in model.modules()] == kinds and peft_adaption_prompt.AdaptedAttention not in kinds
