"""Adapter layers whose forward pass is one kernel."""

from .attach import attach
from .bank import AdapterBank
from .bitfit import train_biases
from .bottleneck import BottleneckAdapter, ParallelAdapter
from .compacter import CompacterAdapter
from .compose import Averaged, Stacked, Switched, average_adapters
from .count import trainable_parameters
from .drop import drop_adapters
from .freeze import freeze_except
from .fusion import AdapterFusion
from .hyper import HyperAdapter, HyperSite, HyperWeights
from .kron import KronALinear, KronLinear, PHMLinear, phm_rule
from .lora import LoRAEmbedding, LoRALinear
from .lora_attention import LoRAMultiheadAttention
from .lora_bank import LoRABank
from .prefix import Prefix, PrefixAttention, PrefixEncoder
from .prefix_multihead import PrefixMultiheadAttention
from .prompt import PromptEmbedding, PromptEncoder, prompt_inputs
from .route import route
from .side import LadderSideNetwork, SideNetwork
from .state import load_adapters, save_adapters

__all__ = [
    "AdapterBank",
    "AdapterFusion",
    "Averaged",
    "BottleneckAdapter",
    "CompacterAdapter",
    "HyperAdapter",
    "HyperSite",
    "HyperWeights",
    "KronALinear",
    "KronLinear",
    "LadderSideNetwork",
    "LoRABank",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "PHMLinear",
    "ParallelAdapter",
    "Prefix",
    "PrefixAttention",
    "PrefixEncoder",
    "PrefixMultiheadAttention",
    "PromptEmbedding",
    "PromptEncoder",
    "SideNetwork",
    "Stacked",
    "Switched",
    "attach",
    "average_adapters",
    "drop_adapters",
    "freeze_except",
    "load_adapters",
    "phm_rule",
    "prompt_inputs",
    "route",
    "save_adapters",
    "train_biases",
    "trainable_parameters",
]
