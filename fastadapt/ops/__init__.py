from .bottleneck import bottleneck, bottleneck_reference
from .lora_linear import lora_linear, lora_linear_reference
from .lora_merge import lora_merge

__all__ = ["bottleneck", "bottleneck_reference", "lora_linear", "lora_linear_reference", "lora_merge"]
