"""Prefix tuning of the library ``peft`` on the kernels here, P-tuning v2 among it.

The library expands the prompt by the batch, runs its encoder on that, puts the result in a cache and lets every layer
concatenate it. Here the encoder runs once a step and each attention layer takes its part of what comes out, shared by the
batch. The library's own ``forward`` still wires the head and the loss; its prompt is None and its mask that of the tokens.
"""

from contextlib import contextmanager
from typing import NamedTuple

import peft
import torch
from peft import PeftType
from peft.tuners.prefix_tuning import PrefixEncoder
from torch import nn

from ..nn.prefix import Prefix
from . import Row, prefixes
from .dtypes import NARROW
from .transformers import by_name

_ENCODED_ONCE = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.MULTITASK_PROMPT_TUNING, PeftType.CPT)


class _Call(NamedTuple):
    """What the hook on the backbone has to know of the call that is running."""

    p: int
    generates: bool


def backbone(model: peft.PeftModel) -> nn.Module:
    base = model.get_base_model()
    return getattr(base, getattr(base, "base_model_prefix", ""), base)


def _shared(model: peft.PeftModel) -> list[Prefix]:
    """The prefixes of the layers, ``(h_kv, p, e)``, for the whole batch."""
    config, encoder = model.active_peft_config, model.prompt_encoder[model.active_adapter]
    flat = encoder.embedding.weight
    if encoder.prefix_projection and not config.inference_mode:
        flat = encoder(torch.arange(config.num_virtual_tokens, device=flat.device))
    dtype = model.base_model_torch_dtype
    if dtype is not None and not (flat.dtype is torch.float32 and dtype in NARROW):  # which the kernels take as it is
        flat = flat.to(dtype)
    heads = config.num_attention_heads
    parts = flat.unflatten(-1, (2 * config.num_layers, heads, config.token_dim // heads)).permute(1, 2, 0, 3).contiguous()
    keys_and_values = parts.unbind()
    options = {"backend": model._fastadapt_backend}
    return [Prefix(*keys_and_values[i : i + 2], **options) for i in range(0, len(keys_and_values), 2)]


def _of_tokens(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """A hook before the forward of the backbone: positions that follow the prefix, and a mask of the tokens alone."""
    call = module.__dict__.get("_fastadapt_call")
    if call is None:
        return None
    given = by_name(module.forward, args, kwargs)
    cache, mask, positions = (given.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
    past = 0 if cache is None else cache.get_seq_length()
    given["position_ids"] = prefixes.own_positions(module, given, past, call.p) if positions is None else positions + call.p
    if not call.generates:
        given["use_cache"] = False
        if mask is not None:
            given["attention_mask"] = mask = mask[:, call.p :]
        if prefixes.enabled(module):
            # Three dims, since of two it makes a mask of every query and key.
            ones = mask is None or (not torch.compiler.is_compiling() and bool(mask.all()))
            given["attention_mask"] = None if ones else mask[:, None]
        elif mask is None:
            # Without a mask it would look in the positions for sequences that are packed into one.
            like = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
            given["attention_mask"] = like.new_ones(like.shape[:2])
    return (), given


def _served(model: peft.PeftModel, given: dict, generates: bool) -> bool:
    """Whether kernels give what the library would for this call."""
    config = model.active_peft_config
    if config.peft_type != PeftType.PREFIX_TUNING or model._adapters_disabled:
        return False
    if model.active_adapter not in model._fastadapt_served:
        return False
    asked = ("output_attentions", "head_mask", "past_key_values", "encoder_hidden_states")
    if model.config.output_attentions or any(given.get(name) is not None and given[name] is not False for name in asked):
        return False
    mask, window = given.get("attention_mask"), prefixes.window(backbone(model))
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        return False
    if generates:
        return window is None
    tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
    return not given.get("use_cache") and (window is None or config.num_virtual_tokens + tokens.shape[1] <= window)


class _Prefixed:
    """What comes before a class of peft's models."""

    _fastadapt_backend = None
    _fastadapt_served = frozenset()

    def forward(self, *args, **kwargs):
        if not isinstance(self, _Prefixed):  # restored behind a wrapper that keeps this function, as that of mixed precision
            return type(self).forward(self, *args, **kwargs)
        forward = super().forward
        given = by_name(forward, args, kwargs)
        with prefixes.turn(backbone(self)):
            if not _served(self, given, False):
                return forward(*args, **kwargs)
            with self._fastadapt_running(False):
                return forward(**given)

    def get_prompt(self, *args, **kwargs):
        return super().get_prompt(*args, **kwargs) if self._fastadapt_call() is None else None

    def _adjust_prompt_learning_kwargs(self, peft_config, *, kwargs, **options):
        positions = kwargs.get("position_ids")
        super()._adjust_prompt_learning_kwargs(peft_config, kwargs=kwargs, **options)
        if positions is not None and self._fastadapt_call() is not None:
            kwargs["position_ids"] = positions  # the hook moves them

    def _fastadapt_call(self) -> _Call | None:
        return backbone(self).__dict__.get("_fastadapt_call")

    @contextmanager
    def _fastadapt_running(self, generates: bool):
        body = backbone(self)
        with prefixes.attached(body, _shared(self)):
            body._fastadapt_call = _Call(self.active_peft_config.num_virtual_tokens, generates)
            try:
                yield
            finally:
                del body._fastadapt_call


class PeftModelForCausalLM(_Prefixed, peft.PeftModelForCausalLM):
    """``peft.PeftModelForCausalLM`` whose prefixes are those of the layers, not of a cache."""

    def generate(self, *args, **kwargs):
        generate = super().generate
        with prefixes.turn(backbone(self)):
            if not _served(self, kwargs, True):
                return generate(*args, **kwargs)
            with torch.no_grad(), self._fastadapt_running(True):
                return generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        if self._fastadapt_call() is None:
            return super().prepare_inputs_for_generation(*args, **kwargs)
        kwargs.pop("task_ids", None)
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSequenceClassification(_Prefixed, peft.PeftModelForSequenceClassification):
    """``peft.PeftModelForSequenceClassification`` likewise."""


class PeftModelForTokenClassification(_Prefixed, peft.PeftModelForTokenClassification):
    """``peft.PeftModelForTokenClassification`` likewise."""


class PeftModelForQuestionAnswering(_Prefixed, peft.PeftModelForQuestionAnswering):
    """``peft.PeftModelForQuestionAnswering`` likewise."""


class PeftModelForFeatureExtraction(_Prefixed, peft.PeftModelForFeatureExtraction):
    """``peft.PeftModelForFeatureExtraction`` likewise."""


_OURS = {
    kind.__bases__[1]: kind
    for kind in (
        PeftModelForCausalLM, PeftModelForSequenceClassification, PeftModelForTokenClassification,
        PeftModelForQuestionAnswering, PeftModelForFeatureExtraction,
    )
}  # fmt: skip
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def _examined(model: peft.PeftModel, name: str) -> tuple[str, str]:
    """State and reason of the prompt ``name``."""
    config, encoder, kind = model.peft_config[name], model.prompt_encoder[name], type(model)
    if config.peft_type in _ENCODED_ONCE:
        return "left", "nothing to replace: a prompt is a part of the input"
    if type(encoder) is not PrefixEncoder:
        return "left", f"no kernel for {type(encoder).__name__}"
    if _THEIRS.get(kind, kind) not in _OURS:
        return "left", f"no kernel for the prefixes of a {kind.__name__}"
    if kind in _OURS and (prefixes.replaced(model) or prefixes.replaced(model, "get_prompt")):
        return "left", "its forward has been replaced"
    reason = prefixes.refusal(backbone(model), config.num_layers)
    return ("left", reason) if reason else ("accelerated", "")


def _hooked(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if hook is _of_tokens]


def accelerate(model: nn.Module, backend: str | None) -> list[Row]:
    """Swap the classes of the models that have prefixes which kernels serve."""
    rows = []
    for path, owner in [(path, m) for path, m in model.named_modules() if isinstance(m, peft.PeftModel)]:
        found = {name: _examined(owner, name) for name in getattr(owner, "prompt_encoder", ())}
        rows += [Row(f"{path}.prompt_encoder.{name}".removeprefix("."), *state) for name, state in found.items()]
        served = frozenset(name for name, (state, _) in found.items() if state != "left")
        if served:
            prefixes.swap(owner, _OURS.get(type(owner), type(owner)))
            owner._fastadapt_backend, owner._fastadapt_served = backend, served
            prefixes.enable(body := backbone(owner))
            if not _hooked(body):
                body.register_forward_pre_hook(_of_tokens, with_kwargs=True)
    return rows


def restore(model: nn.Module) -> None:
    """Give every model its class back."""
    for module in model.modules():
        if type(module) in _THEIRS:
            prefixes.swap(module, _THEIRS[type(module)])
            for name in ("_fastadapt_backend", "_fastadapt_served"):
                module.__dict__.pop(name, None)
        for key in _hooked(module):
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    prefixes.restore(model)
