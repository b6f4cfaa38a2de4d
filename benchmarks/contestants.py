"""The calls that are measured against each other in one row: the same arguments, the same outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .peers import BY_HAND, ONLY_COMPILED, PARTS, PEERS

BACKENDS = ("native", "triton")
COMPILE_MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}  # graphs are the timer's business


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


def differentiated(spec, arguments: dict) -> dict[str, Tensor]:
    """What a training step differentiates."""
    return {name: tensor for name, tensor in floats(arguments).items() if name not in spec.frozen}


def backends(spec, arguments: dict, device: torch.device) -> list[str]:
    """The kernels of this package that can run the call here; Triton's interpreter isn't one."""
    names = [b for b in BACKENDS if not (b == "triton" and device.type == "cpu")]
    return [b for b in names if spec.fwd.refusal(b, device.type, spec.leaf_args(arguments)) is None]


def enter(name: str, spec, arguments: dict, device: torch.device, compile_modes: list[str]) -> dict[str, Contestant]:
    """Everything that can compute the op for these arguments."""
    tensors = differentiated(spec, arguments)
    built = {peer: build(arguments) for peer, build in PEERS.get(name, {}).items()}
    plain = {peer: Contestant(*call) for peer, call in built.items() if call is not None}
    by_hand = partial(BY_HAND.get(name, spec.reference), **arguments)
    found = {"eager": Contestant(by_hand, tensors)}
    for mode in compile_modes:
        label, options = "compiled" if mode == "default" else mode, {"dynamic": False, "mode": COMPILE_MODES[mode]}
        found[label] = Contestant(torch.compile(by_hand, fullgraph=True, **options), tensors)
        plain |= {
            f"{label} {peer}": Contestant(torch.compile(plain[peer].forward, **options), plain[peer].inputs)
            for peer in built if peer in plain
        }  # fmt: skip
    for backend in backends(spec, arguments, device):
        found[backend] = Contestant(partial(spec.op, **arguments, backend=backend), tensors)
    return {**found, **{peer: contestant for peer, contestant in plain.items() if peer not in ONLY_COMPILED}}


def parts(name: str, arguments: dict) -> dict[str, Contestant]:
    """Calls that compute less than the op: what it would cost without the adapter."""
    return {part: Contestant(*build(arguments)) for part, build in PARTS.get(name, {}).items()}


def quiet(name: str, spec, arguments: dict) -> Contestant | None:
    """Plain PyTorch without what makes these arguments' results random; None if nothing does."""
    edits = {argument: value for argument, value in spec.quiet if argument in arguments}
    by_hand = partial(BY_HAND.get(name, spec.reference), **{**arguments, **edits})
    return Contestant(by_hand, differentiated(spec, arguments)) if edits else None
