"""Prefixes in models of Hugging Face: ``attn_implementation="fastadapt"``, which importing this module makes known to them.

A prefix is an attribute of the attention layer: no cache object holds it, no mask grows by its length, and it is there again
when activation checkpointing runs a layer a second time. :func:`add_prefix` gives every layer of a model one to train.
"""

import inspect

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, __version__, masking_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..nn.prefix import Prefix, PrefixEncoder
from ..ops.prefix_attention import prefix_attention

NAME = "fastadapt"
# What a layer can ask of its attention beyond softmax.
_REFUSED = ("head_mask", "output_attentions", "position_bias", "s_aux", "sinks", "softcap")
# Models that count only tokens that are seen, wherever the padding is.
_COUNT_THE_SEEN = frozenset({"biogpt", "idefics", "opt"})
_BIDIRECTIONAL = getattr(masking_utils, "bidirectional_mask_function", None)  # since transformers 5


class _Computed(Prefix):
    """A prefix that an encoder put out. A copy or a pickle of its layer leaves it behind: the next call computes another."""

    def __reduce__(self):
        return type(None), ()


def set_prefix(
    attention: nn.Module, key: Tensor, value: Tensor, *, gate: Tensor | None = None, adapter_ids: Tensor | None = None,
    backend: str | None = None,
) -> None:  # fmt: skip
    """Give one attention layer a prefix, in place of the one it has.

    The layer registers nothing: parameters among the tensors belong to whoever made them.

    Args:
        attention: an attention layer of a model that runs with ``attn_implementation="fastadapt"``.
        key, value: ``(h_kv, p, e)``, ``(b, h_kv, p, e)``, or with ``adapter_ids`` a bank ``(g, h_kv, p, e)``.
        gate, adapter_ids, backend: as in :func:`fastadapt.prefix_attention`.
    """
    attention.fastadapt_prefix = Prefix(key, value, gate, adapter_ids, backend)


def clear_prefix(model: nn.Module) -> None:
    """Take the prefixes from all attention layers of ``model``, or from the one that it is."""
    for module in model.modules():
        module.__dict__.pop("fastadapt_prefix", None)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """What a layer calls with its projected heads: :func:`fastadapt.prefix_attention` with the prefix of the layer, if any.

    Args:
        module: the layer, with ``fastadapt_prefix``, a :class:`Prefix`, or without.
        query, key, value: ``(b, h, t, e)``, ``(b, h_kv, t_k, e)``.
        attention_mask: ``(b, 1, t, t_k)`` or wider, bool or added to the scores, of the own keys alone; or ``(b, t_k)`` bool,
            as :func:`mask` makes it, for causal attention with padding; or None.
        dropout: probability that a weight is dropped.
        scaling: as ``scale`` of the op.
        is_causal: whether a call without ``attention_mask`` is causal; None for what the layer is. Every other mask says it.

    Returns:
        ``(b, t, h, e)``, contiguous, and None for the weights.
    """
    asked = [name for name in _REFUSED if kwargs.get(name) is not None and kwargs[name] is not False]
    if asked:
        raise ValueError(f'attn_implementation="{NAME}" doesn\'t support {", ".join(asked)}')
    if attention_mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    elif attention_mask.dim() == 2:
        if attention_mask.dtype != torch.bool:
            raise TypeError(f"attention_mask must be torch.bool where it is (b, t_k), got {attention_mask.dtype}")
        attention_mask, is_causal = attention_mask[:, None, None], True
    else:  # a static cache is longer than what causality counts from
        attention_mask, is_causal = attention_mask[..., : key.shape[2]], False
    prefix = getattr(module, "fastadapt_prefix", None)
    if prefix is None or getattr(module, "fastadapt_dropped", False):
        none = key.new_empty(key.shape[1], 0, key.shape[3])
        prefix = Prefix(none, none)
    # What is narrower joins the dtype of the call, as in a concatenation; float32 serves 16 bits as it is.
    prefix_k, prefix_v, gate = (t if t is None else t.to(torch.promote_types(t.dtype, query.dtype)) for t in prefix[:3])
    y = prefix_attention(
        query, key, value, prefix_k, prefix_v, is_causal=bool(is_causal), attn_mask=attention_mask, scale=scaling,
        gate=gate, dropout_p=dropout, adapter_ids=prefix.adapter_ids, backend=prefix.backend,
    )  # fmt: skip
    return y.transpose(1, 2).contiguous(), None


