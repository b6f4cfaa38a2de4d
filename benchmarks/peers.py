"""What the kernels are measured against: the code that users write, and the modules of other libraries."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.ops.bottleneck import ACTIVATIONS

# A peer takes the arguments of the op and returns a call without arguments that computes the op's output, with the tensors
# it differentiates by the names of the op's arguments; or None where the other library has no such call.
Peer = Callable[[dict], tuple[Callable[[], Tensor], dict[str, Tensor]] | None]


def bottleneck_by_hand(x, down_weight, up_weight, *, down_bias, up_bias, residual, scale, activation):
    hidden = ACTIVATIONS[activation](F.linear(x, down_weight, down_bias))
    return residual + scale * F.linear(hidden, up_weight, up_bias)


def bottleneck_of_adapters(arguments: dict) -> tuple | None:
    """The module of the library ``adapters``, holding the same tensors."""
    a = arguments
    plain = {"x", "down_weight", "up_weight", "down_bias", "up_bias", "residual", "scale", "activation"}
    if set(a) != plain or a["residual"] is None or a["activation"] != "relu" or not isinstance(a["scale"], float):
        return None
    try:
        from adapters import SeqBnConfig
        from adapters.methods.modeling import Adapter
    except ImportError:
        return None

    r, d = a["down_weight"].shape
    module = Adapter("peer", d, r, SeqBnConfig(scaling=a["scale"]))
    linears = {"down": module.adapter_down[0], "up": module.adapter_up}
    inputs = {"x": a["x"]}
    for side, linear in linears.items():
        for kind in ("weight", "bias"):
            tensor = a[f"{side}_{kind}"]
            parameter = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
            setattr(linear, kind, parameter)
            inputs[f"{side}_{kind}"] = parameter
    if a["residual"] is not a["x"]:
        inputs["residual"] = a["residual"]
    return lambda: module(a["x"], a["residual"])[0], inputs


# How users write an op in plain PyTorch, for the benchmark's arguments; an op that isn't here uses its reference.
BY_HAND: dict[str, Callable] = {"bottleneck": bottleneck_by_hand}
PEERS: dict[str, dict[str, Peer]] = {"bottleneck": {"adapters": bottleneck_of_adapters}}
