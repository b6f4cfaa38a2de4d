"""A few calls for compute-sanitizer: forward and backward of every op and backend, with nothing else on the device.

Inputs are made on the host, and memory isn't filled before a kernel writes it, so that initcheck sees what was never written.
"""

import sys

import torch

from ..battery import BACKENDS, TELLING, run
from ..specs import SPECS
from .device import moved


def main() -> int:
    calls = 0
    for name, spec in SPECS.items():
        for backend in BACKENDS:
            for case in (case for case in spec.cases if case.name in TELLING):
                for dtype in (torch.float32, torch.bfloat16):
                    torch.manual_seed(0)
                    host = case.make(dtype, "cpu")
                    arguments = moved(host, "cuda")
                    outputs = run(spec.op, arguments, backend=backend)
                    finite = all(torch.isfinite(t.cpu()).all() for t in outputs.values())
                    print(f"{name} {backend} {case.name} {dtype}: {'finite' if finite else 'error: not finite'}", flush=True)
                    calls += finite
    return 0 if calls == 2 * len(TELLING) * len(BACKENDS) * len(SPECS) else 1


if __name__ == "__main__":
    sys.exit(main())
