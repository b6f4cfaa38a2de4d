"""Prompts in models of Hugging Face whose heads ask for more than the logits of tokens, and in generation."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F

from .battery import DEVICE
from .prefix_models import OFF, SIZES, VOCABULARY, P, T, hf

from fastadapt.integrations.prompts import add_prompt  # isort: skip


def prompted(kind, task, **options):
    """A model with a prompt, and with weights that tell one token from another."""
    model = getattr(hf, f"{kind}{task}")(getattr(hf, f"{kind}Config")(**SIZES | OFF | options)).to(DEVICE).eval()
    for p in model.parameters():
        p.data.mul_(3)
    add_prompt(model, P)
    return model


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, T), device=DEVICE)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "BioGpt"])
@torch.no_grad()
def test_heads_that_read_the_last_token(kind, ids):
    """They give a sequence what they give it without its padding, or refuse."""
    model = prompted(kind, "ForSequenceClassification")
    left, right = (torch.cat(parts, 1) for parts in ((0 * ids[:, :2], ids), (ids, 0 * ids[:, :2])))
    positions = F.pad(torch.arange(T, device=DEVICE)[None], (2, 0))
    torch.testing.assert_close(model(left, attention_mask=left.ne(0).long(), position_ids=positions).logits, model(ids).logits)
    with pytest.raises(ValueError, match=f"padding at the left alone, since {kind}ForSequenceClassification reads the last"):
        model(right, attention_mask=right.ne(0).long())


@torch.no_grad()
def test_heads_that_read_the_first_position(ids):
    model, padded = prompted("Bert", "ForSequenceClassification"), torch.cat([ids, 0 * ids[:, :2]], 1)
    torch.testing.assert_close(model(padded, padded.ne(0).long()).logits, model(ids).logits)


WAYS = {
    "chunks": {"prefill_chunk_size": 3}, "look-up": {"prompt_lookup_num_tokens": 2}, "assistant": {},
    "static": {"cache_implementation": "static"}, "returned": {},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind, task", [("Llama", "ForCausalLM"), ("GPT2", "LMHeadModel")], ids=["llama", "gpt2"])
def test_generation_that_forgets_the_prompt(kind, task, way, ids):
    """It raises where it would otherwise put out other tokens."""
    model = prompted(kind, task)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCABULARY}
    ids, given = torch.cat([ids[:1], ids[:1]], 1), dict(WAYS[way])
    if way == "assistant":
        given["assistant_model"] = copy.deepcopy(model)
    if way == "returned":
        first = model.generate(ids, return_dict_in_generate=True, **options)
        given["past_key_values"], ids = first.past_key_values, torch.cat([first.sequences, ids], 1)
    expected = model.generate(ids, **options)
    name = "attention_mask must be" if way == "static" else "past_key_values must hold the prompt .* generate forgets"
    try:
        result = model.generate(ids, **options, **given)
    except ValueError as error:
        assert re.search(name, str(error))
    else:  # since transformers 5 the cache itself is asked now and then
        assert hf.__version__ >= "5" and torch.equal(result, expected)


@pytest.mark.parametrize("t", [T, T - 1])
@torch.no_grad()
def test_several_labels_of_a_sequence(t, ids):
    """They aren't labels of tokens, even if they are as many."""
    model = prompted("Bert", "ForSequenceClassification", num_labels=T, problem_type="multi_label_classification")
    labels = torch.rand(2, T, device=DEVICE).round()
    result = model(ids[:, :t], labels=labels)
    torch.testing.assert_close(result.loss, F.binary_cross_entropy_with_logits(result.logits, labels))


@torch.no_grad()
def test_answers_are_where_their_tokens_are(ids):
    """A start or an end outside of the tokens is left out as without a prompt, and one before them is the first."""
    model = prompted("Bert", "ForQuestionAnswering")
    given = {"start_positions": torch.tensor([3, -1]), "end_positions": torch.tensor([5, T + 1])}
    result = model(ids, **{name: t.to(DEVICE) for name, t in given.items()})
    start = F.cross_entropy(result.start_logits, torch.tensor([P + 3, P], device=DEVICE))
    end = F.cross_entropy(result.end_logits[:1], torch.tensor([P + 5], device=DEVICE))
    torch.testing.assert_close(result.loss, (start + end) / 2)
