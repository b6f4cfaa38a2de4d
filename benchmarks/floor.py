"""The floor of a call: the longer of its arithmetic at the rate of ``torch.mm`` and its bytes at the rate of a copy."""

from dataclasses import dataclass

import torch

from .timing import Call, Timing, WallTimer

# A training step reads x, writes y, reads x and grad_y, writes grad_x: five passes for the two of forward.
TRAINING_BYTES = 2.5


@dataclass(frozen=True)
class Floor:
    seconds: float
    bound: str  # "flops" or "bytes"


class Rates:
    """Measures, in turn with the contestants, the best matrix product of a dtype and a copy as large as the case's traffic."""

    def __init__(self, dtype: torch.dtype, device: torch.device, timer: WallTimer):
        self.dtype, self.device = dtype, device
        best = 0.0
        for n in (384, 512, 768, 1024) if device.type == "cpu" else (2048, 4096, 8192):
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            call = timer.prepare(lambda a=a, b=b: torch.mm(a, b))
            seconds = min(timer.time(call, 1) for _ in range(5))
            if 2 * n**3 / seconds > 1.03 * best:  # a size that is hardly better isn't worth its time in every round
                best, self.flops, self.mm = 2 * n**3 / seconds, 2 * n**3, call

    def calls(self, bytes_: int, timer: WallTimer) -> dict[str, Call]:
        """The copy reads one half of ``bytes_`` and writes the other into a fresh output, as any implementation must."""
        source = torch.ones(max(1, bytes_ // 2 // self.dtype.itemsize), dtype=self.dtype, device=self.device)
        return {"mm": self.mm, "copy": timer.prepare(source.clone)}

    def floor(self, case, timings: dict[str, Timing], training: bool) -> Floor:
        backward = 2 * case.flops if case.backward_flops is None else case.backward_flops
        arithmetic = (case.flops + training * backward) * timings["mm"].median / self.flops
        traffic = timings["copy"].median * (TRAINING_BYTES if training else 1)
        return Floor(max(arithmetic, traffic), "flops" if arithmetic > traffic else "bytes")
