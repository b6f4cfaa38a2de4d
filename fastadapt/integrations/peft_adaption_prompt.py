"""LLaMA-Adapter of the library ``peft`` (``ADAPTION_PROMPT``) on the kernels here: its prompt is the gated prefix of a layer.

The library runs ``q_proj``, ``v_proj`` and ``o_proj`` of such a layer a second time and an attention over the prompt in plain
PyTorch. Here the layer's own attention takes both parts, and one ``o_proj`` their sum.
"""

from collections.abc import Iterator

from peft.tuners.adaption_prompt import AdaptedAttention as PeftAdaptedAttention
from peft.tuners.adaption_prompt import AdaptionPromptModel
from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention
from torch import Tensor, nn

from ..nn.prefix import Prefix
from . import Row, prefixes
from .transformers import attention_layers


class AdaptedAttention(PeftAdaptedAttention):
    """``peft.tuners.adaption_prompt.AdaptedAttention`` on kernels."""

    _fastadapt_backend = None

    def _prefix(self) -> Prefix:
        heads = (-1, self.model.head_dim)
        parts = (self.model.k_proj, self.model.v_proj)
        key, value = (part(self.adaption_prompt)[0].unflatten(-1, heads).transpose(0, 1) for part in parts)
        return Prefix(key, value, gate=self.adaption_gate.repeat(self.num_heads), backend=self._fastadapt_backend)

    def _served(self, kwargs: dict) -> bool:
        if self.training and self.model.attention_dropout:  # the library drops no weights of the prompt
            return False
        recorded = prefixes.replaced(self.model) and not hasattr(self.model, "_hf_hook")
        return not (recorded or kwargs.get("output_attentions")) and isinstance(kwargs.get("attention_mask"), Tensor | None)

    def forward(self, **kwargs):
        forward = super().forward
        with prefixes.turn(self.model):
            if not self._served(kwargs):
                return forward(**kwargs)
            with prefixes.holding(self.model, self._prefix()):
                output, *others = self.model(**kwargs)
        bias = getattr(self.model.o_proj, "bias", None)
        return output if bias is None else output + bias, *others  # which the library adds a second time


def _examined(layer: nn.Module) -> tuple[str, str]:
    """State and reason of a layer of the library."""
    if type(layer) not in (PeftAdaptedAttention, AdaptedAttention):
        return "left", f"no kernel for {type(layer).__name__}, which adds what the prompt gives after the output projection"
    if prefixes.replaced(layer):
        return "left", "its forward has been replaced"
    if not attention_layers(layer.model):
        return "left", f"{type(layer.model).__name__} has attention code of its own"
    return ("in part", "attention dropout in training") if layer.model.attention_dropout else ("accelerated", "")


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of every adapter, also of those that aren't active, which are no submodules."""
    for path, module in model.named_modules():
        if isinstance(module, _BaseAdaptedAttention):
            yield path, module
        elif isinstance(module, AdaptionPromptModel):
            for adapter, layers in module._cached_adapters.items():
                yield from ((f"{path}._cached_adapters.{adapter}.{i}".removeprefix("."), m) for i, m in enumerate(layers))


def accelerate(model: nn.Module, backend: str | None) -> list[Row]:
    """Swap the classes of the layers that kernels serve."""
    rows = []
    for name, layer in _layers(model):
        rows.append(Row(name, *_examined(layer)))
        if rows[-1].state != "left":
            prefixes.swap(layer, AdaptedAttention)
            layer._fastadapt_backend = backend
    return rows


def restore(model: nn.Module) -> None:
    """Give every layer its class back."""
    for _, layer in _layers(model):
        if type(layer) is AdaptedAttention:
            prefixes.swap(layer, PeftAdaptedAttention)
            layer.__dict__.pop("_fastadapt_backend", None)
