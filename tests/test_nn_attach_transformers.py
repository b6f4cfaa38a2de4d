"""Methods put into models of Hugging Face by name, beside the same models changed by hand; prompts."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastadapt.nn import (
    LoRALinear,
    ParallelAdapter,
    PromptEncoder,
    attach,
    drop_adapters,
    freeze_except,
    load_adapters,
    route,
    save_adapters,
)  # fmt: skip
from fastadapt.nn.structure import layers

from .battery import DEVICE
from .prefix_models import MODELS, OFF, SIZES, P, T, batch, hf, outcome

SMALL = {"num_hidden_layers": 1}


def tiny(name):
    return MODELS[name](**SMALL)[0].to(DEVICE)


def t5():
    sizes = {"vocab_size": 40, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0)).to(DEVICE)


def mixtral():
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES | SMALL, num_key_value_heads=2, num_local_experts=2)).to(DEVICE)


def qwen2_moe():
    sizes = {"num_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_key_value_heads": 2}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**SIZES | SMALL, **sizes)).to(DEVICE)


def switch():
    """Its experts are in a dict."""
    sizes = {"vocab_size": 40, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
    sizes |= {"num_decoder_layers": 1, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}
    sizes |= {"decoder_start_token_id": 0}
    return hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(**sizes)).to(DEVICE)


def prophetnet():
    """The last linear layer of its decoder's attention is of relative positions."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {f"num_{side}_layers": 1 for side in ("encoder", "decoder")}
    sizes |= {f"num_{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    return hf.ProphetNetForConditionalGeneration(hf.ProphetNetConfig(**sizes)).to(DEVICE)


def distilbert():
    sizes = {"vocab_size": 40, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0}
    return hf.DistilBertModel(hf.DistilBertConfig(**sizes, attention_dropout=0.0)).to(DEVICE)


# The projections of queries and values and the output of each attention, the first and the last module of the feed-forward
# block, in the first layer.
PARTS = {
    "bert": ("bert.encoder.layer.0", [("attention.self.query", "attention.self.value", "attention.output.dense")],
             ("intermediate.dense", "output.dense")),
    "gpt2": ("transformer.h.0", [("attn.c_attn", "attn.c_proj")], ("mlp.c_fc", "mlp.c_proj")),
    "llama": ("model.layers.0", [("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")],
              ("mlp.gate_proj", "mlp.down_proj")),
    "t5": ("decoder.block.0.layer", [("0.SelfAttention.q", "0.SelfAttention.v", "0.SelfAttention.o"),
           ("1.EncDecAttention.q", "1.EncDecAttention.v", "1.EncDecAttention.o")],
           ("2.DenseReluDense.wi", "2.DenseReluDense.wo")),
    "mixtral": ("model.layers.0", [("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")], ("block_sparse_moe",) * 2),
    "qwen2_moe": ("model.layers.0", [("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")], ("mlp",) * 2),
    "switch": ("decoder.block.0.layer", [("0.SelfAttention.q", "0.SelfAttention.v", "0.SelfAttention.o"),
               ("1.EncDecAttention.q", "1.EncDecAttention.v", "1.EncDecAttention.o")], ("2.mlp",) * 2),
    "prophetnet": ("prophetnet.decoder.layers.0", [("self_attn.value_proj", "self_attn.query_proj", "self_attn.out_proj"),
                   ("cross_attn.value_proj", "cross_attn.query_proj", "cross_attn.out_proj")],
                   ("feed_forward.intermediate", "feed_forward.output")),
    "distilbert": ("transformer.layer.0", [("attention.q_lin", "attention.v_lin", "attention.out_lin")],
                   ("ffn.lin1", "ffn.lin2")),
}  # fmt: skip
MAKERS = {f.__name__: f for f in (t5, mixtral, qwen2_moe, switch, prophetnet, distilbert)}


@pytest.mark.parametrize("name", PARTS)
def test_layers_are_found(name):
    model = MAKERS.get(name, lambda: tiny(name))()
    expected, attentions, block = PARTS[name]
    if name in ("mixtral", "qwen2_moe", "switch") and not re.search(r"experts\.(expert_)?0", str(list(model.state_dict()))):
        pytest.skip("from transformers 5 on experts are no linear layers")
    found = layers(model)
    layer = found[-1]
    assert len(found) == 1 + model.config.is_encoder_decoder and layer.name == expected
    assert [(*a.projections, a.output) for a in layer.attentions] == [
        tuple(f"{expected}.{part}" for part in parts) for parts in attentions
    ]
    assert tuple(layer.feed_forward) == tuple(f"{expected}.{part}" for part in block)


def after_both(model, adapters):
    layer = model.bert.encoder.layer[0]
    layer.attention.output.dense = nn.Sequential(layer.attention.output.dense, adapters[0])
    layer.output.dense = nn.Sequential(layer.output.dense, adapters[1])


def beside_of_bert(model, adapters):
    layer = model.bert.encoder.layer[0]
    layer.intermediate = ParallelAdapter(nn.Sequential(layer.intermediate, layer.output.dense), adapters[0])
    layer.output.dense = nn.Identity()


def beside_of_gpt2(model, adapters):
    model.transformer.h[0].mlp = ParallelAdapter(model.transformer.h[0].mlp, adapters[0])


def around_of_llama(model, adapters):
    attention = model.model.layers[0].self_attn
    attention.q_proj, attention.v_proj = adapters


@pytest.mark.parametrize(
    ("name", "method", "by_hand"),
    [
        ("bert", "houlsby", after_both), ("bert", "parallel", beside_of_bert), ("gpt2", "parallel", beside_of_gpt2),
        ("llama", "lora", around_of_llama),
    ],
)  # fmt: skip
def test_equals_modules_placed_by_hand(name, method, by_hand):
    model = tiny(name)
    other = copy.deepcopy(model)
    modules = [model.get_submodule(n) for n in attach(model, method, r=4)]
    for module in modules:
        nn.init.normal_(module.lora_B.weight if isinstance(module, LoRALinear) else module.up.weight)
    by_hand(other, copy.deepcopy(modules))
    kind = "lora" if method == "lora" else "bottleneck"
    freeze_except(model, kind), freeze_except(other, kind)
    inputs = batch(model, side="right")
    expected, actual = outcome(other, inputs), outcome(model, inputs)
    assert torch.equal(actual.pop("logits"), expected.pop("logits"))
    assert len(actual) == len(expected) >= 2
    for value, wanted in zip(actual.values(), expected.values()):
        assert torch.equal(value, wanted) and value.any()


def test_mam_trains_prefix_and_parallel_and_drops():
    model = MODELS["llama"]()[0].to(DEVICE)
    bare = copy.deepcopy(model)
    names = attach(model, "mam", p=P, hidden=8, gate="per_head", r=4)
    assert names == ["prefix_encoder", *(f"model.layers.{i}.mlp.down_proj.attached" for i in range(2))]
    assert model.prefix_encoder.p == P and model.get_submodule(names[1]).r == 4
    trained = freeze_except(model, ("prefix", "bottleneck"))
    inputs = batch(model)
    grads = outcome(model, inputs)
    assert set(grads) - {"logits"} == set(trained)
    torch.testing.assert_close(grads["logits"], bare(**inputs).logits)  # gates and up projections start at zero
    with torch.no_grad():
        nn.init.normal_(model.get_submodule(names[2]).up.weight)
        model.prefix_encoder.gate[1] = 0.5
    expected, twin = bare(**inputs).logits, copy.deepcopy(model)
    with drop_adapters(model, [1]):
        torch.testing.assert_close(model(**inputs).logits, expected)
        with drop_adapters(twin, [0]):
            assert not torch.allclose(twin(**inputs).logits, expected, atol=1e-3)
    assert torch.equal(model(**inputs).logits, twin(**inputs).logits)
    assert not any("fastadapt_dropped" in vars(module) or "_drops" in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match="model must have no prefix yet"):
        attach(model, "prefix", p=P)
    other = tiny("gpt2")
    keys = list(other.state_dict())
    with pytest.raises(ValueError, match="gate must be one of"):
        attach(other, "mam", p=P, gate="none", r=4)
    assert list(other.state_dict()) == keys and not any(m._forward_hooks for m in other.modules())


def test_where_prefixes_go_is_in_their_file(tmp_path):
    source, moved, unshifted, same = (MODELS["llama"]()[0].to(DEVICE) for _ in range(4))
    for model in (source, same):
        attach(model, "prefix", targets="model.layers.0.self_attn", p=P)
    attach(moved, "prefix", targets="model.layers.1.self_attn", p=P)
    attach(unshifted, "prefix", targets="model.layers.0.self_attn", p=P, shift_positions=False)
    save_adapters(source, tmp_path / "a")
    for other, message in (
        (moved, r"prefix_encoder has layers=\[0\] in the file, layers=\[1\] in the model"),
        (unshifted, "prefix_encoder has shift_positions=True in the file, shift_positions=False in the model"),
    ):
        before = other.prefix_encoder.prefix.clone()
        with pytest.raises(ValueError, match=message):
            load_adapters(other, tmp_path / "a")
        assert torch.equal(other.prefix_encoder.prefix, before)
    assert load_adapters(same, tmp_path / "a") == ["prefix_encoder.prefix"]
    assert torch.equal(same.prefix_encoder.prefix, source.prefix_encoder.prefix)


def with_prompt(model, inputs):
    """The same call, written out."""
    ids, count = inputs["input_ids"], len(inputs["input_ids"])
    embeds = model.get_input_embeddings()(ids)
    call = {"inputs_embeds": torch.cat([model.prompt.prompt().expand(count, -1, -1), embeds], 1)}
    if "attention_mask" in inputs:
        call["attention_mask"] = torch.cat([torch.ones(count, P, dtype=torch.long, device=DEVICE), inputs["attention_mask"]], 1)
    labels = inputs["labels"]
    call["labels"] = labels if labels.dim() == 1 else torch.cat([labels.new_full((count, P), -100), labels], 1)
    return call


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_prompt(name):
    model = tiny(name)
    assert attach(model, "prompt", p=P) == ["prompt"]
    vocabulary = model.get_input_embeddings().weight
    assert all((vocabulary == row).all(1).any() for row in model.prompt.weight)  # starts as tokens
    plain = copy.deepcopy(model)
    plain._forward_pre_hooks.clear()
    inputs = batch(model, side="right")
    assert list(freeze_except(model, "prompt")) == ["prompt.weight"] and len(freeze_except(plain, "prompt")) == 1
    result, expected = model(**inputs), plain(**with_prompt(plain, inputs))
    assert torch.equal(result.logits, expected.logits) and torch.equal(result.loss, expected.loss)
    result.loss.backward(), expected.loss.backward()
    assert torch.equal(model.prompt.weight.grad, plain.prompt.weight.grad) and model.prompt.weight.grad.any()
    types = {"token_type_ids": inputs["input_ids"] % 2}
    assert model(inputs["input_ids"], **types).logits.shape[-1] == result.logits.shape[-1]  # by position too
    with pytest.raises(ValueError, match="model must have no prompt yet"):
        attach(model, "prompt", p=P)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompt_in_generation(name):
    """With a cache the prompt is read once, and each sequence goes on as without padding and cache."""
    model = tiny(name).eval()
    attach(model, "prompt", prompt=PromptEncoder(P, 32, hidden=8).to(DEVICE))
    inputs = batch(model, side="left", count=2)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    made = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    assert made.shape == (2, T + 4)
    for row, mask in zip(made, inputs["attention_mask"]):
        tokens = row[:T][mask.bool()]
        with torch.no_grad():
            for _ in range(4):
                tokens = torch.cat([tokens, model(tokens[None]).logits[0, -1:].argmax(-1)])
        assert torch.equal(tokens[-4:], row[T:])


@pytest.mark.parametrize("method", ["lora", "dora", "kron", "lora_bank"])
def test_layers_that_the_model_looks_into(method):
    """T5 asks the last layer of a block for the dtype of its weight."""
    model, name = t5().eval(), "decoder.block.0.layer.2.DenseReluDense.wo"
    inputs = {key: torch.randint(1, 40, (2, 5), device=DEVICE) for key in ("input_ids", "decoder_input_ids")}
    weight, before = model.get_submodule(name).weight, model(**inputs).logits
    attach(model, method, targets=[name], **({"g": 2} if method == "lora_bank" else {}))
    layer = model.get_submodule(name)
    assert layer.weight is weight and layer.bias is None
    with torch.no_grad():
        for parameter in freeze_except(model, "kron" if method == "kron" else "lora").values():
            parameter.normal_(std=0.1)
        if method == "lora_bank":
            with route(model, torch.tensor([-1, -1], device=DEVICE)):
                torch.testing.assert_close(model(**inputs).logits, before)
            return
        adapted = model(**inputs).logits
        layer.merge()
        assert layer.weight is not weight and not torch.allclose(adapted, before, atol=1e-3)
        torch.testing.assert_close(model(**inputs).logits, adapted)


@pytest.mark.parametrize("options", [{}, {"factorized_rule": True}], ids=["rule", "factorized"])
def test_shared_rules_are_saved_with_the_model(options, tmp_path):
    model, other = tiny("bert").eval(), tiny("bert").eval()
    for m in (model, other):
        attach(m, "compacter", init_std=0.3, **options)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors", device=DEVICE)
    shared = [name for name in other.state_dict() if ".rule" in name]
    assert sum(name in state for name in shared) == len(shared) // 4 >= 1  # two adapters of two layers each
    assert all(".rule" in name for name in other.load_state_dict(state, strict=False).missing_keys)
    inputs = batch(model, side="right")
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_tied_embeddings_stay_tied(tmp_path):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | SMALL, tie_word_embeddings=True)).to(DEVICE)
    attach(model, "lora", targets="lm_head", r=2)
    model.model.embed_tokens.weight = nn.Parameter(torch.randn_like(model.model.embed_tokens.weight))
    model.tie_weights()
    assert model.lm_head.base.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in state and "lm_head.base.weight" not in state and "lm_head.lora_A.weight" in state


def test_prompts_that_models_refuse():
    for model in (t5(), hf.ViTModel(hf.ViTConfig(hidden_size=32, intermediate_size=48, **OFF, **SMALL, num_attention_heads=4))):
        with pytest.raises(ValueError, match="model must take inputs_embeds and be no encoder with a decoder"):
            attach(model, "prompt")
    with pytest.raises(TypeError, match="prompt must be a PromptEmbedding or a PromptEncoder, got Linear"):
        attach(tiny("gpt2"), "prompt", prompt=nn.Linear(2, 2))
