"""Prefixes for attention: prefix tuning, deep prompts (P-tuning v2), and LLaMA-Adapter's gated prefixes."""

from collections.abc import Iterable
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._leaf import BACKENDS
from ..ops.prefix_attention import prefix_attention
from .bottleneck import check_size
from .route import Routed

GATES = (None, "per_head", "scalar")


class Prefix(NamedTuple):
    """The prefix of one attention layer; the fields are those arguments of :func:`fastadapt.prefix_attention`."""

    key: Tensor
    value: Tensor
    gate: Tensor | None = None
    adapter_ids: Tensor | None = None
    backend: str | None = None


def check_dropout(dropout) -> float:
    if not isinstance(dropout, Real) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
    return float(dropout)


class PrefixEncoder(nn.Module):
    """The keys and values of ``p`` learned positions for each of ``layers`` attention layers.

    The prefixes are a parameter, or with ``hidden`` the output of an MLP, ``output(tanh(hidden(embedding)))``, for the time of
    training: the reparametrisation of prefix tuning. It runs once a call, whatever the batch, and :meth:`flatten` drops it
    afterwards. One encoder for all layers of a model is P-tuning v2. With ``gate`` it is LLaMA-Adapter, but for keys and values
    that are learned as such and aren't the layer's projections of learned vectors. Sources: Li and Liang 2021, Liu et al. 2022
    (P-tuning v2), Zhang et al. 2023 (LLaMA-Adapter).

    Keys of ``state_dict``: ``prefix`` ``(layers, 2, h_kv, p, e)``, keys before values; or ``embedding.weight`` ``(p, width)``,
    ``hidden.weight``, ``hidden.bias``, ``output.weight`` ``(layers * 2 * h_kv * e, hidden)`` and ``output.bias``; and ``gate``
    ``(layers, h)`` or ``(layers, 1)``, before its tanh.

    Args:
        h_kv, p, e: number of heads of the keys, length of the prefix, width of a head.
        layers: number of attention layers.
        hidden: width of the hidden layer of the MLP; None for no MLP.
        width: width of the embedding of the MLP; None for ``h_kv * e``.
        dropout: probability that an element of a prefix is zeroed in training.
        gate: ``"per_head"`` or ``"scalar"`` gives the prefix a softmax of its own, times the tanh of a learned gate for each
            head or for all. It starts at zero: a new prefix changes nothing. None: one softmax, no gate.
        h: number of heads of the queries, one gate each; None for ``h_kv``.
        init_std: deviation of the normal start of the prefix, or of the embedding of the MLP.
        device, dtype: of the parameters. float32 parameters serve 16-bit activations too.
    """

    placed: dict = {}  # how a model that it was added to takes the prefixes, see options()

    def __init__(
        self, h_kv: int, p: int, e: int, layers: int = 1, *, hidden: int | None = None, width: int | None = None,
        dropout: float = 0.0, gate: str | None = None, h: int | None = None, init_std: float = 1.0, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        h, width = h_kv if h is None else h, h_kv * e if width is None else width
        sizes = {"h_kv": h_kv, "p": p, "e": e, "layers": layers, "h": h, "width": width}
        for name, value in (sizes if hidden is None else {**sizes, "hidden": hidden}).items():
            check_size(name, value)
        if gate not in GATES:
            raise ValueError(f"gate must be one of {GATES}, got {gate!r}")
        self.h_kv, self.p, self.e, self.layers, self.h = h_kv, p, e, layers, h
        self.dropout, self.init_std = check_dropout(dropout), init_std
        factory = {"device": device, "dtype": dtype}
        self.embedding = self.hidden = self.output = self.prefix = self.gate = None
        if hidden is None:
            self.prefix = nn.Parameter(torch.empty(layers, 2, h_kv, p, e, **factory))
        else:
            self.embedding = nn.Embedding(p, width, **factory)
            self.hidden = nn.Linear(width, hidden, **factory)
            self.output = nn.Linear(hidden, layers * 2 * h_kv * e, **factory)
        if gate is not None:
            self.gate = nn.Parameter(torch.empty(layers, h if gate == "per_head" else 1, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew."""
        if self.hidden is not None:
            self.hidden.reset_parameters()
            self.output.reset_parameters()
        nn.init.normal_(self.embedding.weight if self.prefix is None else self.prefix, std=self.init_std)
        if self.gate is not None:
            self.gate.zero_()

    def _values(self) -> Tensor:
        """``(layers, 2, h_kv, p, e)``, before dropout."""
        if self.prefix is not None:
            return self.prefix
        y = self.output(torch.tanh(self.hidden(self.embedding.weight)))
        return y.view(self.p, self.layers, 2, self.h_kv, self.e).permute(1, 2, 3, 0, 4).contiguous()

    def forward(self) -> tuple[Prefix, ...]:
        """One prefix a layer: key and value ``(h_kv, p, e)``, and gate ``(h,)`` or None."""
        values = F.dropout(self._values(), self.dropout, self.training)
        pairs = values.flatten(0, 1).unbind()  # unlike that of indices, its backward makes one tensor for all layers
        gates = [None] * self.layers if self.gate is None else self.gate.tanh().expand(-1, self.h).unbind()
        return tuple(map(Prefix, pairs[::2], pairs[1::2], gates))

    @torch.no_grad()
    def flatten(self) -> "PrefixEncoder":
        """Replace the MLP by what it puts out: the same prefixes as a parameter. Done once, after training; returns itself."""
        if self.prefix is None:
            self.prefix = nn.Parameter(self._values(), requires_grad=self.output.weight.requires_grad)
            del self.embedding, self.hidden, self.output
            self.embedding = self.hidden = self.output = None
        return self

    def options(self) -> dict:
        """What decides on the result and doesn't show in the shapes of the parameters: ``layers``, the places that the prefixes
        have among the attention layers of a model, and ``shift_positions``, both of ``add_prefix``."""
        return self.placed

    def extra_repr(self) -> str:
        gate = None if self.gate is None else "scalar" if self.gate.shape[1] == 1 else "per_head"
        return f"h_kv={self.h_kv}, p={self.p}, e={self.e}, layers={self.layers}, dropout={self.dropout}, gate={gate}"


class PrefixAttention(Routed):
    """Multi-head attention with learned prefixes, run by :func:`fastadapt.prefix_attention`.

    Prefixes have names. One of them, the active one, serves the whole batch; with ``adapter_ids`` each row has its own. A new
    module has the prefix ``"default"``, if ``p`` is given, and it is active. Sources: as for :class:`PrefixEncoder`.

    Keys of ``state_dict``: those of the linear layers ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, and for each name those
    of its :class:`PrefixEncoder` under ``prefixes.<name>``.

    Args:
        d, h: width of the model, number of heads.
        h_kv: number of heads of keys and values, a divisor of ``h``; None for ``h``.
        e: width of a head; None for ``d / h``.
        p: length of the prefix ``"default"``; None for no prefix yet.
        gate: of new prefixes, see :class:`PrefixEncoder`.
        bias: biases in the four projections.
        dropout: probability that an attention weight is dropped in training.
        backend: as in :func:`fastadapt.prefix_attention`; also an attribute.
        device, dtype: of the parameters.
    """

    def __init__(
        self, d: int, h: int, h_kv: int | None = None, *, e: int | None = None, p: int | None = None, gate: str | None = None,
        bias: bool = True, dropout: float = 0.0, backend: str | None = None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        h_kv = h if h_kv is None else h_kv
        for name, value in (("d", d), ("h", h), ("h_kv", h_kv)):
            check_size(name, value)
        if h % h_kv:
            raise ValueError(f"h_kv must divide h = {h}, got {h_kv}")
        if e is None and d % h:
            raise ValueError(f"d must be a multiple of h = {h} where e is None, got {d}")
        e = d // h if e is None else e
        check_size("e", e)
        if gate not in GATES:
            raise ValueError(f"gate must be one of {GATES}, got {gate!r}")
        if backend not in (None, *BACKENDS):
            raise ValueError(f"backend must be one of {(None, *BACKENDS)}, got {backend!r}")
        self.d, self.h, self.h_kv, self.e, self.gate = d, h, h_kv, e, gate
        self.dropout, self.backend = check_dropout(dropout), backend
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(d, h * e, **factory)
        self.k_proj, self.v_proj = nn.Linear(d, h_kv * e, **factory), nn.Linear(d, h_kv * e, **factory)
        self.o_proj = nn.Linear(h * e, d, **factory)
        self.prefixes = nn.ModuleDict()
        self.active: str | None = None
        if p is not None:
            self.add("default", p)
            self.activate("default")

    @property
    def names(self) -> list[str]:
        """The names of the prefixes, in the order of their ids."""
        return list(self.prefixes)

    def options(self) -> dict:
        """What decides which prefix an id means."""
        return {"names": self.names}

    def add(self, name: str, prefix: int | PrefixEncoder, **options) -> PrefixEncoder:
        """Add a prefix: of a length, made with ``options`` of :class:`PrefixEncoder`, or one that exists. Returns it."""
        if name in self.prefixes:
            raise ValueError(f"name must be a new one, got {name!r}, which is among {self.names}")
        if not isinstance(prefix, PrefixEncoder):
            weight = self.k_proj.weight
            options = {"gate": self.gate, "h": self.h, "device": weight.device, "dtype": weight.dtype, **options}
            prefix = PrefixEncoder(self.h_kv, prefix, self.e, **options)
        elif options:
            raise ValueError(f"options must be left out where prefix is a PrefixEncoder, got {sorted(options)}")
        sizes, own = (prefix.h_kv, prefix.e, prefix.layers, prefix.h), (self.h_kv, self.e, 1, self.h)
        if sizes != own:
            raise ValueError(f"prefix must have (h_kv, e, layers, h) = {own}, got {sizes}")
        self.prefixes[name] = prefix.train(self.training)
        return prefix

    def remove(self, name: str) -> PrefixEncoder:
        """Remove a prefix and return it. Those after it get ids that are one less; without the active one none is active."""
        self._known(name)
        if self.active == name:
            self.active = None
        return self.prefixes.pop(name)

    def activate(self, name: str | None) -> None:
        """Use the prefix ``name`` where no ids are given, or with None no prefix."""
        if name is not None:
            self._known(name)
        self.active = name

    def _known(self, name: str) -> None:
        if name not in self.prefixes:
            raise ValueError(f"name must be one of {self.names}, got {name!r}")

    def ids(self, names: Iterable[str | None]) -> Tensor:
        """``adapter_ids`` for a batch by the name of each row's prefix; None for no prefix."""
        places = {None: -1, **{name: i for i, name in enumerate(self.prefixes)}}
        names = list(names)
        for name in names:
            if name is not None:
                self._known(name)
        return torch.tensor([places[name] for name in names], dtype=torch.int64, device=self.k_proj.weight.device)

    def _bank(self, adapter_ids: Tensor) -> Prefix:
        """All prefixes as one, for a row each."""
        prefixes = [encoder()[0] for encoder in self.prefixes.values()]
        if len({(prefix.key.shape, prefix.gate is None) for prefix in prefixes}) != 1:
            raise ValueError("adapter_ids need prefixes of one length that all have a gate or all have none")
        keys, values, gates = zip(*(prefix[:3] for prefix in prefixes))
        if gates[0] is None:
            return Prefix(torch.stack(keys), torch.stack(values), None, adapter_ids)
        if self.h != self.h_kv and any(encoder.gate.shape[1] > 1 for encoder in self.prefixes.values()):
            raise ValueError(f"adapter_ids need gate='scalar' or h_kv = h = {self.h} where prefixes have gates")
        # The op's gate is one for the batch, so those of the prefixes go into their values.
        values = [value * gate[: self.h_kv, None, None] for value, gate in zip(values, gates)]
        return Prefix(torch.stack(keys), torch.stack(values), torch.ones_like(gates[0]), adapter_ids)

    def _prefix(self, x: Tensor, adapter_ids: Tensor | None) -> Prefix:
        if adapter_ids is None and len(self.prefixes):
            adapter_ids = self._ids  # of a whole model, where other layers may have the prefixes
        if adapter_ids is not None and len(self.prefixes):
            return self._bank(adapter_ids)
        if adapter_ids is None and self.active is not None:
            return self.prefixes[self.active]()[0]
        if adapter_ids is not None:
            raise ValueError("adapter_ids need prefixes, got none")
        none = x.new_empty(self.h_kv, 0, self.e)
        return Prefix(none, none)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, is_causal: bool = False, key_lengths: Tensor | None = None,
        attn_mask: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None, use_cache: bool = False,
        adapter_ids: Tensor | None = None, prefix: Prefix | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
        """Attend from ``x`` to the prefix and to ``x``, or to ``context``.

        Args:
            x, context: ``(b, t, d)``, ``(b, s, d)``.
            is_causal, key_lengths, attn_mask: as in :func:`fastadapt.prefix_attention`; about the keys of ``past`` and ``x``,
                never about the prefix.
            past: keys and values ``(b, h_kv, s, e)`` of earlier positions, which come before those of ``x``.
            use_cache: return keys and values too, what the next call takes as ``past``. The prefix isn't among them.
            adapter_ids: ``(b,)`` the prefix of each row, see :meth:`ids`; -1 for none. All prefixes have to be of one length.
                None: those of :func:`route`, or the active prefix for all rows.
            prefix: one to use instead of those of the module, for example from a :class:`PrefixEncoder` of several layers.

        Returns:
            ``(b, t, d)``, and with ``use_cache`` the pair of keys and values.
        """
        if x.dim() != 3 or x.shape[2] != self.d:
            raise ValueError(f"x must be (b, t, {self.d}), got {tuple(x.shape)}")
        if prefix is not None and adapter_ids is not None:
            raise ValueError("adapter_ids must be None where a prefix is given; it can have its own")
        source = x if context is None else context
        q, k, v = (
            proj(t).unflatten(-1, (-1, self.e)).transpose(1, 2)
            for proj, t in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        key, value, gate, ids, _ = self._prefix(k, adapter_ids) if prefix is None else prefix
        y = prefix_attention(
            q, k, v, key, value, is_causal=is_causal, key_lengths=key_lengths, attn_mask=attn_mask, gate=gate,
            dropout_p=self.dropout if self.training else 0.0, adapter_ids=ids, backend=self.backend,
        )  # fmt: skip
        y = self.o_proj(y.transpose(1, 2).flatten(2))
        return (y, (k, v)) if use_cache else y

    def extra_repr(self) -> str:
        return f"d={self.d}, h={self.h}, h_kv={self.h_kv}, e={self.e}, active={self.active!r}, dropout={self.dropout}"
