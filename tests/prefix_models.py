"""Small random models of Hugging Face for the tests of prefixes, and what they compare."""

import collections
import copy
import re

import pytest
import torch

from .accuracy import excess
from .battery import DEVICE

hf = pytest.importorskip("transformers", reason="transformers is not installed (pip install fastadapt[peers])")

P, T, VOCABULARY = 5, 7, 40
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(**options):
    return hf.AutoModelForSequenceClassification.from_config(hf.BertConfig(**SIZES | OFF | options)), "SEQ_CLS"


def roberta(**options):
    """Its positions follow from the padding."""
    config = hf.RobertaConfig(**SIZES | OFF | {"pad_token_id": 1} | options)
    return hf.AutoModelForTokenClassification.from_config(config), "TOKEN_CLS"


def llama(kind=hf.LlamaConfig, **options):
    """Grouped queries and rotary positions."""
    return hf.AutoModelForCausalLM.from_config(kind(**SIZES | {"num_key_value_heads": 2} | options)), "CAUSAL_LM"


def gpt2(**options):
    """Learned positions, and queries, keys and values from one product."""
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.AutoModelForCausalLM.from_config(hf.GPT2Config(**SIZES | off | options)), "CAUSAL_LM"


MODELS = {"bert": bert, "roberta": roberta, "llama": llama, "gpt2": gpt2}


def batch(model, side=None, count=3):
    """Tokens with padding at one ``side`` of a part of them, and labels if the model has a loss."""
    ids, mask = torch.randint(3, VOCABULARY, (count, T), device=DEVICE), torch.ones(count, T, dtype=torch.long, device=DEVICE)
    if side == "left":
        mask[0, :3] = 0
    elif side == "right":
        mask[0, 4:] = mask[1, 6:] = 0
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    labels = ids if "CausalLM" in kind or "LMHead" in kind else ids % 2
    labels = ids[:, 3] % 2 if "SequenceClassification" in kind else labels.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "labels": labels} | ({} if side is None else {"attention_mask": mask})


def outcome(model, inputs):
    """What is seen of the logits, and the gradients of all that is trained."""
    result = model(**inputs)
    result.loss.backward()
    seen, logits = inputs.get("attention_mask"), result.logits.detach()
    logits = logits if seen is None or logits.dim() == 2 else logits[seen.bool()]
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return {"logits": logits, **grads}


def assert_equal_outcomes(fast, library, draw):
    """The rule of the battery over the batches of one call of ``draw``, or of four, pooled, if those of one don't keep it.

    One draw says little of the error of one number, as the gradient of a gate is. Returns how many batches there were.
    """
    kinds, models = collections.defaultdict(lambda: ([], [], [])), (fast, library, copy.deepcopy(library).double())
    count = 0
    for times in (1, 3):
        for inputs in [inputs for _ in range(times) for inputs in draw()]:
            count += 1
            for i, model in enumerate(models):
                for name, value in outcome(model, inputs).items():
                    kinds[re.sub(r"\d+", "*", name)][i].append(value)
        assert all(any(value.any() for value in parts[1]) for parts in kinds.values())
        wrong = [words for kind, parts in kinds.items() for words in excess(*parts, kind)]
        if not wrong:
            return count
    raise AssertionError("\n".join(wrong))


def state(model):
    """Classes, attributes and hooks of every module, and where its tensors lie."""
    return [
        (type(m), sorted(vars(m)), list(m._forward_pre_hooks.values()), [id(p) for p in m.parameters(recurse=False)])
        for m in model.modules()
    ]


def spy(monkeypatch):
    """The shapes of the keys of each call of prefix_attention: own ones and of the prefix."""
    from fastadapt.integrations import transformers

    seen, op = [], transformers.prefix_attention

    def spied(q, k, v, prefix_k, prefix_v, **options):
        seen.append((tuple(k.shape), tuple(prefix_k.shape)))
        return op(q, k, v, prefix_k, prefix_v, **options)

    monkeypatch.setattr(transformers, "prefix_attention", spied)
    return seen
