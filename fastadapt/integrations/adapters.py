"""Adapters of the library ``adapters``: in place, or, bottleneck adapters and Compacter, as modules of fastadapt and back."""

import warnings
from pathlib import Path

import torch
from adapters.methods import modeling
from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.lora import LoRALayer
from adapters.methods.prefix_tuning import PrefixTuningLayer
from adapters.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from . import Row, adapters_fusion, adapters_lora, adapters_prefix
from .adapters_bottleneck import adapted, alone, draws, random, refused
from .adapters_modules import from_adapters, shared_rule, to_adapters

__all__ = ["LAYERS", "accelerate", "from_adapters", "restore", "save_adapter", "shared_rule", "to_adapters"]

LAYERS = "bottleneck and Compacter adapters, their fusion, LoRA on linear layers, and prefixes of adapters"


class _Fused:
    """What comes before the library's class.

    The library asks for three things, the output, ``down`` and ``up``. It never reads ``down``; ``up`` it reads in
    compositions, and there it is computed. What isn't computed is None.
    """

    _fastadapt_backend = None
    _fastadapt_config = None

    def _residual(self, residual_input: Tensor) -> Tensor | None:
        return residual_input

    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False):
        if not draws(self) and refused(self) is None:
            result = adapted(self, x, self._residual(residual_input), alone(self._fastadapt_config))
            if result is not None:
                return result[0], None, result[1]
        return super().forward(x, residual_input, output_gating)


class Adapter(_Fused, modeling.Adapter):
    """``adapters.methods.modeling.Adapter`` on kernels."""


class ParallelAdapter(_Fused, modeling.ParallelAdapter):
    """``adapters.methods.modeling.ParallelAdapter`` on kernels; the library adds its output to that of the sublayer."""

    def _residual(self, residual_input: Tensor) -> None:
        return None


_PARTS = (adapters_fusion, adapters_lora, adapters_prefix)
_OURS = {modeling.Adapter: Adapter, modeling.ParallelAdapter: ParallelAdapter}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def _examined(layer) -> tuple[str, str]:
    """State and reason of an adapter of the library."""
    kind = type(layer)
    if _THEIRS.get(kind, kind) not in _OURS:
        return "left", f"no kernel for {kind.__name__}"
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return "left", "its forward has been replaced, or has hooks"
    if reason := refused(layer):
        return "left", reason
    return ("in part", f"{reason} in training") if (reason := random(layer)) else ("accelerated", "")


def _others(model: nn.Module) -> list[Row]:
    """Layers of the library's other methods."""
    rows = []
    for name, module in model.named_modules():
        other = isinstance(module, AdapterLayerBase) and not isinstance(module, BottleneckLayer | LoRALayer | PrefixTuningLayer)
        if other and len(module.adapter_modules):
            rows.append(Row(name, "left", f"no kernel for {type(module).__name__}"))
    return rows


def _losing_rules(model: nn.Module) -> list[nn.Module]:
    """Models of the library, with no head around them, whose save_adapter passes by the rules that PHM layers share."""
    owners = [module for module in model.modules() if hasattr(module, "save_adapter")]
    heads = {id(module.base_model) for module in owners if module.base_model is not module}
    bare = [module for module in owners if module.base_model is module and id(module) not in heads]
    return [m for m in bare if any(k.startswith("shared_parameters.") and "phm_rule" in k for k in _passed_by(m))]


def _passed_by(model: nn.Module) -> list[str]:
    keys = list(model.state_dict())
    return [] if any(".shared_parameters." in key for key in keys) else keys


def accelerate(model: nn.Module, backend: str | None) -> list[Row]:
    """Swap the classes of the adapters that kernels serve."""
    rows = []
    for path, home in [(path, home) for path, home in model.named_modules() if isinstance(home, BottleneckLayer)]:
        for name, layer in home.adapters.items():
            row = Row(f"{path}.adapters.{name}" if path else f"adapters.{name}", *_examined(layer))
            rows.append(row)
            if row.state != "left":
                layer.__class__ = _OURS.get(type(layer), type(layer))
                layer._fastadapt_backend, layer._fastadapt_config = backend, home.adapters_config
    for bare in _losing_rules(model):
        warnings.warn(
            f"accelerate: save_adapter of a {type(bare).__name__} without a head leaves out the rule that its PHM layers "
            "share; fastadapt.integrations.adapters.save_adapter writes it too",
            stacklevel=4,
        )
    return rows + [row for part in _PARTS for row in part.accelerate(model, backend)] + _others(model)


def restore(model: nn.Module) -> None:
    """Give every adapter its class back."""
    for module in model.modules():
        if type(module) in _THEIRS:
            module.__class__ = _THEIRS[type(module)]
            for name in ("_fastadapt_backend", "_fastadapt_config"):
                module.__dict__.pop(name, None)
    for part in _PARTS:
        part.restore(model)


def save_adapter(model: nn.Module, folder: str | Path, name: str, **options) -> None:
    """``model.save_adapter(folder, name, **options)``, and what that leaves out.

    The library's filter of names passes by the shared parameters of a model without a head (``BertModel``, not
    ``BertForSequenceClassification``), so that a Compacter comes back with a new rule drawn at random. Here they are in the
    file, under the names that a model with a head would give them; the library's own ``load_adapter`` reads them.
    """
    model.save_adapter(str(folder), name, **options)
    shared = getattr(model.base_model, "shared_parameters", {})
    if model.base_model is not model or name not in shared:
        return
    safe = Path(folder) / SAFE_WEIGHTS_NAME
    if options.get("use_safetensors"):
        from safetensors.torch import load_file, save_file

        tensors, write, path = load_file(safe), save_file, safe
    else:
        path = Path(folder) / WEIGHTS_NAME
        tensors, write = torch.load(path, weights_only=True), torch.save
    if any(f"shared_parameters.{name}." in key for key in tensors):
        return
    tensors |= {f"shared_parameters.{name}.{key}": p.detach().contiguous() for key, p in shared[name].items()}
    write({f"{model.base_model_prefix}.{key}": tensor for key, tensor in tensors.items()}, path)
