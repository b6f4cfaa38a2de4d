"""What is trained: by the type of module that a parameter belongs to, never by its name."""

from collections.abc import Iterable

from torch import nn

from .bank import AdapterBank
from .bottleneck import BottleneckAdapter
from .compacter import CompacterAdapter
from .compose import Averaged, Stacked, Switched
from .fusion import AdapterFusion
from .kron import KronALinear, KronLinear, PHMLinear
from .lora import LoRAEmbedding, LoRALinear
from .lora_attention import LoRAMultiheadAttention
from .lora_bank import LoRABank
from .prefix import PrefixEncoder
from .prompt import PromptEmbedding, PromptEncoder

KINDS = {
    "bottleneck": (BottleneckAdapter, AdapterBank),
    "compacter": (CompacterAdapter, PHMLinear),
    "composed": (Averaged, Stacked, Switched),
    "fusion": (AdapterFusion,),
    "kron": (KronALinear, KronLinear),
    "lora": (LoRALinear, LoRAEmbedding, LoRAMultiheadAttention, LoRABank),
    "prefix": (PrefixEncoder,),
    "prompt": (PromptEmbedding, PromptEncoder),
}
_BESIDE_A_BASE = (*KINDS["lora"], KronALinear)


def freeze_except(model: nn.Module, kinds: str | type | Iterable[str | type]) -> dict[str, nn.Parameter]:
    """Freeze ``model`` but for the adapters in it.

    Args:
        model: a module that contains adapters.
        kinds: one or more of ``"bottleneck"``, ``"compacter"``, ``"composed"``, ``"fusion"``, ``"kron"``, ``"lora"``,
            ``"prefix"``, ``"prompt"``, or types of modules, for example ``nn.LayerNorm``. The layers that LoRA and KronA call
            ``base`` stay frozen, whatever their type, and so do the adapters that are fused.

    Returns:
        The parameters that stay trainable, by their names in ``model``: what an optimizer needs.

    Raises:
        ValueError: there is no such kind, or ``model`` has no module of a kind.
    """
    kinds = (kinds,) if isinstance(kinds, str | type) else tuple(kinds)
    for kind in kinds:
        if kind not in KINDS and not isinstance(kind, type):
            raise ValueError(f"kinds must be types of modules or some of {tuple(KINDS)}, got {kind!r}")
    wanted = set()
    for kind in kinds:
        found = [module for module in model.modules() if isinstance(module, KINDS.get(kind, kind))]
        if not found:
            raise ValueError(f"model must have a module of the kind {kind!r}, got none")
        wanted.update(p for module in found for p in module.parameters())
    bases = {p for module in model.modules() if isinstance(module, _BESIDE_A_BASE) for p in module.base.parameters()}
    fused = [module.adapters for module in model.modules() if isinstance(module, AdapterFusion)]
    bases |= {p for adapters in fused for p in adapters.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in wanted - bases)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
