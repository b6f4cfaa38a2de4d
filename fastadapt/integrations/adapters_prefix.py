"""Prefix tuning of the library ``adapters`` on the kernels here.

The library runs the MLP of a prefix on token indices that are expanded by the batch, and every layer concatenates the prefix
to its keys, its values and its mask. Here the MLP runs once a step, and the attention of a layer takes the prefix as it is:
shared by the batch, or scaled or dropped for each sequence where there is a gate or a dropout.
"""

import torch
from adapters.composition import Stack
from adapters.context import ForwardContext
from adapters.methods import prefix_tuning as library
from torch import Tensor, nn

from ..nn.prefix import Prefix
from . import Row, prefixes

# Models whose attention looks up its function by name, and those with the attention of BERT.
_BY_NAME = frozenset({"gpt2", "llama", "mistral"})
_ENCODERS = frozenset({"bert", "roberta", "xlm-roberta"})


class _Parts:
    """The prefixes of all layers, ``(h_kv, p, e)`` or ``(b, h_kv, p, e)``, keys and values in turn.

    To the library it is the sequence of pairs that it knows, expanded by the batch.
    """

    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int):
        self.tensors, self.batch_size = tensors, batch_size

    def pair(self, i: int) -> tuple[Tensor, Tensor]:
        return self.tensors[2 * i], self.tensors[2 * i + 1]

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return tuple(_expanded(t, self.batch_size) for t in self.pair(i))


def _expanded(t: Tensor, batch_size: int) -> Tensor:
    return t if t.dim() == 4 else t.expand(batch_size, -1, -1, -1)


class _Once:
    """What comes before the library's class of a prefix."""

    def forward(self, batch_size: int) -> _Parts:
        values = self._values().view(self.config.prefix_length, 2 * self.n_layers, self.n_heads, self.n_embd_per_head)
        if self.training and self.dropout.p:  # another mask for each sequence, with the library's draws
            values = self.dropout(values.expand(batch_size, -1, -1, -1, -1)).permute(2, 0, 3, 1, 4)
        else:
            values = values.permute(1, 2, 0, 3)
        return _Parts(values.contiguous().unbind(), batch_size)


class PrefixTuning(_Once, library.PrefixTuning):
    """``adapters.methods.prefix_tuning.PrefixTuning`` that runs once for the batch."""

    def _values(self) -> Tensor:
        return self.control_trans(self.wte(torch.arange(self.config.prefix_length, device=self.wte.weight.device)))


class FlatPrefixTuning(_Once, library.FlatPrefixTuning):
    """``adapters.methods.prefix_tuning.FlatPrefixTuning`` that isn't expanded by the batch."""

    def _values(self) -> Tensor:
        return self.control_trans


