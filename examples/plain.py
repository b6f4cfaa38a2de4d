"""The adapters of the demo as plain PyTorch modules, op by op: what ``fastadapt.nn`` is compared with.

Attributes have the names of ``fastadapt.nn``, so that a ``state_dict`` of one loads into the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class BottleneckAdapter(nn.Module):
    """``residual + scale * up(act(down(x)))``; ``skip`` adds ``skip_weight * x`` or bends the activation by a linear path."""

    def __init__(
        self, d: int, r: int, *, activation: str = "relu", residual: bool = True, scale: float = 1.0, skip: str | None = None
    ):  # fmt: skip
        super().__init__()
        self.down, self.up = nn.Linear(d, r), nn.Linear(r, d)
        self.activation, self.residual, self.scale = ACTIVATIONS[activation], residual, scale
        self.register_parameter("skip_weight", nn.Parameter(torch.zeros(d)) if skip == "channel" else None)
        self.register_parameter("hidden_skip_weight", nn.Parameter(torch.zeros(r)) if skip == "hidden" else None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.down(x)
        hidden = self.activation(z)
        if self.hidden_skip_weight is not None:
            hidden = hidden + self.hidden_skip_weight * z
        y = self.up(hidden)
        if self.scale != 1.0:
            y = self.scale * y
        if self.skip_weight is not None:
            y = y + self.skip_weight * x
        if residual is None and self.residual:
            residual = x
        return y if residual is None else residual + y


class ParallelAdapter(nn.Module):
    """``layer(x) + adapter(x)``."""

    def __init__(self, layer: nn.Module, adapter: BottleneckAdapter):
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x, residual=self.layer(x))
