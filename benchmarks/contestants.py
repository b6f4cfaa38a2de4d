"""The calls that are measured against each other in one row: the same arguments, the same outputs, checked before timing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .peers import BY_HAND, PEERS

BACKENDS = ("native", "triton")
COMPILE_MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}  # graphs are the timer's business
# Relative l2 distance from plain PyTorch: enough to see that two calls compute the same thing; correctness is the tests' part.
SAME = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def floats(arguments: dict) -> dict[str, Tensor]:
    """The differentiable arguments: one entry a tensor, under its first name."""
    seen = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            seen.setdefault(id(value), (name, value))
    return dict(seen.values())


def substitute(arguments: dict, tensors: dict[str, Tensor]) -> dict:
    """``arguments`` with the tensors of ``floats`` replaced; what was one tensor stays one tensor."""
    swap = {id(value): tensors[name] for name, value in floats(arguments).items()}
    return {name: swap.get(id(value), value) for name, value in arguments.items()}


@dataclass(frozen=True)
class Contestant:
    """``forward`` computes y; ``inputs`` are the tensors whose gradients a training step takes."""

    forward: Callable[[], Tensor]
    inputs: dict[str, Tensor]

    def call(self, grad_y: Tensor | None) -> Callable[[], object]:
        """The call to measure: forward alone, or forward and the gradients of every input if ``grad_y`` is given."""
        if grad_y is None:
            return self.forward
        inputs = list(self.inputs.values())
        return lambda: torch.autograd.grad(self.forward(), inputs, grad_y)

    def results(self, grad_y: Tensor | None) -> dict[str, Tensor]:
        if grad_y is None:
            return {"y": self.forward()}
        y = self.forward()
        return {"y": y.detach(), **dict(zip(self.inputs, torch.autograd.grad(y, list(self.inputs.values()), grad_y)))}


def backends(spec, arguments: dict, device: torch.device) -> list[str]:
    """The kernels of this package that can run the call here; Triton's interpreter isn't one."""
    names = [b for b in BACKENDS if not (b == "triton" and device.type == "cpu")]
    return [b for b in names if spec.fwd.refusal(b, device.type, spec.leaf_args(arguments)) is None]


def enter(name: str, spec, arguments: dict, device: torch.device, compile_modes: list[str]) -> dict[str, Contestant]:
    """Everything that can compute the op for these arguments."""
    by_hand, found = BY_HAND.get(name, spec.reference), {}
    tensors = floats(arguments)
    found["eager"] = Contestant(partial(by_hand, **arguments), tensors)
    for mode in compile_modes:
        compiled = torch.compile(by_hand, fullgraph=True, dynamic=False, mode=COMPILE_MODES[mode])
        found["compiled" if mode == "default" else mode] = Contestant(partial(compiled, **arguments), tensors)
    for backend in backends(spec, arguments, device):
        found[backend] = Contestant(partial(spec.op, **arguments, backend=backend), tensors)
    for peer, build in PEERS.get(name, {}).items():
        if built := build(arguments):
            found[peer] = Contestant(*built)
    return found


def disagreement(results: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """What differs from plain PyTorch by more than rounding, or None."""
    for name, value in results.items():
        a, b = value.double(), expected[name].double()
        distance = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
        if not distance <= SAME[value.dtype]:
            return f"{'output' if name == 'y' else 'gradient of ' + name} differs from eager by {distance:.1e}"
    return None
