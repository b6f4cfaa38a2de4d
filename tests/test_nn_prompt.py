"""Soft prompts: the vectors before the tokens, what they start from, and the networks of P-tuning as peft has them."""

import pytest
import torch
from torch import nn

from fastadapt.nn import PromptEmbedding, PromptEncoder, freeze_except, prompt_inputs

P, D, B, T, VOCABULARY = 5, 16, 3, 4, 11


@pytest.mark.parametrize(
    "make", [PromptEmbedding, PromptEncoder, lambda *sizes: PromptEncoder(*sizes, kind="lstm", hidden=6, dropout=0.3)]
)
def test_prompts_come_first_and_get_the_gradient_of_the_batch(make):
    prompt = make(P, D).double().eval()
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    y = prompt(x)
    assert y.shape == (B, P + T, D) and torch.equal(y[:, P:], x)
    assert all(torch.equal(row, prompt.prompt()) for row in y[:, :P])
    grad_y = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *prompt.parameters()], grad_y)
    assert torch.equal(grads[0], grad_y[:, P:])
    expected = torch.autograd.grad(prompt.prompt(), list(prompt.parameters()), grad_y[:, :P].sum(0))
    for ours, theirs in zip(grads[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert prompt(x.bfloat16()).dtype == torch.bfloat16


def test_prompts_from_text_and_from_the_vocabulary():
    words = nn.Embedding(VOCABULARY, D)
    for p, expected in ((None, [3, 1, 4]), (2, [3, 1]), (7, [3, 1, 4, 3, 1, 4, 3])):
        prompt = PromptEmbedding.from_tokens(words, [3, 1, 4], p)
        assert torch.equal(prompt.weight, words.weight[expected]) and prompt.weight.requires_grad
    sampled = PromptEmbedding.from_vocabulary(words, P)
    assert sampled.weight.shape == (P, D)
    assert all((words.weight == row).all(1).any() for row in sampled.weight)
    assert PromptEmbedding.from_vocabulary(words.bfloat16(), P).weight.dtype == torch.float32
    assert list(sampled.state_dict()) == ["weight"]


def test_inputs_are_extended():
    mask, labels = torch.tensor([[1, 1, 0], [0, 1, 1]]), torch.tensor([[7, 8, -100], [-100, 5, 6]])
    assert prompt_inputs(2) == {}
    found = prompt_inputs(2, attention_mask=mask, position_ids=torch.arange(3)[None], labels=labels)
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 1, 1]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert found["labels"].tolist() == [[-100, -100, 7, 8, -100], [-100, -100, -100, 5, 6]]
    assert prompt_inputs(1, attention_mask=mask.bool())["attention_mask"].dtype == torch.bool


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_encoder_is_that_of_peft(kind):
    pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")
    from peft import PromptEncoder as Theirs
    from peft import PromptEncoderConfig

    config = PromptEncoderConfig(
        peft_type="P_TUNING", num_virtual_tokens=P, token_dim=D, num_transformer_submodules=1, num_attention_heads=2,
        num_layers=2, encoder_reparameterization_type=kind.upper(), encoder_hidden_size=6,
    )  # fmt: skip
    theirs, ours = Theirs(config), PromptEncoder(P, D, hidden=6, kind=kind)
    ours.load_state_dict({name.replace("_head", ""): t for name, t in theirs.state_dict().items()})
    torch.testing.assert_close(ours.prompt(), theirs(torch.arange(P)[None])[0])


@pytest.mark.parametrize("options", [{}, {"kind": "lstm", "dropout": 0.5}], ids=["mlp", "lstm"])
def test_flatten_drops_the_network_and_keeps_the_prompt(options):
    encoder = PromptEncoder(P, D, **options)
    with torch.no_grad():  # where PyTorch's LSTM has kernels, and bits, of its own
        before = encoder.eval().prompt()
    runs = []
    encoder.mlp.register_forward_hook(lambda module, args, y: runs.append(args[0].shape[0]))
    encoder(torch.randn(B, T, D))
    assert runs == [P]  # once, not once a sequence
    assert encoder.train().flatten() is encoder and encoder.training
    assert torch.equal(encoder.prompt(), before) and list(encoder.state_dict()) == ["weight"]
    loaded = PromptEmbedding(P, D)
    loaded.load_state_dict(encoder.state_dict())
    assert torch.equal(loaded.prompt(), before)


def test_freeze_except_prompts():
    model = nn.ModuleDict({"prompt": PromptEmbedding(P, D), "head": nn.Linear(D, 2)})
    assert list(freeze_except(model, "prompt")) == ["prompt.weight"]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: PromptEmbedding(0, D), ValueError, "p must be at least 1, got 0"),
        (lambda: PromptEncoder(P, D, kind="gru"), ValueError, r"kind must be one of \('mlp', 'lstm'\), got 'gru'"),
        (lambda: PromptEncoder(P, D, dropout=0.1), ValueError, "dropout must be 0 without layers of an LSTM"),
        (lambda: PromptEmbedding(P, D)(torch.zeros(2, 3, 4)), ValueError, r"inputs_embeds must be \(b, t, 16\), got"),
        (
            lambda: PromptEmbedding.from_tokens(nn.Embedding(3, D), []),
            ValueError,
            r"token_ids must be \(length,\) with at least one id, got \(0,\)",
        ),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