def mask(
    *, kv_length: int, kv_offset: int = 0, mask_function=causal_mask_function, attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True, **kwargs,
) -> Tensor | None:  # fmt: skip
    """The mask that :func:`attention` gets: the padding alone where the rest is causal or nothing, else that of PyTorch's."""
    if "q_length" in kwargs:  # since transformers 5 the skip counts from the first key too, with a static cache that is empty
        end = kwargs["q_offset"] + kwargs["q_length"]
        allow_is_causal_skip &= not isinstance(end, Tensor) and end == kv_offset + kv_length
    causal = mask_function is causal_mask_function and allow_is_causal_skip and kv_offset == 0
    alone = causal or (mask_function is _BIDIRECTIONAL and kwargs["allow_is_bidirectional_skip"])
    if not alone or (attention_mask is not None and attention_mask.shape[1] != kv_length):
        return sdpa_mask(
            kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip, **kwargs,
        )  # fmt: skip
    if attention_mask is None or (not torch.compiler.is_compiling() and attention_mask.all()):
        return None
    return attention_mask if causal else attention_mask[:, None, None]


def asks_by_name(kind: type[nn.Module]) -> bool:
    """Whether layers of this class look up their attention function by its name."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(kind.forward).__code__.co_names


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of ``model`` that look up their attention function by its name."""
    found = {kind for kind in {type(module) for module in model.modules()} if asks_by_name(kind)}
    return [module for module in model.modules() if type(module) in found]


def _heads(layer: nn.Module, config) -> tuple[int, int, int]:
    """How many heads an attention layer has for queries and for keys, and their size: what it says itself, else its config."""
    config = getattr(layer, "config", config).get_text_config()

    def first(*names):
        return next((found for owner in (layer, config) for name in names if (found := getattr(owner, name, None))), None)

    h = first("num_heads", "num_attention_heads")
    return h, first("num_key_value_heads") or h, first("head_dim", "attention_head_size") or config.hidden_size // h


def scales_by_itself(config) -> bool:
    """Whether layers scale their scores in ways that only their own code knows, as GPT-2's can."""
    own = "scale_attn_by_inverse_layer_idx"
    return hasattr(config, own) and bool(getattr(config, own) or not config.scale_attn_weights)


class _Hook:
    """Runs the encoder of a model before each of its calls. A copy of the model has a copy of this, for its own layers."""

    def __init__(self, layers: list[nn.Module], shift: int, backend: str | None, before: dict[str, str]):
        self.layers, self.shift, self.backend, self.before = layers, shift, backend, before

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        for layer, prefix in zip(self.layers, model.prefix_encoder()):
            layer.fastadapt_prefix = _Computed(*prefix._replace(backend=self.backend))
        return ((), shifted_positions(model, self.shift, by_name(model.forward, args, kwargs))) if self.shift else None


def by_name(function, args: tuple, kwargs: dict) -> dict:
    """The arguments of a call of ``function`` by their names."""
    return dict(zip(inspect.signature(function).parameters, args)) | kwargs if args else dict(kwargs)


def shifted_positions(model: nn.Module, p: int, given: dict) -> dict:
    """The arguments of a call of ``model`` with positions that are ``p`` further on, whether they are given or not."""
    positions = given.get("position_ids")
    if positions is None:
        tokens, past = given.get("input_ids"), given.get("past_key_values")
        tokens = given["inputs_embeds"] if tokens is None else tokens
        start, seen = 0 if past is None else past.get_seq_length(), given.get("attention_mask")
        if seen is not None and model.config.get_text_config().model_type in _COUNT_THE_SEEN:
            positions = (seen.long().cumsum(1) - 1).clamp(min=0)[:, start:]
        else:
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
    return given | {"position_ids": positions + p}


def _parts(model) -> dict:
    """The configurations of the parts that a model is made of."""
    parts = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    return {name: part for name, part in parts.items() if part is not None}


