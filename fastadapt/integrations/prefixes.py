"""Prefixes in the attention layers of a live model of Hugging Face for the time of one call: no cache or mask holds them."""

import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from types import MethodType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..nn.prefix import Prefix
from .transformers import NAME, asks_by_name, attention, scales_by_itself

# Decoders whose layers ask for their attention by name, and that count their own positions from the length of the cache.
_DECODERS = frozenset({
    "cohere", "gemma", "glm", "gpt2", "gpt_neox", "granite", "helium", "llama", "mistral", "olmo", "olmo2", "phi", "phi3",
    "qwen2", "qwen3", "smollm3", "starcoder2",
})  # fmt: skip
# Encoders whose attention is the same code in all of them, which asks by name since transformers 5.
_ENCODERS = frozenset({"bert", "camembert", "roberta", "xlm-roberta"})


def encoder_attention(layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, None]:
    """What the self-attention of BERT, and of what was copied from it, returns with the prefix that it has."""
    q, k, v = (
        part(hidden_states).unflatten(-1, (layer.num_attention_heads, layer.attention_head_size)).transpose(1, 2)
        for part in (layer.query, layer.key, layer.value)
    )
    dropout = layer.dropout.p if layer.training else 0.0
    return attention(layer, q, k, v, attention_mask, dropout, is_causal=False)[0].flatten(2), None


class _SelfAttention:
    """What comes before a class of such a self-attention."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args, **kwargs):
        if "fastadapt_prefix" not in self.__dict__:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        return encoder_attention(self, hidden_states, attention_mask)


@functools.cache
def preceded(kind: type, before: type) -> type:
    """``kind`` with ``before`` before it; copies and pickles of its instances find it by its name, wherever they are loaded."""
    name = "+".join(f"{cls.__module__}:{cls.__name__}" for cls in (before, kind)).replace(".", "/")
    names = {"__module__": __name__, "__qualname__": name, "__doc__": before.__doc__}
    return type(kind.__name__, (before, kind), names)


def __getattr__(name: str) -> type:
    if "+" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    paths = (path.split(":") for path in name.replace("/", ".").split("+"))
    before, kind = (getattr(import_module(module), cls) for module, cls in paths)
    return preceded(kind, before)


def replaced(module: nn.Module, name: str = "forward") -> bool:
    """Whether ``module`` itself has a method that isn't the bound one of its class, which some functions leave behind."""
    return name in vars(module) and getattr(vars(module)[name], "__func__", None) is not getattr(type(module), name)


def swap(module: nn.Module, kind: type) -> None:
    """Another class for ``module``, also for the bound methods that it has itself."""
    names = {"forward": "forward", "_old_forward": "forward", "prepare_inputs_for_generation": "prepare_inputs_for_generation"}
    own = {
        name: method
        for name, method in names.items()
        if name in vars(module) and getattr(vars(module)[name], "__func__", None) is getattr(type(module), method, None)
    }
    module.__class__ = kind
    for name, method in own.items():
        setattr(module, name, MethodType(getattr(kind, method), module))


def attention_layers(backbone: nn.Module) -> list[nn.Module]:
    """The layers that prefixes go to, first to last."""
    parts = ("query", "key", "value") if backbone.config.model_type in _ENCODERS else ("layer_idx", "is_causal")
    return [m for m in backbone.modules() if all(part in m._modules or part in m.__dict__ for part in parts)]


def refusal(backbone: nn.Module, count: int | None = None) -> str | None:
    """Why prefixes can't be given to the layers of ``backbone``, which has to have ``count`` of them."""
    config = getattr(backbone, "config", None)
    kind = getattr(config, "model_type", type(backbone).__name__)
    if kind not in _DECODERS | _ENCODERS:
        return f"{kind} has attention code or positions of its own"
    decodes = kind in _ENCODERS and config.is_decoder
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False) or decodes:
        return f"a {kind} that decodes with cross-attention or a mask of its own"
    layers = attention_layers(backbone)
    if kind in _DECODERS and not all(asks_by_name(type(layer)) for layer in layers):
        return f"its {kind} has attention code of its own"
    if any(getattr(layer, "position_embedding_type", "absolute") != "absolute" for layer in layers):
        return "its attention has positions in its scores"
    if scales_by_itself(config):
        return "its attention has scales that PyTorch's doesn't know"
    if any(replaced(layer) for layer in layers):
        return "the forward of its attention has been replaced"
    if count is not None and len(layers) != count:
        return f"{len(layers)} attention layers for {count} prefixes"
    return None


def window(backbone: nn.Module) -> int | None:
    """How many tokens a query sees at most, of a prefix and of its own, where that is limited."""
    config = backbone.config
    limited = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return getattr(config, "sliding_window", None) if limited else None


