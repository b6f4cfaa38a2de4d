"""Soft prompts: learned vectors before the embedded tokens of a model (prompt tuning, P-tuning)."""

import torch
from torch import Tensor, nn

from .bottleneck import check_size
from .lora import adapter_dtype
from .prefix import check_dropout

KINDS = ("mlp", "lstm")


def prompt_inputs(
    p: int, *, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, labels: Tensor | None = None,
    ignore_index: int = -100,
) -> dict[str, Tensor]:  # fmt: skip
    """What a model gets beside embeddings that ``p`` vectors were put before.

    Args:
        p: length of the prompt.
        attention_mask: ``(b, t)``; the prompt is seen.
        position_ids: ``(b, t)`` or ``(1, t)``; the prompt is at 0 to ``p - 1`` and the tokens are ``p`` further on.
        labels: ``(b, t)``; the prompt has ``ignore_index``, which PyTorch's cross entropy leaves out.

    Returns:
        Those that are given, each ``(b, p + t)``, by their names.
    """
    extended = {}
    if attention_mask is not None:
        extended["attention_mask"] = torch.cat([attention_mask.new_ones(attention_mask.shape[0], p), attention_mask], 1)
    if position_ids is not None:
        first = torch.arange(p, dtype=position_ids.dtype, device=position_ids.device).expand(position_ids.shape[0], -1)
        extended["position_ids"] = torch.cat([first, position_ids + p], 1)
    if labels is not None:
        extended["labels"] = torch.cat([labels.new_full((labels.shape[0], p), ignore_index), labels], 1)
    return extended


class _Prompt(nn.Module):
    """``p`` vectors of width ``d``, put before the embeddings of a batch."""

    p: int
    d: int

    def prompt(self) -> Tensor:
        """The vectors, ``(p, d)``."""
        return self.weight

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """``(b, t, d)`` to ``(b, p + t, d)``; :func:`prompt_inputs` extends the mask, the positions and the labels."""
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.d:
            raise ValueError(f"inputs_embeds must be (b, t, {self.d}), got {tuple(inputs_embeds.shape)}")
        prompt = self.prompt().to(inputs_embeds.dtype).expand(inputs_embeds.shape[0], -1, -1)
        return torch.cat([prompt, inputs_embeds], 1)


class PromptEmbedding(_Prompt):
    """``p`` learned vectors before the embeddings of a batch. Source: Lester et al. 2021 (prompt tuning).

    Key of ``state_dict``: ``weight`` ``(p, d)``.

    Args:
        p, d: length of the prompt, width of the model.
        init_std: deviation of the normal start.
        device, dtype: of the parameter; the prompt is cast to the dtype of the embeddings.
    """

    def __init__(self, p: int, d: int, *, init_std: float = 1.0, device=None, dtype=None):
        super().__init__()
        check_size("p", p)
        check_size("d", d)
        self.p, self.d, self.init_std = p, d, init_std
        self.weight = nn.Parameter(torch.empty(p, d, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew, at random."""
        nn.init.normal_(self.weight, std=self.init_std)

    @classmethod
    @torch.no_grad()
    def from_tokens(cls, embedding: nn.Module, token_ids, p: int | None = None, *, dtype=None) -> "PromptEmbedding":
        """Start as the embedded tokens of a text, which is repeated or cut to length ``p``.

        Args:
            embedding: the input embeddings of the model, called with the ids.
            token_ids: those of the text, a sequence or a 1-d tensor.
            p: length of the prompt; None for that of the text.
            dtype: of the parameter; None for that of the embeddings, but float32 where they have 16 bits.
        """
        weight = embedding.weight
        ids = torch.as_tensor(token_ids, dtype=torch.int64, device=weight.device)
        if ids.dim() != 1 or not len(ids):
            raise ValueError(f"token_ids must be (length,) with at least one id, got {tuple(ids.shape)}")
        p = len(ids) if p is None else p
        check_size("p", p)
        start = embedding(ids.repeat(-(-p // len(ids)))[:p])
        prompt = cls(p, start.shape[1], device=weight.device, dtype=adapter_dtype(weight, dtype))
        prompt.weight.copy_(start)
        return prompt

    @classmethod
    def from_vocabulary(cls, embedding: nn.Module, p: int, *, dtype=None) -> "PromptEmbedding":
        """Start as ``p`` tokens drawn from the vocabulary with torch's generator; arguments as in :meth:`from_tokens`."""
        check_size("p", p)
        return cls.from_tokens(embedding, torch.randint(embedding.weight.shape[0], (p,)), dtype=dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}, d={self.d}"


class PromptEncoder(_Prompt):
    """A prompt whose vectors are the output of a small network for the time of training. Source: Liu et al. 2021 (P-tuning).

    The network reads ``p`` learned vectors: an MLP of three layers with ReLU, or a bidirectional LSTM and an MLP of two layers.
    It runs once a call, whatever the batch. :meth:`flatten` drops it after training.

    Keys of ``state_dict``: ``embedding.weight`` ``(p, d)``, those of ``lstm`` if there is one, and ``mlp.0``, ``mlp.2`` and
    without LSTM ``mlp.4``, each ``weight`` and ``bias``; after :meth:`flatten` only ``weight`` ``(p, d)``.

    Args:
        p, d: length of the prompt, width of the model.
        hidden: width of the network, of each direction of the LSTM; None for ``d``.
        kind: ``"mlp"`` or ``"lstm"``.
        layers: number of layers of the LSTM.
        dropout: between the layers of the LSTM, in training.
        device, dtype: of the parameters; the prompt is cast to the dtype of the embeddings.
    """

    def __init__(
        self, p: int, d: int, *, hidden: int | None = None, kind: str = "mlp", layers: int = 2, dropout: float = 0.0,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        hidden = d if hidden is None else hidden
        for name, value in (("p", p), ("d", d), ("hidden", hidden), ("layers", layers)):
            check_size(name, value)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        if check_dropout(dropout) and (kind == "mlp" or layers == 1):
            raise ValueError(f"dropout must be 0 without layers of an LSTM that it is between, got {dropout}")
        self.p, self.d, self.kind = p, d, kind
        factory = {"device": device, "dtype": dtype}
        self.weight = self.lstm = None
        self.embedding = nn.Embedding(p, d, **factory)
        widths = [d, hidden, hidden, d]
        if kind == "lstm":
            lstm = {"num_layers": layers, "dropout": dropout, "bidirectional": True, "batch_first": True}
            self.lstm = nn.LSTM(d, hidden, **lstm, **factory)
            widths = [2 * hidden, 2 * hidden, d]
        linears = [nn.Linear(k, n, **factory) for k, n in zip(widths, widths[1:])]
        layers = [layer for linear in linears for layer in (linear, nn.ReLU())]
        self.mlp = nn.Sequential(*layers[:-1])

    def prompt(self) -> Tensor:
        """The vectors, ``(p, d)``."""
        if self.weight is not None:
            return self.weight
        x = self.embedding.weight
        return self.mlp(x if self.lstm is None else self.lstm(x)[0])

    @torch.no_grad()
    def flatten(self) -> "PromptEncoder":
        """Replace the network by what it puts out in evaluation. Done once, after training; returns itself."""
        if self.weight is None:
            training = self.training
            weight = self.eval().prompt()
            self.weight = nn.Parameter(weight, requires_grad=self.mlp[0].weight.requires_grad)
            del self.embedding, self.lstm, self.mlp
            self.embedding = self.lstm = self.mlp = None
            self.train(training)
        return self

    def extra_repr(self) -> str:
        return f"p={self.p}, d={self.d}, kind={self.kind!r}"
