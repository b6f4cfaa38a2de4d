"""Prefixes in models of Hugging Face: ``attn_implementation="fastadapt"``, which importing this module makes known to them.

A prefix is an attribute of the attention layer: no cache object holds it, no mask grows by its length, and it is there again
when activation checkpointing runs a layer a second time.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..ops.prefix_attention import prefix_attention

NAME = "fastadapt"
_REFUSED = ("head_mask", "output_attentions", "softcap", "s_aux")  # what a layer can ask of its attention beyond softmax


class Prefix(NamedTuple):
    """The prefix of one attention layer; the fields are those arguments of :func:`fastadapt.prefix_attention`."""

    key: Tensor
    value: Tensor
    gate: Tensor | None = None
    adapter_ids: Tensor | None = None
    backend: str | None = None


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
        is_causal: None for causal if the layer is and no ``attention_mask`` says what is seen.

    Returns:
        ``(b, t, h, e)``, contiguous, and None for the weights.
    """
    asked = [name for name in _REFUSED if kwargs.get(name) is not None and kwargs[name] is not False]
    if asked:
        raise ValueError(f'attn_implementation="{NAME}" doesn\'t support {", ".join(asked)}')
    if attention_mask is not None and attention_mask.dim() == 2:
        if attention_mask.dtype != torch.bool:
            raise TypeError(f"attention_mask must be torch.bool where it is (b, t_k), got {attention_mask.dtype}")
        attention_mask, is_causal = attention_mask[:, None, None], True
    elif attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    if is_causal is None:
        is_causal = attention_mask is None and getattr(module, "is_causal", True)
    prefix = getattr(module, "fastadapt_prefix", None)
    if prefix is None:
        none = key.new_empty(key.shape[1], 0, key.shape[3])
        prefix = Prefix(none, none)
    y = prefix_attention(
        query, key, value, prefix.key, prefix.value, is_causal=bool(is_causal), attn_mask=attention_mask, scale=scaling,
        gate=prefix.gate, dropout_p=dropout, adapter_ids=prefix.adapter_ids, backend=prefix.backend,
    )  # fmt: skip
    return y.transpose(1, 2).contiguous(), None


def mask(
    *, kv_length: int, kv_offset: int = 0, mask_function=causal_mask_function, attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True, **kwargs,
) -> Tensor | None:  # fmt: skip
    """The mask that :func:`attention` gets: the padding alone where the rest is causal, else what PyTorch's attention gets."""
    causal = mask_function is causal_mask_function and allow_is_causal_skip and kv_offset == 0
    if not causal or (attention_mask is not None and attention_mask.shape[1] != kv_length):
        return sdpa_mask(
            kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip, **kwargs,
        )  # fmt: skip
    if attention_mask is None or (not torch.compiler.is_compiling() and attention_mask.all()):
        return None
    return attention_mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