def enable(backbone: nn.Module) -> None:
    """Let every layer take a prefix; those that ask for their attention by name do."""
    for layer in attention_layers(backbone):
        if not (isinstance(layer, _SelfAttention) or asks_by_name(type(layer))):
            swap(layer, preceded(type(layer), _SelfAttention))


def enabled(backbone: nn.Module) -> bool:
    """Whether there are layers that take a prefix only since :func:`enable`, and a mask that the model makes by itself."""
    return any(isinstance(layer, _SelfAttention) for layer in attention_layers(backbone))


def restore(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _SelfAttention):
            swap(module, type(module).__bases__[1])


_calls, _locks, _lock = {}, WeakKeyDictionary(), threading.Lock()


def turn(module: nn.Module):
    """A lock for calls that leave something in ``module`` for their time; not in the module itself, which may be copied."""
    if torch.compiler.is_compiling():  # Dynamo knows no locks
        return nullcontext()
    with _lock:
        return _locks.setdefault(module, threading.RLock())


@contextmanager
def implementation(config) -> Iterator[None]:
    """Our attention and masks in place of those of ``config``, until the last of several threads has left."""
    if torch.compiler.is_compiling():
        before, config._attn_implementation = config._attn_implementation, NAME
        try:
            yield
        finally:
            config._attn_implementation = before
        return
    with _lock:
        call = _calls.setdefault(id(config), [0, config._attn_implementation])
        call[0] += 1
        config._attn_implementation = NAME
    try:
        yield
    finally:
        with _lock:
            call[0] -= 1
            if not call[0]:
                config._attn_implementation = _calls.pop(id(config))[1]


class _OurAttention:
    """A config for one layer, with our attention: in that of the model other threads would find it when they make masks."""

    _attn_implementation = NAME

    def __init__(self, config):
        self.config = config

    def __getattr__(self, name: str):
        return getattr(self.config, name)


@contextmanager
def holding(layer: nn.Module, prefix: Prefix | None) -> Iterator[None]:
    """``layer`` with ``prefix`` and our attention, whatever it had before."""
    state = layer.__dict__
    given = {"fastadapt_prefix": prefix, "config": _OurAttention(state.get("config"))}
    before = {name: state[name] for name in given if name in state}
    state.update(given)
    try:
        yield
    finally:
        for name in given:
            del state[name]
        state.update(before)


def _carrying(checkpoint, backbone: nn.Module, layer: nn.Module):
    """``checkpoint`` that hands the prefix to both runs: as arguments, the only tensors a reentrant one differentiates."""
    prefix = layer.fastadapt_prefix

    def run_again(function, key, value, *args):
        with turn(backbone), holding(layer, prefix._replace(key=key, value=value)):
            return function(*args)

    return lambda function, *args: checkpoint(functools.partial(run_again, function), prefix.key, prefix.value, *args)


@contextmanager
def attached(backbone: nn.Module, prefixes: Sequence[Prefix]) -> Iterator[None]:
    """A prefix for each attention layer of ``backbone``, also where activation checkpointing runs it again."""
    layers = attention_layers(backbone)
    blocks = [m for m in backbone.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    functions = [block._gradient_checkpointing_func for block in blocks]
    with implementation(backbone.config):
        try:
            for layer, prefix in zip(layers, prefixes, strict=True):
                device = next(layer.parameters()).device  # a model may lie on several
                layer.fastadapt_prefix = prefix._replace(key=prefix.key.to(device), value=prefix.value.to(device))
            for block, function in zip(blocks, functions):
                (layer,) = (m for m in block.modules() if "fastadapt_prefix" in m.__dict__)
                block._gradient_checkpointing_func = _carrying(function, backbone, layer)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("fastadapt_prefix", None)
            for block, function in zip(blocks, functions):
                block._gradient_checkpointing_func = function


def own_positions(backbone: nn.Module, given: dict, past: int, p: int) -> Tensor | None:
    """What ``backbone`` would count for the tokens of a call after ``past`` of their own and a prefix of ``p``.

    None where it doesn't heed what comes before.
    """
    tokens = given.get("input_ids")
    like = given["inputs_embeds"] if tokens is None else tokens
    embeddings = getattr(backbone, "embeddings", backbone)
    of_tokens = "create_position_ids_from_input_ids"  # RoBERTa's, which count no padding; a method since transformers 5
    of_tokens = getattr(embeddings, of_tokens, None) or getattr(sys.modules[type(embeddings).__module__], of_tokens, None)
    if of_tokens:
        return None if tokens is None else of_tokens(tokens, embeddings.padding_idx, p)
    return torch.arange(past + p, past + p + like.shape[1], device=like.device)[None]
