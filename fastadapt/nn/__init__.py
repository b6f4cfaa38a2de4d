"""Adapter layers whose forward pass is one kernel."""

from .bank import AdapterBank
from .bottleneck import BottleneckAdapter, ParallelAdapter

__all__ = ["AdapterBank", "BottleneckAdapter", "ParallelAdapter"]