def _shifts(model, layers, wanted: bool | None, gated: bool) -> bool:
    """Whether positions are shifted: as ``wanted``; if that is None, where the model takes them, unless the prefixes are
    ``gated`` or ``layers`` are those of images."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    # RoBERTa and its like count from padding_idx + 1, and only tokens that aren't padding.
    # Models of images and text have three positions a token, which they count themselves.
    own = ("create_position_ids_from_inputs_embeds", "get_rope_index")
    takes &= not any(hasattr(module, name) for module in model.modules() for name in own)
    if wanted and not takes:
        raise ValueError(f"shift_positions must be False for {type(model).__name__}, which doesn't take positions from 0 on")
    if wanted is not None:
        return wanted
    aside = [part for part in _parts(model).values() if part is not model.config.get_text_config()]
    of_tokens = any(all(getattr(layer, "config", None) is not part for part in aside) for layer in layers)
    return takes and of_tokens and not gated


def add_prefix(
    model: nn.Module, p: int, *, layers: list[nn.Module] | None = None, shift_positions: bool | None = None,
    backend: str | None = None, **options,
) -> PrefixEncoder:  # fmt: skip
    """Give the attention layers of a Hugging Face model prefixes to train: prefix tuning, P-tuning v2, LLaMA-Adapter.

    The encoder becomes the submodule ``prefix_encoder`` of ``model``, so that its parameters move, load and are saved with
    those of the model; :func:`fastadapt.nn.freeze_except` with ``"prefix"`` trains nothing else. It runs once before each
    call of ``model``, in generation too: :meth:`PrefixEncoder.flatten` makes that cost nothing. Masks, caches and the
    arguments of ``generate`` are those of the model without prefix, which runs with ``attn_implementation="fastadapt"``.

    With activation checkpointing, ``use_reentrant=False`` is needed; and between a forward pass and its backward pass no other
    forward pass may change what the prefixes are, as a new mask of their dropout does.

    Args:
        model: a model whose attention layers take their function from ``transformers.AttentionInterface``.
        p: length of the prefixes.
        layers: the attention layers that get one, see :func:`attention_layers`; None for all. LLaMA-Adapter takes the topmost.
            Their heads have one number and size, unlike those of a model of images and text.
        shift_positions: True: all tokens are ``p`` positions further on, as if the prefix were tokens before them (so in
            ``peft``); ``position_ids`` of a call come without the shift, and are what the model counts where it has none. The
            model needs positions for ``p + t``. False: the prefix has no positions (LLaMA-Adapter). None: True for models that
            take ``position_ids`` and count them from 0, unless there is a gate or ``layers`` are those of images.
        backend: as in :func:`fastadapt.prefix_attention`.
        options: ``hidden``, ``width``, ``dropout``, ``gate``, ``init_std``, ``device`` and ``dtype`` of :class:`PrefixEncoder`.

    Returns:
        The encoder.

    Raises:
        ValueError: no layer of the model looks up its attention function, or its own code scales the scores in a way of its
            own, or the heads of ``layers`` differ, or the model has a prefix already.
    """
    found = attention_layers(model)
    if not found:
        raise ValueError(
            "model must have attention layers that look up their function in transformers.AttentionInterface; those of "
            f"{type(model).__name__} don't in transformers {__version__} (BERT's and RoBERTa's do since 5.0)"
        )
    layers = found if layers is None else list(layers)
    if not layers or any(all(layer is not one for one in found) for layer in layers):
        raise ValueError(
            "layers must be attention layers of the model that look up their function in transformers.AttentionInterface, "
            f"at least one of the {len(found)} of {type(model).__name__}"
        )
    if scales_by_itself(model.config.get_text_config()):
        raise ValueError(f"model must have no scales in its attention that PyTorch's doesn't know, got {type(model).__name__}")
    if getattr(model, "prefix_encoder", None) is not None:
        raise ValueError("model must have no prefix yet; remove_prefix() takes one away")
    (h, h_kv, e), *others = sizes = sorted({_heads(layer, model.config) for layer in layers})
    if others:
        raise ValueError(f"layers must have heads of one number and size, got {len(sizes)} kinds (h, h_kv, e): {sizes}")
    shift_positions = _shifts(model, layers, shift_positions, options.get("gate") is not None)
    dtype = model.dtype if model.dtype == torch.float64 else torch.float32
    encoder = PrefixEncoder(h_kv, p, e, len(layers), h=h, **{"device": model.device, "dtype": dtype, **options})
    encoder.attentions = tuple(layers)  # in a tuple they aren't submodules of it
    places = {id(layer): i for i, layer in enumerate(found)}
    encoder.placed = {"layers": [places[id(layer)] for layer in layers], "shift_positions": shift_positions}
    before = {name: part._attn_implementation for name, part in ({"": model.config} | _parts(model)).items()}
    hook = _Hook(layers, p if shift_positions else 0, backend, before)
    model.set_attn_implementation(NAME)
    model.prefix_encoder = encoder.train(model.training)
    model.register_forward_pre_hook(hook, with_kwargs=True)
    return encoder


def remove_prefix(model: nn.Module) -> None:
    """Undo :func:`add_prefix`."""
    for handle, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _Hook):
            del model._forward_pre_hooks[handle], model._forward_pre_hooks_with_kwargs[handle]
            del model.prefix_encoder
            clear_prefix(model)
            model.set_attn_implementation(hook.before)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
