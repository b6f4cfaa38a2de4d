"""Whole models of ``peft``, accelerated and not: logits, every gradient, the losses of a training run."""

import collections
import copy
import re

import pytest
import torch

import fastadapt

from .accuracy import excess
from .battery import DEVICE

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")

from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM  # noqa: E402

from examples import fetch  # noqa: E402

OPTIONS = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 4},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}


def llama():
    """Random, with grouped queries and RMSNorm."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2))
    ids = torch.randint(97, (50, 4, 12))
    return model, [{"input_ids": batch, "labels": batch} for batch in ids]


def minilm():
    """The encoder of the demo with a new head; its dropout is off."""
    folder = fetch.CACHE / "all-MiniLM-L6-v2"
    if not folder.exists():
        pytest.skip("the encoder is not there (python examples/fetch.py)")
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification.from_pretrained(folder, local_files_only=True, **off)
    ids, labels = torch.randint(1000, 20000, (50, 8, 16)), torch.randint(2, (50, 8))
    return model, [{"input_ids": batch, "labels": label} for batch, label in zip(ids, labels)]


def bert():
    """As the encoder of the demo, but small and random."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ids, labels = torch.randint(97, (50, 4, 12)), torch.randint(2, (50, 4))
    batches = [{"input_ids": batch, "labels": label} for batch, label in zip(ids, labels)]
    return BertForSequenceClassification(BertConfig(**sizes, **off)), batches


def pair(make, options, dtype=torch.float32):
    """A model of peft on all linear layers, away from its start, an accelerated copy, and its batches."""
    model, batches = make()
    task = "CAUSAL_LM" if make is llama else "SEQ_CLS"
    config = peft.LoraConfig(r=8, target_modules="all-linear", task_type=task, **options)
    library = peft.get_peft_model(model.to(dtype), config)
    with torch.no_grad():
        for name, p in library.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    fast = copy.deepcopy(library.to(DEVICE))
    report = fastadapt.accelerate(fast)
    assert not report.left and len(report.rows) == {llama: 3 * 7, minilm: 6 * 6 + 1, bert: 2 * 6 + 1}[make]
    return fast, library, [{name: t.to(DEVICE) for name, t in batch.items()} for batch in batches]


def outcome(model, batch):
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    result = model(**batch)
    grads = torch.autograd.grad(result.loss, list(wanted.values()))
    return {"logits": result.logits.detach(), **dict(zip(wanted, grads))}


def assert_equal_outcomes(fast, library, batches):
    """The error against a float64 run is at most twice the library's own, for each kind of tensor: over layers and batches."""
    oracle = copy.deepcopy(library).double()
    kinds = collections.defaultdict(lambda: ([], [], []))
    for i, model in enumerate((fast, library, oracle)):
        for batch in batches:
            for name, value in outcome(model, batch).items():
                kinds[re.sub(r"\d+", "*", name)][i].append(value)
    wrong = [words for kind, values in kinds.items() for words in excess(*values, kind)]
    assert not wrong, "\n".join(wrong)


def over(options, *makes):
    """Each model with each of the options; the pretrained one is slow."""
    slow = {minilm: pytest.mark.slow}
    params = [
        pytest.param(make, value, id=f"{make.__name__}-{name}", marks=slow.get(make, ()))
        for make in makes
        for name, value in options.items()
    ]
    return pytest.mark.parametrize("make, options", params)


@over(OPTIONS, llama, bert, minilm)
def test_equals_the_library(make, options):
    fast, library, batches = pair(make, options)
    assert_equal_outcomes(fast, library, batches[:4])


@over({name: OPTIONS[name] for name in ("lora", "dora")}, llama, minilm)
def test_losses_of_fifty_steps_are_the_same(make, options):
    *models, batches = pair(make, options)
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=2e-3, eps=1e-6)
        losses.append([])
        for batch in batches[:10] * 5:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    fast, library = losses
    assert library[-1] < library[0] - 0.05 and len(library) == 50
    assert max(abs(a - b) for a, b in zip(fast, library)) <= 1e-3


def test_bfloat16_with_float32_adapters():
    *models, batches = pair(llama, {}, torch.bfloat16)
    assert {p.dtype for p in models[0].parameters() if p.requires_grad} == {torch.float32}
    assert_equal_outcomes(*models, batches[:4])


@pytest.mark.parametrize("adapters_too", [False, True])
def test_fully_sharded(adapters_too):
    """FSDP2 around blocks gathers what the kernels read; around adapters it waits for calls, which the library makes."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fast, library, batches = pair(llama, {})
    expected = outcome(library, batches[0])
    init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(DEVICE, (1,))
        for block in fast.base_model.model.model.layers:
            for part in [p for m in block.modules() if isinstance(m, peft.tuners.lora.LoraLayer) for p in (m.lora_A, m.lora_B)]:
                if adapters_too:
                    fully_shard(part["default"], mesh=mesh)
            fully_shard(block, mesh=mesh)
        fully_shard(fast, mesh=mesh)(**batches[0]).loss.backward()
        for name, parameter in fast.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad.full_tensor(), expected[name])
    finally:
        destroy_process_group()
