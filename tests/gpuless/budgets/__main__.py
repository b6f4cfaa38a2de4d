"""Compile every kernel for every chip and write the budgets: ``python -m tests.gpuless.budgets [op ...]``.

Takes about a quarter of an hour of one core for an op.
"""

import sys

from ...specs import SPECS
from .. import cuda_budget, nvcc, offline_gate
from ..offline import CHIPS
from . import write


def main(ops):
    for op in ops:
        spec, measured = SPECS[op], {}
        for chip in CHIPS:
            print(f"{op}: Triton for {chip}", flush=True)
            for build in offline_gate.builds(spec, chip, spec.compiled)[0]:
                measured.setdefault(build.name, {})[chip] = offline_gate.row(build.machine)
        write(f"{op}.triton", offline_gate.COMPILER, measured)
    for source in (s for s in cuda_budget.SOURCES if s.stem in ops):
        print(f"{source.name}: nvcc", flush=True)
        write(f"{source.stem}.cuda", nvcc.version(), cuda_budget.compiled(source, cuda_budget.ARCHITECTURES))


if __name__ == "__main__":
    main(sys.argv[1:] or SPECS)
