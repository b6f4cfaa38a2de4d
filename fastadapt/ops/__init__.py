from .adapter_fusion import adapter_fusion, adapter_fusion_reference
from .bottleneck import bottleneck, bottleneck_reference
from .compacter import compacter, compacter_reference
from .kron_linear import kron_linear, kron_linear_reference
from .lora_linear import lora_linear, lora_linear_reference
from .lora_merge import lora_merge
from .prefix_attention import prefix_attention, prefix_attention_reference

__all__ = [
    "adapter_fusion", "adapter_fusion_reference", "bottleneck", "bottleneck_reference", "compacter", "compacter_reference",
    "kron_linear", "kron_linear_reference", "lora_linear", "lora_linear_reference", "lora_merge", "prefix_attention",
    "prefix_attention_reference",
]  # fmt: skip
