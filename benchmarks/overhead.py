"""Overhead of a call: microseconds where there is next to nothing to compute, beside one ``F.linear`` of the same width."""

from functools import partial

import torch
import torch.nn.functional as F

from tests.specs import bottleneck, lora_linear

from .contestants import backends, differentiated, floats
from .report import print_rows
from .timing import WallTimer, interleave

D = 64
# Arguments of a call with one row of width D.
SMALLEST = {
    "bottleneck": partial(bottleneck.make, shape=(1, D), r=8),
    "lora_linear": partial(lora_linear.make, shape=(1, D), n=D, r=8),
}  # fmt: skip
SETTINGS = {"no grad": (False, False), "grad, forward": (True, False), "grad, forward+backward": (True, True)}


def enter(op: str, spec, device: torch.device, recorded: bool) -> dict[str, tuple]:
    """Calls that return an output, each with the tensors that a training step differentiates."""
    arguments = SMALLEST[op](torch.float32, str(device))
    linear = {"input": arguments["x"], "weight": torch.randn(D, D, device=device), "bias": torch.randn(D, device=device)}
    inputs = list(differentiated(spec, arguments).values())
    for tensor in (*inputs, *floats(linear).values()):
        tensor.requires_grad_(recorded)
    found = {"F.linear": (partial(F.linear, **linear), list(linear.values()))}
    found[op] = (partial(spec.op, **arguments), inputs)
    found |= {f"{op}, {b}": (partial(spec.op, **arguments, backend=b), inputs) for b in backends(spec, arguments, device)}
    return found


def main(ops: list[str], specs: dict, device: torch.device, seconds: float) -> None:
    """Print a table: no gradient recorded; recorded, forward alone; recorded, forward and backward."""
    timer, grad_y = WallTimer(), torch.randn(1, D, device=device)
    for op in [op for op in ops if op in SMALLEST]:
        table = {}
        for recorded, stepped in SETTINGS.values():
            with torch.set_grad_enabled(recorded):
                calls = {
                    name: partial(lambda f, i: torch.autograd.grad(f(), i, grad_y), forward, inputs) if stepped else forward
                    for name, (forward, inputs) in enter(op, specs[op], device, recorded).items()
                }
                for name, timing in interleave(calls, timer, seconds).items():
                    table.setdefault(name, []).append(timing.median * 1e6)
        print(f"\noverhead of {op}, one row of width {D}, float32: µs ({timer.name}), and how many F.linear that is")
        base = table["F.linear"]
        lines = [[name, *(f"{us:.2f} = {us / b:.2f} x" for us, b in zip(row, base))] for name, row in table.items()]
        print_rows([["call", *SETTINGS], *lines])
