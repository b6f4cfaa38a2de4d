"""Adapter layers whose forward pass is one kernel."""

from .bank import AdapterBank
from .bottleneck import BottleneckAdapter, ParallelAdapter
from .freeze import freeze_except
from .lora import LoRAEmbedding, LoRALinear
from .lora_attention import LoRAMultiheadAttention
from .lora_bank import LoRABank

__all__ = [
    "AdapterBank",
    "BottleneckAdapter",
    "LoRABank",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "ParallelAdapter",
    "freeze_except",
]
