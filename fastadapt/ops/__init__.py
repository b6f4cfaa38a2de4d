from .bottleneck import bottleneck, bottleneck_reference
from .lora_linear import lora_linear, lora_linear_reference

__all__ = ["bottleneck", "bottleneck_reference", "lora_linear", "lora_linear_reference"]
