"""What is trained: by the type of module that a parameter belongs to, and by its name only where the user gives that."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from .bank import AdapterBank
from .bottleneck import BottleneckAdapter
from .compacter import CompacterAdapter
from .compose import Averaged, Stacked, Switched
from .fusion import AdapterFusion
from .hyper import HyperAdapter
from .kron import KronALinear, KronLinear, PHMLinear
from .lora import LoRAEmbedding, LoRALinear, is_conv1d
from .lora_attention import LoRAMultiheadAttention
from .lora_bank import LoRABank
from .prefix import PrefixEncoder
from .prompt import PromptEmbedding, PromptEncoder
from .side import LadderSideNetwork, SideNetwork

KINDS = {
    "bottleneck": (BottleneckAdapter, AdapterBank),
    "compacter": (CompacterAdapter, PHMLinear),
    "composed": (Averaged, Stacked, Switched),
    "fusion": (AdapterFusion,),
    "hyper": (HyperAdapter,),
    "kron": (KronALinear, KronLinear),
    "lora": (LoRALinear, LoRAEmbedding, LoRAMultiheadAttention, LoRABank),
    "prefix": (PrefixEncoder,),
    "prompt": (PromptEmbedding, PromptEncoder),
    "side": (SideNetwork, LadderSideNetwork),
}
_BESIDE_A_BASE = (*KINDS["lora"], *KINDS["side"], KronALinear)
_WITH_BIAS = (
    nn.Linear, nn.Bilinear, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd,
)  # fmt: skip


def _own_biases(module: nn.Module) -> list[nn.Parameter | None]:
    """What ``module`` itself adds to its outputs, by its type."""
    if isinstance(module, nn.MultiheadAttention):
        return [module.in_proj_bias]
    if isinstance(module, nn.RNNBase):
        return [p for p in module.parameters(recurse=False) if p.dim() == 1]
    return [module.bias] if isinstance(module, _WITH_BIAS) or is_conv1d(module) else []


def biases(model: nn.Module) -> set[nn.Parameter]:
    """The biases of ``model``, those of norms too, and not those in adapters.

    A table of relative positions, such as T5's ``relative_attention_bias``, is an embedding and no bias.
    """
    adapters = tuple(kind for kinds in KINDS.values() for kind in kinds)
    inside = {m for adapter in model.modules() if isinstance(adapter, adapters) for m in adapter.modules()}
    inside -= {m for adapter in model.modules() if isinstance(adapter, _BESIDE_A_BASE) for m in adapter.base.modules()}
    found = {p for module in model.modules() if module not in inside for p in _own_biases(module)}
    return found - {None}


def _parameters(model: nn.Module, kind: str | type) -> set[nn.Parameter]:
    """What is trained of ``kind``."""
    found = [module for module in model.modules() if isinstance(module, KINDS.get(kind, kind))]
    if not found:
        raise ValueError(f"model must have a module of the kind {kind!r}, got none")
    # An adapter that attach has put after a layer with LoRA is a child of that, as its base is.
    beside = [module for module in found if isinstance(module, _BESIDE_A_BASE)]
    others = [part for module in beside for part in (module.base, module._modules.get("attached")) if part is not None]
    return {p for module in found for p in module.parameters()} - {p for part in others for p in part.parameters()}


def named(extra: str | Iterable[str], known: Iterable[str]) -> set[str]:
    """Those of the names ``known`` that ``extra`` means: alone, by a submodule, or by a pattern of ``fnmatch``."""
    known, found = list(known), set()
    for name in (extra,) if isinstance(extra, str) else extra:
        meant = {key for key in known if key == name or key.startswith(f"{name}.") or fnmatchcase(key, name)}
        if not meant:
            raise ValueError(f"extra must name parameters, buffers or submodules of the model, got {name!r}")
        found |= meant
    return found


def freeze_except(
    model: nn.Module, kinds: str | type | Iterable[str | type], *, extra: str | Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """Freeze ``model`` but for the adapters in it.

    Args:
        model: a module that contains adapters.
        kinds: one or more of the keys of ``KINDS``, such as ``"bottleneck"``, ``"lora"``, ``"prefix"`` and ``"fusion"``, or
            types of modules, for example ``nn.LayerNorm``. What LoRA, KronA and side networks call ``base`` stays frozen,
            whatever its type, and so do the adapters that are fused, unless ``"bitfit"`` is among the kinds, which means all
            biases, see :func:`train_biases`.
        extra: names of other parameters or submodules that stay trainable, for example ``"classifier"``, or patterns of
            ``fnmatch`` for names of parameters.

    Returns:
        The parameters that stay trainable, by their names in ``model``: what an optimizer needs.

    Raises:
        ValueError: there is no such kind, ``model`` has no module of a kind, or a name of ``extra`` means nothing in it;
            ``model`` is as it was.
    """
    kinds = (kinds,) if isinstance(kinds, str | type) else tuple(kinds)
    for kind in kinds:
        if kind not in (*KINDS, "bitfit") and not isinstance(kind, type):
            raise ValueError(f"kinds must be types of modules or some of {(*KINDS, 'bitfit')}, got {kind!r}")
    wanted = {p for kind in kinds if kind != "bitfit" for p in _parameters(model, kind)}
    bases = {p for module in model.modules() if isinstance(module, _BESIDE_A_BASE) for p in module.base.parameters()}
    fused = [module.adapters for module in model.modules() if isinstance(module, AdapterFusion)]
    bases |= {p for adapters in fused for p in adapters.parameters()}
    wanted -= bases
    if "bitfit" in kinds:
        added = biases(model)
        if not added:
            raise ValueError(f"model must have biases for the kind 'bitfit', got none in {type(model).__name__}")
        wanted |= added
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted |= {parameters[name] for name in named(extra, parameters)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in wanted)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
