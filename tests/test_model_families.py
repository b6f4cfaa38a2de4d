"""Small random models of many families of ``transformers``: ``accelerate`` and ``attach`` on all of their linear layers."""

import copy

import pytest
import torch

import fastadapt
from fastadapt.nn import attach, freeze_except
from fastadapt.nn.structure import layers

from .battery import DEVICE

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")
hf = pytest.importorskip("transformers", reason="transformers is not installed (pip install fastadapt[demo])")

D, V, T = 32, 64, 6
LIKE_LLAMA = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": V}
LIKE_BERT = LIKE_LLAMA | {"max_position_embeddings": V}
LIKE_GPT2 = {"vocab_size": V, "n_embd": D, "n_layer": 1, "n_head": 4, "n_positions": V}
LIKE_T5 = {"vocab_size": V, "d_model": D, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
LIKE_BART = {"vocab_size": V, "d_model": D, "decoder_start_token_id": 2, "encoder_layers": 1, "decoder_layers": 1}
LIKE_BART |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
LIKE_BART |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
LIKE_VIT = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16}
# Class of the model: its configuration, and of its first layer the projections of queries and values, the output of attention,
# the first and the last linear layer of the feed-forward block.
QV, OUT = ("q_proj", "v_proj"), ("v_proj", "q_proj")
FAMILIES = {
    "OPTForCausalLM": (
        {k: v for k, v in LIKE_BERT.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": D},
        (OUT, "out_proj", "fc1", "fc2"),
    ),
    "BloomForCausalLM": (
        {"vocab_size": V, "hidden_size": D, "n_layer": 1, "n_head": 4},
        (("query_key_value",), "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "GPTNeoXForCausalLM": (LIKE_BERT, (("query_key_value",), "dense", "dense_h_to_4h", "dense_4h_to_h")),
    "GPTJForCausalLM": (LIKE_GPT2 | {"rotary_dim": 4}, (OUT, "out_proj", "fc_in", "fc_out")),
    "GPT2LMHeadModel": (LIKE_GPT2, (("c_attn",), "c_proj", "c_fc", "c_proj")),
    "FalconForCausalLM": (
        {k: v for k, v in LIKE_LLAMA.items() if k != "intermediate_size"} | {"bias": True},
        (("query_key_value",), "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "MptForCausalLM": (
        {"vocab_size": V, "d_model": D, "n_layers": 1, "n_heads": 4, "max_seq_len": V},
        (("Wqkv",), "out_proj", "up_proj", "down_proj"),
    ),
    "PhiForCausalLM": (LIKE_BERT, (QV, "dense", "fc1", "fc2")),
    "Phi3ForCausalLM": (LIKE_LLAMA | {"pad_token_id": 0}, (("qkv_proj",), "o_proj", "gate_up_proj", "down_proj")),
    "Gemma2ForCausalLM": (
        LIKE_LLAMA | {"num_key_value_heads": 2, "head_dim": 8}, (QV, "o_proj", "gate_proj", "down_proj")
    ),
    "Qwen3ForCausalLM": (LIKE_LLAMA | {"num_key_value_heads": 2, "head_dim": 8}, (QV, "o_proj", "gate_proj", "down_proj")),
    "AlbertForMaskedLM": (LIKE_BERT | {"embedding_size": 16}, (("query", "value"), "dense", "ffn", "ffn_output")),
    "DebertaForMaskedLM": (LIKE_BERT, (("in_proj",), "dense", "dense", "dense")),
    "DebertaV2ForMaskedLM": (
        LIKE_BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        (("query_proj", "value_proj"), "dense", "dense", "dense"),
    ),
    "ModernBertForMaskedLM": (
        LIKE_BERT | {"pad_token_id": 0, "attn_implementation": "sdpa", "reference_compile": False},
        (("Wqkv",), "Wo", "Wi", "Wo"),
    ),
    "MT5ForConditionalGeneration": (LIKE_T5, (("q", "v"), "o", "wi_0", "wo")),
    "BartForConditionalGeneration": (LIKE_BART, (OUT, "out_proj", "fc1", "fc2")),
    "WhisperForConditionalGeneration": (
        LIKE_BART | {"num_mel_bins": 8, "max_source_positions": 8, "pad_token_id": 0}, (OUT, "out_proj", "fc1", "fc2")
    ),
    "ViTForImageClassification": (LIKE_VIT | {"patch_size": 8}, (("query", "value"), "dense", "dense", "dense")),
    "SwinForImageClassification": (
        {"image_size": 16, "patch_size": 4, "embed_dim": D, "depths": [1], "num_heads": [4], "window_size": 4},
        (("query", "value"), "dense", "dense", "dense"),
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request):
    """The model, its inputs, and what its first layer is made of."""
    options, parts = FAMILIES[request.param]
    kind = getattr(hf, request.param)
    model = kind(kind.config_class(**options)).to(DEVICE).eval()
    tokens = lambda: torch.randint(3, V, (2, T), device=DEVICE)  # noqa: E731
    inputs = {"input_ids": tokens()}
    if request.param.endswith("ImageClassification"):
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, device=DEVICE)}
    elif request.param.startswith("Whisper"):
        inputs = {"input_features": torch.randn(2, 8, 16, device=DEVICE)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens()
    return model, inputs, parts


def outcome(model, inputs):
    """The logits, and the gradients of all that is trained for a random sum of them."""
    logits = model(**inputs).logits
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return {"logits": logits.detach()} | dict(zip(wanted, torch.autograd.grad((logits * weights).sum(), wanted.values())))


def test_layers_are_found(family):
    model, _, parts = family
    layer = layers(model)[0]
    last = lambda name: name.rpartition(".")[2]  # noqa: E731
    projections, output = layer.attentions[0]
    found = tuple(map(last, projections)), last(output), *map(last, layer.feed_forward)
    assert found == parts


@pytest.mark.parametrize("dora", [False, True])
def test_accelerated_lora_equals_that_of_peft(family, dora):
    model, inputs, _ = family
    options = {"target_modules": "all-linear", "fan_in_fan_out": isinstance(model, hf.GPT2LMHeadModel), "use_dora": dora}
    config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
    library = peft.get_peft_model(model, config)
    fast = copy.deepcopy(library)
    report = fastadapt.accelerate(fast)
    assert report.rows and not report.left
    expected = outcome(library, inputs)
    for name, value in outcome(fast, inputs).items():
        error = torch.linalg.vector_norm(value - expected[name]) / torch.linalg.vector_norm(expected[name])
        assert error < 1e-4, f"{name}: {error}"
    fastadapt.restore(fast)
    assert torch.equal(outcome(fast, inputs)["logits"], expected["logits"])


@pytest.mark.parametrize("method", ["lora", "kron"])
def test_attached_adapters_keep_the_outputs_and_learn(family, method):
    model, inputs, _ = family
    before = model(**inputs).logits
    blocks = [name for layer in layers(model) for a in layer.attentions for name in (*a.projections, a.output)]
    blocks += [name for layer in layers(model) for name in layer.feed_forward]
    attach(model, method, targets=list(dict.fromkeys(blocks)))
    trained = freeze_except(model, method)
    after = outcome(model, inputs)
    torch.testing.assert_close(after["logits"], before, rtol=1e-4, atol=1e-5)
    second = {"lora": "lora_B.weight", "kron": "kron.b"}[method]  # starts at zero; the first factor learns after it
    assert trained.keys() == after.keys() - {"logits"}
    assert all(after[name].any() for name in trained if name.endswith(second))
