"""LoRA of the library ``adapters`` on ``lora_linear``: its parameters, its state, its output."""

import torch
from adapters import Stack
from adapters.methods import lora
from torch import Tensor, nn

from .._dense import reads_other_inputs
from ..ops.dropout import LARGEST
from ..ops.lora_linear import lora_linear
from . import Row, hooked
from .dtypes import match


class _Fused:
    """What comes before the library's class."""

    _fastadapt_backend = None

    def forward(self, x: Tensor) -> Tensor:
        y = None if self.merged else _adapted(self, x)
        return super().forward(x) if y is None else y


class LoRALinear(_Fused, lora.LoRALinearTorch):
    """``adapters.methods.lora.LoRALinearTorch`` on kernels."""


class LoRAMergedLinear(_Fused, lora.LoRAMergedLinear):
    """``adapters.methods.lora.LoRAMergedLinear``, of q, k and v in one product, on kernels."""


_OURS = {lora.LoRALinearTorch: LoRALinear, lora.LoRAMergedLinear: LoRAMergedLinear}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def _refused(part: nn.Module) -> str | None:
    """Why no kernel can compute the LoRA of one adapter, or None."""
    if type(part) is not lora.LoRA:
        return f"no kernel for {type(part).__name__}"
    for option in ("use_gating", "use_dora"):
        if getattr(part, option):
            return option
    dropout = part._modules.get("lora_dropout")  # a function where there is none
    if dropout is not None and (type(dropout) is not nn.Dropout or dropout.p > LARGEST):
        return f"dropout {dropout}"
    if not any(getattr(part, "enable_lora", (True,))):
        return "neither q, k nor v in it"
    return "hooks in it" if any(hooked(module) for module in part.modules()) else None


def _active(layer: nn.Module) -> nn.Module | None:
    """The LoRA that is active in the layer if it is the only one, and nothing but single adapters are."""
    setup = layer.get_active_setup()
    if type(setup) is not Stack or any(type(child) is not str for child in setup):
        return None
    names = [name for name in setup if name in layer.loras]
    if len(names) != 1 or (len(setup) > 1 and type(layer) is LoRAMergedLinear):  # which the library refuses
        return None
    return layer.loras[names[0]]


def _up(layer: nn.Module, part: nn.Module) -> Tensor:
    """B ``(n, ranks)``; that of q, k and v in one layer has the ranks of each, and those that have none are zeros."""
    if type(layer) is not LoRAMergedLinear:
        return part.lora_B
    blocks = torch.block_diag(*part.lora_B.split(layer.out_features // 3)).split(layer.out_features // 3)
    found = iter(blocks)
    return torch.cat([next(found) if enabled else torch.zeros_like(blocks[0]) for enabled in part.enable_lora])


def _adapted(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The layer with its adapter; None where its own class has to compute that."""
    part = _active(layer)
    if part is None or _refused(part) is not None or part.lora_A.dtype is not part.lora_B.dtype:
        return None
    if not match(x, layer.weight, part.lora_A.dtype):
        return None
    weight, dropout = layer.weight.T if layer.fan_in_fan_out else layer.weight, part._modules.get("lora_dropout")
    return lora_linear(
        x, weight, layer.bias, part.lora_A, _up(layer, part), scale=part.scaling,
        dropout_p=dropout.p if dropout is not None and dropout.training else 0.0, backend=layer._fastadapt_backend,
    )  # fmt: skip


def _examined(layer: nn.Module, part: nn.Module) -> tuple[str, str]:
    """State and reason of one adapter in a layer of the library."""
    if type(layer) not in (*_OURS, *_THEIRS):
        return "left", f"no kernel for {type(layer).__name__}"
    if "forward" in vars(layer):
        return "left", "its forward has been replaced"
    if reads_other_inputs(layer.weight):
        return "left", "it scales or quantises its input"
    reason = _refused(part)
    return ("left", reason) if reason else ("accelerated", "")


def accelerate(model: nn.Module, backend: str | None) -> list[Row]:
    """Swap the classes of the layers in which the kernel serves a LoRA."""
    rows = []
    for path, layer in model.named_modules():
        if not isinstance(layer, lora.LoRALayer):
            continue
        own = [Row(f"{path}.loras.{name}", *_examined(layer, part)) for name, part in layer.loras.items()]
        rows += own
        if any(row.state != "left" for row in own):
            layer.__class__, layer._fastadapt_backend = _OURS.get(type(layer), type(layer)), backend
    return rows


def restore(model: nn.Module) -> None:
    """Give every layer its class back."""
    for module in model.modules():
        if type(module) in _THEIRS:
            module.__class__ = _THEIRS[type(module)]
            module.__dict__.pop("_fastadapt_backend", None)
