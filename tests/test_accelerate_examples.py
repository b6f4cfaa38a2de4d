"""The examples around ``peft``: the demo on models of peft, many adapters in one batch, merging into a checkpoint."""

import copy

import pytest
import torch

import fastadapt

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")

from safetensors.torch import load_file  # noqa: E402
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from examples import adapt, data, measure, merge, serve_many  # noqa: E402

from .accuracy import assert_within_reference_error  # noqa: E402
from .test_examples import WordTokenizer  # noqa: E402


def bert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertModel(BertConfig(**sizes), add_pooling_layer=False)


@pytest.mark.parametrize("method", adapt.OF_PEFT)
def test_the_demo_on_models_of_peft(method):
    words = [data.Sentence(f"a film {'splendid' if i % 3 else 'dreadful'} scene{i}", int(i % 3 > 0)) for i in range(128)]
    encoder = bert()
    models = adapt.pair_of_peft(encoder, method, fastadapt.accelerate, r=8, seed=1)
    shared = {p.data_ptr() for p in encoder.parameters()}
    for name, model in models.items():
        of_prefixes = adapt.METHODS[method].around
        replaced = [m for m in model.modules() if isinstance(m, peft.PeftModel if of_prefixes else peft.tuners.lora.LoraLayer)]
        assert len(replaced) == (1 if of_prefixes else 12 if method == "lora-all" else 4)
        assert all(type(m).__module__.startswith("peft.") == (name == "plain") for m in replaced)
        assert all((p.data_ptr() in shared) != p.requires_grad for p in model.parameters())
    runs = {name: measure.Run(model, 1e-2, 10) for name, model in models.items()}
    measure.train(list(runs.values()), data.Tokens(words, WordTokenizer()).training(32, 10, 0))
    ours, theirs = runs["fastadapt"], runs["plain"]
    if adapt.METHODS[method].random:
        assert measure.loss_difference(ours, theirs) > 1e-5 and measure.curve_difference(ours, theirs) <= 0.05
    else:
        assert measure.loss_difference(ours, theirs) <= 1e-3
    assert ours.losses[-1] < ours.losses[0]


def test_many_adapters_in_one_batch():
    library = serve_many.with_adapters(bert(), 3, 4, torch.float32)
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    batch = data.Batch(torch.randint(99, (4, 8)), torch.ones(4, 8), None)
    names = ["customer2", "customer0", "customer1", "customer2"]
    outputs = [serve_many.timed(model, batch, names)[1] for model in (library, fast)]
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(serve_many.timed(fast, batch, names[::-1])[1], outputs[1])


def llama(d=32):
    sizes = {"vocab_size": 61, "hidden_size": d, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=16))


ATTENTION = ["q_proj", "v_proj"]
MERGES = {
    "lora": (llama, {"target_modules": "all-linear"}),
    "rslora": (llama, {"target_modules": ATTENTION, "use_rslora": True}),
    "bias": (llama, {"target_modules": ATTENTION, "lora_bias": True}),
    "dora": (llama, {"target_modules": ATTENTION, "use_dora": True}),
    "patterns": (llama, {"target_modules": "all-linear", "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"1.mlp.*": 7}}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "whole": (llama, {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d-dora": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make, options", MERGES.values(), ids=MERGES)
def test_merging_into_a_checkpoint(tmp_path, capsys, make, options, dtype):
    """Against the library's own merging; the checkpoint is in several files."""
    base = make().to(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **options))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "adapter")
    double = copy.deepcopy(model).double().merge_and_unload().state_dict()
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    assert merge.main(arguments) == 0 and "layers merged into" in capsys.readouterr().out
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == sorted(file.name for file in (tmp_path / "base").glob("*.safetensors"))
    assert len(files) > 1 and (tmp_path / "out" / "config.json").exists()
    merged = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = model.merge_and_unload().state_dict()
    before = {name: tensor for file in (tmp_path / "base").glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in merged.items():
        assert_within_reference_error(tensor, expected[name], double[name], name)
        assert torch.equal(tensor, before[name]) == torch.equal(expected[name], before[name]), name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in merged.items())
    assert merge.main(arguments) == 1 and "exists" in capsys.readouterr().err


def test_merging_refuses_what_it_does_not_know(tmp_path, capsys):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    configs = {
        "must have one layer transformer.h.0.attn.c_attn, got none": (gpt2(), peft.LoraConfig(target_modules=["c_attn"])),
        "lora_a must be (r, k) = (8, 32), got (8, 16)": (llama(16), peft.LoraConfig(target_modules=["q_proj"])),
        "must hold a LoRA adapter, got IA3": (base, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    }
    for message, (model, config) in configs.items():
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
        assert merge.main([str(tmp_path / name) for name in ("base", "adapter", "out")]) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
