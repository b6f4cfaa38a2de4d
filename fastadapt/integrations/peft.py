"""Layers and prefixes of the library ``peft``, in place: its own classes with another ``forward``."""

from contextlib import ExitStack, contextmanager
from types import MethodType

import torch
from peft.tuners import loha, lokr, lora
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.lora.torchao import TorchaoLoraLinear as PeftTorchaoLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..ops.lora_linear import autocasts
from . import Row, peft_adaption_prompt, peft_lycoris, peft_prefix, summary
from .dtypes import mismatch
from .peft_lora import TRANSPOSED, MixedBatch, active, embedded, frozen_layer, mixed, operands

LAYERS = "LoRA layers of peft on linear layers or embeddings, LoKr and LoHa layers on linear layers, prefixes, LLaMA-Adapter"


class _Fused:
    """What comes before the library's class of a linear layer."""

    _fastadapt_backend = None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = None
        if not (args or self._disable_adapters or self.merged_adapters):
            if not kwargs:
                y = active(self, x)
            elif len(kwargs) == 1 and kwargs.get("adapter_names") is not None:
                y = mixed(self, x, kwargs["adapter_names"])
        return super().forward(x, *args, **kwargs) if y is None else y


class Linear(_Fused, lora.Linear):
    """``peft.tuners.lora.Linear`` on kernels."""


class TorchaoLoraLinear(_Fused, PeftTorchaoLinear):
    """``peft.tuners.lora.TorchaoLoraLinear`` on kernels; the weight is made dense for one call at a time."""


class Embedding(lora.Embedding):
    """``peft.tuners.lora.Embedding`` with one product and one pass over the output for each adapter."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = None
        if not (args or kwargs or self._disable_adapters or self.merged_adapters):
            y = embedded(self, x)
        return super().forward(x, *args, **kwargs) if y is None else y


class LoKrLinear(lokr.Linear):
    """``peft.tuners.lokr.Linear`` whose Kronecker products are never formed."""

    _fastadapt_backend = None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        names = peft_lycoris.active(self)
        return super().forward(x, *args, **kwargs) if names is None else peft_lycoris.lokr(self, names, x, *args, **kwargs)


class LoHaLinear(loha.Linear):
    """``peft.tuners.loha.Linear`` through the rank of its Hadamard products, in the product of the base layer."""

    _fastadapt_backend = None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        names = peft_lycoris.active(self)
        return super().forward(x, *args, **kwargs) if names is None else peft_lycoris.loha(self, names, x, *args, **kwargs)


class LoraModel(lora.LoraModel):
    """``peft.tuners.lora.LoraModel`` that takes ``adapter_names`` in training too."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        names, training = kwargs.get("adapter_names"), self.training
        if names is not None:
            if training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
                reason = "which runs forward again when the names are gone"
                raise ValueError(f"adapter_names must be None in training with gradient checkpointing, {reason}")
            kwargs["adapter_names"] = names if torch.compiler.is_compiling() else MixedBatch(names)
        with ExitStack() as stack:
            self.training = training and names is None  # the library refuses names in training; its layers would not
            try:
                stack.enter_context(super()._enable_peft_forward_hooks(*args, **kwargs))
            finally:
                self.training = training
            yield


_OURS = {
    lora.Linear: Linear, PeftTorchaoLinear: TorchaoLoraLinear, lora.Embedding: Embedding, lora.LoraModel: LoraModel,
    lokr.Linear: LoKrLinear, loha.Linear: LoHaLinear,
}  # fmt: skip

if hasattr(lora, "Linear4bit"):  # bitsandbytes is installed
    from bitsandbytes.nn import Linear4bit as _Base4bit

    TRANSPOSED[_Base4bit] = False

    class Linear4bit(_Fused, lora.Linear4bit):
        """``peft.tuners.lora.Linear4bit`` on kernels; the weight is made dense for one call at a time."""

        def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
            base, dtype = self.base_layer, x.dtype
            if dtype is torch.float32 and autocasts(x):
                dtype = torch.get_autocast_dtype(x.device.type)
            # bitsandbytes has kernels of its own for a single row, and for weights that it packs anew for a CPU.
            state = getattr(base.weight, "quant_state", None)
            theirs = state is None or getattr(state, "packing_format_for_cpu", False) or base.compute_dtype not in (None, dtype)
            if theirs or (x.numel() == x.shape[-1] and not torch.is_grad_enabled()):
                return lora.Linear4bit.forward(self, x, *args, **kwargs)
            return super().forward(x, *args, **kwargs).to(x.dtype)

    _OURS[lora.Linear4bit] = Linear4bit

_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def _examined(layer) -> tuple[str, str]:
    """State and reason of a layer of the library."""
    kind = type(layer)
    if kind is MultiheadAttention:
        return "left", "no kernel for lora.MultiheadAttention, which adds the update of its output projection twice"
    if _OURS.get(_THEIRS.get(kind, kind)) is None:
        return "left", f"no kernel for {kind.__module__.rpartition('.')[0].removeprefix('peft.tuners.')}.{kind.__name__}"
    if "forward" in vars(layer) and not _behind_hook(layer):
        return "left", "its forward has been replaced"
    if isinstance(layer, lora.Embedding):
        return ("left", "tensor parallelism") if layer.input_fns else ("accelerated", "")
    if isinstance(layer, lokr.Linear | loha.Linear):
        return peft_lycoris.examined(layer)
    if type(frozen := frozen_layer(layer)) is str:
        return "left", frozen
    parts = {name: operands(layer, name) for name in layer.lora_A}
    return summary({
        name: (part, None) if type(part) is str else mismatch(frozen[0], part[0].dtype) for name, part in parts.items()
    })  # fmt: skip


def _behind_hook(layer) -> bool:
    """Whether a hook of the library accelerate keeps the bound forward of the class."""
    return getattr(vars(layer).get("_old_forward"), "__func__", None) is type(layer).forward


def _swap(layer, kind: type) -> None:
    if _behind_hook(layer):
        layer._old_forward = MethodType(kind.forward, layer)
    layer.__class__ = kind


def accelerate(model: nn.Module, backend: str | None) -> list[Row]:
    """Swap the classes of the layers that kernels serve."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    read = {module.base_layer.out_proj for module in layers.values() if isinstance(module, MultiheadAttention)}
    rows = [
        Row(name, "left", "its attention only reads its weight") if module in read else Row(name, *_examined(module))
        for name, module in layers.items()
    ]
    for row in rows:
        layer = layers[row.module]
        if row.state != "left":
            _swap(layer, _OURS.get(type(layer), type(layer)))
            layer._fastadapt_backend = backend
    if any(row.state != "left" for row in rows):
        for module in model.modules():
            if type(module) is lora.LoraModel:
                _swap(module, LoraModel)
    return rows + peft_prefix.accelerate(model, backend) + peft_adaption_prompt.accelerate(model, backend)


def restore(model: nn.Module) -> None:
    """Give every layer its class back."""
    for module in model.modules():
        if type(module) in _THEIRS:
            _swap(module, _THEIRS[type(module)])
            module.__dict__.pop("_fastadapt_backend", None)
    peft_prefix.restore(model)
    peft_adaption_prompt.restore(model)
