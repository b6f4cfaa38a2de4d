"""Prefix tuning of ``peft`` accelerated in place against the same models as they were."""

import copy
import pickle
import re
from types import MethodType

import pytest
import torch

import fastadapt
from fastadapt.integrations import peft_prefix

from . import prefix_models
from .battery import DEVICE
from .prefix_models import MODELS, SIZES, VOCABULARY, P, T, assert_equal_outcomes, batch, bert, gpt2, hf, llama, outcome, state

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")

over_models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
over_decoders = pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])


def config(task, projection=False, **options):
    return peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=P, prefix_projection=projection, encoder_hidden_size=16, **options
    )


def build(make, projection=False, dtype=torch.float32):
    base, task = make()
    return peft.get_peft_model(base.to(dtype), config(task, projection)).to(DEVICE)


def pair(*args, **options):
    """A model of peft and an accelerated copy."""
    library = build(*args, **options)
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    return library, fast


@pytest.fixture
def calls(monkeypatch):
    return prefix_models.spy(monkeypatch)


@pytest.mark.parametrize("projection", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["flat", "projection"])
@over_models
def test_equals_the_library(calls, make, projection):
    """With padding on either side; no key, mask or prefix is as long as prefix and tokens, or as large as the batch."""
    library, fast = pair(make, projection)
    encoded = []
    fast.prompt_encoder["default"].register_forward_hook(lambda module, args, output: encoded.append(output.shape))
    count = assert_equal_outcomes(fast, library, lambda: [batch(library, side) for side in (None, "left", "right")])
    h_kv = 2 if make is llama else 4
    assert calls == [((3, h_kv, T, 8), (h_kv, P, 8))] * 2 * count
    assert encoded == [(P, 4 * h_kv * 8)] * count * projection


@pytest.mark.parametrize("make", [bert, llama], ids=["bert", "llama"])
def test_equals_the_library_in_16_bits(make):
    """The prefix and its encoder stay in float32, as peft keeps them."""
    library, fast = pair(make, True, dtype=torch.bfloat16)
    assert_equal_outcomes(fast, library, lambda: [batch(library, side) for side in (None, "left", "right")])


@pytest.mark.parametrize("reentrant", [False, True])
@over_models
def test_gradient_checkpointing(make, reentrant):
    """Where the library loses its prefixes with the cache, which a layer that runs again can't have."""
    _, model = pair(make)
    inputs = batch(model, "left")
    plain = outcome(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = state(model)
    again = outcome(model, inputs)
    assert set(again) == set(plain) and all(torch.equal(value, plain[name]) for name, value in again.items())
    assert state(model) == before


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@over_decoders
def test_generation(calls, make, options):
    """The cache holds the tokens alone, and the prefix is encoded once."""
    library, fast = pair(make, True)
    inputs = {name: value for name, value in batch(library, "left").items() if name != "labels"}
    options = options | {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    encoded = []
    fast.prompt_encoder["default"].register_forward_hook(lambda *_: encoded.append(1))
    expected, actual = (model.eval().generate(**inputs, **options) for model in (library, fast))
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits))
    assert len(encoded) == 1 and calls and all(shapes[1][-2] == P for shapes in calls)
    assert expected.past_key_values.get_seq_length() - actual.past_key_values.get_seq_length() == P
    if "num_beams" not in options:  # without a cache the library's own fails
        assert torch.equal(fast.generate(**inputs, **options, use_cache=False).sequences, actual.sequences)


@pytest.mark.slow
@over_models
def test_compilation(make):
    """One graph, of all but the loss, where transformers writes to its log."""
    _, model = pair(make)
    inputs = {name: value for name, value in batch(model, "left").items() if name != "labels"}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("make", [bert, llama], ids=["bert", "llama"])
def test_a_pickle_is_as_fast(calls, make):
    _, model = pair(make)
    inputs = batch(model, "left")
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(**inputs).logits, model(**inputs).logits) and len(calls) == 4
    fastadapt.restore(again)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    assert len(calls) == 6


def test_positions_of_the_caller():
    library, fast = pair(llama)
    inputs = batch(library) | {"position_ids": torch.arange(T, device=DEVICE)[None] * 2}
    assert_equal_outcomes(fast, library, lambda: [inputs])
    embeds = library.get_base_model().get_input_embeddings()(inputs.pop("input_ids")).detach()
    torch.testing.assert_close(fast(inputs_embeds=embeds, **inputs).logits, library(inputs_embeds=embeds, **inputs).logits)


@over_models
def test_follows_every_change_of_state(calls, make):
    library, fast = pair(make)
    task = library.active_peft_config.task_type
    inputs = batch(library, "right")

    def weights(model):
        for p in model.prompt_encoder.parameters():
            p.data.mul_(3.0)

    def add(model):
        torch.manual_seed(1)
        model.add_adapter("more", config(task, init_weights=None))

    steps = {
        "add": add, "switch": lambda model: model.set_adapter("more"), "weights": weights, "eval": lambda model: model.eval(),
        "delete": lambda model: model.delete_adapter("default"),
    }  # fmt: skip
    before = None
    for name, step in steps.items():
        for model in (library, fast):
            step(model)
        fastadapt.accelerate(fast)
        expected, actual = (model(**inputs).logits for model in (library, fast))
        torch.testing.assert_close(actual, expected)
        assert len(calls) == 2 and ((before is None) or not torch.equal(before, actual) or name not in ("switch", "weights"))
        before = actual
        calls.clear()
    if not hasattr(library, "prepare_inputs_for_generation"):  # which the library's disable_adapter can't do without
        return
    with library.disable_adapter(), fast.disable_adapter():
        assert torch.equal(fast(**inputs).logits, library(**inputs).logits) and not calls
    torch.testing.assert_close(fast(**inputs).logits, library(**inputs).logits)
    assert calls