class PrefixTuningLayer(library.PrefixTuningLayer):
    """``adapters.methods.prefix_tuning.PrefixTuningLayer`` that leaves the prefix to the attention, if that takes it."""

    _fastadapt_backend = None

    def names(self) -> list[str] | None:
        """The prefixes that are active, one after the other; None where there is none or the library has to compose them."""
        setup, context = self.get_active_setup(), ForwardContext.get_context()
        if type(setup) is not Stack or context is None or getattr(context, "prompt_tokens_length", None) is not None:
            return None
        names = [name for name in setup if type(name) is str and name in self.prefixes]
        simple = len(names) > 0 and all(type(name) is str for name in setup) and not context.adapters_parallelized
        states = [context.prefix_states[name][self.location_key] for name in names] if simple else [None]
        return names if all(type(state) is _Parts for state in states) else None

    def prefix(self, names: list[str], hidden_states: Tensor) -> Prefix:
        """The prefixes ``names`` as one."""
        states = ForwardContext.get_context().prefix_states
        pairs = [self._gated(name, states[name][self.location_key].pair(self.prefixes[name]), hidden_states) for name in names]
        key, value = pairs[0]
        if len(pairs) > 1:
            if any(t.dim() == 4 for pair in pairs for t in pair):
                pairs = [[_expanded(t, len(hidden_states)) for t in pair] for pair in pairs]
            key, value = (torch.cat(tensors, -2) for tensors in zip(*pairs))
        return Prefix(key, value, backend=self._fastadapt_backend)

    def _gated(self, name: str, pair: tuple[Tensor, Tensor], hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self.prefix_gates:
            return pair
        gates = self.prefix_gates[name](hidden_states).sigmoid().mean(1)
        self._store_gating_score(name, gates)
        key, value = pair
        return key * gates[:, 0, None, None, None], value * gates[:, -1, None, None, None]

    def forward(self, key_states, value_states, residual_input, attention_mask=None, invert_mask=True):
        taker = self.__dict__.get("_fastadapt_taker")
        if taker is None:
            return super().forward(key_states, value_states, residual_input, attention_mask, invert_mask)
        attention, names = taker
        attention.fastadapt_prefix = self.prefix(names, residual_input)
        return key_states, value_states, attention_mask


class _Attention:
    """What comes before the library's class of an attention layer."""

    _asked = ("output_attentions", "head_mask", "encoder_hidden_states")

    def _names(self, args: tuple, kwargs: dict) -> list[str] | None:
        """The prefixes that this call takes; None if the library has to make it."""
        recorded = prefixes.replaced(self) and not hasattr(self, "_hf_hook")
        asked = any(kwargs.get(name) is not None and kwargs[name] is not False for name in self._asked)
        return None if recorded or asked or len(args) > 2 else self.prefix_tuning.names()


class _ByName(_Attention):
    """That of a layer that looks up its function by name, after it has called the layer of prefixes."""

    def forward(self, *args, **kwargs):
        forward, names, layer = super().forward, self._names(args, kwargs), self.prefix_tuning.__dict__
        with prefixes.turn(self):
            if names is None:
                return forward(*args, **kwargs)
            layer["_fastadapt_taker"] = self, names
            try:
                with prefixes.holding(self, None):  # until the layer of prefixes has been called
                    return forward(*args, **kwargs)
            finally:
                del layer["_fastadapt_taker"]


class _Encoder(_Attention):
    """That of BERT's."""

    _asked = (*_Attention._asked, "past_key_values")

    def forward(self, *args, **kwargs):
        names = self._names(args, kwargs)
        return super().forward(*args, **kwargs) if names is None else self._with_prefix(names, *args, **kwargs)

    def _with_prefix(self, names: list[str], hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        with prefixes.turn(self), prefixes.holding(self, self.prefix_tuning.prefix(names, hidden_states)):
            return prefixes.encoder_attention(self, hidden_states, attention_mask)


_OURS = {
    library.PrefixTuning: PrefixTuning, library.FlatPrefixTuning: FlatPrefixTuning,
    library.PrefixTuningLayer: PrefixTuningLayer,
}  # fmt: skip
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def _examined(attention: nn.Module) -> tuple[str, str]:
    """State and reason of a layer with prefixes."""
    layer = attention.prefix_tuning
    kind, config = layer.model_config.model_type, layer.model_config
    if kind not in _BY_NAME | _ENCODERS:
        return "left", f"{kind} has attention code of its own"
    if config.add_cross_attention or (kind in _ENCODERS and config.is_decoder):
        return "left", f"a {kind} that decodes with cross-attention or a mask of its own"
    if prefixes.replaced(attention) or prefixes.replaced(layer) or type(layer) not in (*_OURS, *_THEIRS):
        return "left", "its forward has been replaced"
    if kind in _ENCODERS and attention.position_embedding_type != "absolute":
        return "left", "its attention has positions in its scores"
    if kind == "gpt2" and not (config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx):
        return "left", "its attention has scales that PyTorch's doesn't know"
    hidden = kind in _BY_NAME and config._attn_implementation == "sdpa"
    return "accelerated", "as with attn_implementation='eager': with 'sdpa' the library hides prefixes" if hidden else ""


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers that have prefixes of their own, by name."""
    found = [(name, m, m._modules.get("prefix_tuning")) for name, m in model.named_modules()]
    return {name: m for name, m, layer in found if isinstance(layer, library.PrefixTuningLayer) and layer.prefixes}


def accelerate(model: nn.Module, backend: str | None) -> list[Row]:
    """Swap the classes of prefixes and of the layers that take them."""
    layers = _layers(model)
    rows = [Row(f"{name}.prefix_tuning", *_examined(layer)) for name, layer in layers.items()]
    taken = [layer for layer, row in zip(layers.values(), rows) if row.state != "left"]
    for attention in taken:
        layer = attention.prefix_tuning
        if not isinstance(attention, _Attention):
            before = _Encoder if layer.model_config.model_type in _ENCODERS else _ByName
            prefixes.swap(attention, prefixes.preceded(type(attention), before))
        prefixes.swap(layer, PrefixTuningLayer)
        layer._fastadapt_backend = backend
        for name in layer.prefixes:
            group = layer.pool.get_prefix(name)
            prefix = group[layer.location_key]
            prefixes.swap(prefix, _OURS.get(type(prefix), type(prefix)))
    return rows


def restore(model: nn.Module) -> None:
    """Give every module its class back."""
    for module in model.modules():
        if isinstance(module, _Attention):
            prefixes.swap(module, type(module).__bases__[1])
        elif type(module) in _THEIRS:
            prefixes.swap(module, _THEIRS[type(module)])
            module.__dict__.pop("_fastadapt_backend", None)
