"""A few calls for compute-sanitizer: forward and backward of every op and backend, with nothing else on the device.

Inputs are made on the host, and memory isn't filled before a kernel writes it, so that initcheck sees what was never written.
"""

import sys

import torch

from ..battery import BACKENDS, TELLING, run
from ..specs import SPECS
from .device import moved


def main(device="cuda", backends=BACKENDS) -> int:
    wrong = calls = 0
    for name, spec in SPECS.items():
        for backend in backends:
            for case in (case for case in spec.cases if case.name in TELLING):
                for dtype in (torch.float32, torch.bfloat16):
                    torch.manual_seed(0)
                    outputs = run(spec.op, moved(case.make(dtype, "cpu"), device), backend=backend)
                    infinite = [n for n, t in outputs.items() if not torch.isfinite(t.cpu()).all()]
                    verdict = f"error: not finite: {infinite}" if infinite else "done"
                    print(f"{name} {backend} {case.name} {dtype}: {verdict}", flush=True)
                    calls, wrong = calls + 1, wrong + bool(infinite)
    return 0 if calls and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