def test_what_a_kernel_cannot_give_is_the_library_s(calls):
    """A cache that was asked for, weights of the attention, a window that hides the prefix."""
    library, fast = pair(lambda: llama(attn_implementation="eager"))
    inputs = batch(library)
    for options in ({"use_cache": True}, {"output_attentions": True}):
        expected, actual = (model(**inputs, **options) for model in (library, fast))
        assert torch.equal(actual.logits, expected.logits) and not calls
        kept = actual.past_key_values.get_seq_length() if "use_cache" in options else actual.attentions[1].shape[-1]
        assert kept == P + T
    narrow, fast = pair(lambda: llama(hf.MistralConfig, sliding_window=P + T - 1))
    assert torch.equal(fast(**inputs).logits, narrow(**inputs).logits) and not calls
    short = {name: value[:, 1:] for name, value in inputs.items()}
    torch.testing.assert_close(fast(**short).logits, narrow(**short).logits)
    assert len(calls) == 2


@pytest.mark.parametrize("projection", [False, True], ids=["flat", "projection"])
@pytest.mark.parametrize("make", [bert, llama], ids=["bert", "llama"])
def test_files_are_the_library_s_own(tmp_path, make, projection):
    library, fast = pair(make, projection)
    assert list(fast.state_dict()) == list(library.state_dict())
    bases = {}
    for name, model in (("library", library), ("fast", fast)):
        bases[name] = copy.deepcopy(model.get_base_model())
        model.save_pretrained(tmp_path / name)
    fastadapt.restore(bases["fast"])
    for path in (tmp_path / "library").iterdir():
        assert path.read_bytes() == (tmp_path / "fast" / path.name).read_bytes(), path
    inputs = batch(library, "left")
    expected = library(**inputs).logits
    for source, faster in (("library", True), ("fast", False)):
        model = peft.PeftModel.from_pretrained(bases[source], tmp_path / source)
        if faster:
            fastadapt.accelerate(model)
        torch.testing.assert_close(model(**inputs).logits, expected)


@over_models
def test_twice_has_no_effect_and_restore_undoes_it(calls, make):
    model = build(make)
    if hasattr(model, "prepare_inputs_for_generation"):
        with model.disable_adapter():  # which leaves the bound forward in the model itself
            pass
    inputs, before = batch(model, "left"), state(model)
    expected = model(**inputs).logits
    first = fastadapt.accelerate(model, backend="reference")
    after = state(model)
    assert fastadapt.accelerate(model, backend="reference") == first and state(model) == after != before
    assert first.rows == (("prompt_encoder.default", "accelerated", ""),)
    torch.testing.assert_close(copy.deepcopy(model)(**inputs).logits, expected)
    assert len(calls) == 2
    fastadapt.restore(model)
    assert torch.equal(model(**inputs).logits, expected) and len(calls) == 2
    assert state(model) == before


@over_models
def test_behind_a_wrapper_of_its_forward(calls, make):
    """As ``prepare`` of the library accelerate leaves one for mixed precision, which a ``Trainer`` calls."""
    model = build(make)
    inputs = batch(model, "left")
    expected = model(**inputs).logits
    first = fastadapt.accelerate(model)
    model.forward = MethodType(torch.autocast(DEVICE, enabled=False)(type(model).forward), model)
    assert fastadapt.accelerate(model) == first
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert len(calls) == 2
    fastadapt.restore(model)
    assert torch.equal(model(**inputs).logits, expected) and len(calls) == 2
    with pytest.raises(ValueError, match="its forward has been replaced"):
        fastadapt.accelerate(model)


def test_what_is_not_covered_is_left_and_named():
    opt = hf.OPTForCausalLM(hf.OPTConfig(**SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}))
    t5 = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    scaled = gpt2()[0]
    scaled.config.scale_attn_by_inverse_layer_idx = True
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    cases = [
        (opt, config("CAUSAL_LM"), "opt has attention code or positions of its own"),
        (t5, config("SEQ_2_SEQ_LM"), "no kernel for the prefixes of a PeftModelForSeq2SeqLM"),
        (scaled, config("CAUSAL_LM"), "its attention has scales that PyTorch's doesn't know"),
        (llama()[0], prompt, "nothing to replace: a prompt is a part of the input"),
        (llama()[0], peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P), "nothing to replace: a prompt is"),
    ]
    relative = bert(position_embedding_type="relative_key")[0]
    if any(hasattr(module, "distance_embedding") for module in relative.modules()):  # not since transformers 5
        cases.append((relative, config("SEQ_CLS"), "its attention has positions in its scores"))
    more = build(bert)
    for base, options, reason in cases:
        model = peft.get_peft_model(base, options)
        kind = type(model)
        with pytest.raises(ValueError, match=f"left +{re.escape(reason)}"):
            fastadapt.accelerate(model)
        model.more = more
        (row, _) = fastadapt.accelerate(model).rows
        assert row.state == "left" and row.reason.startswith(reason) and type(model) is kind
        assert not peft_prefix._hooked(peft_prefix.backbone(model))
