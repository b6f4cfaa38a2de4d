"""Compile every kernel, or those of the ops that are named, for every chip and write the budgets. Takes some minutes an op."""

import sys

from ...specs import SPECS
from .. import cuda_budget, offline_gate
from ..offline import CHIPS
from . import write


def main(names):
    for op, spec in SPECS.items():
        if names and op not in names:
            continue
        measured = {}
        for chip in CHIPS:
            print(f"{op}: Triton for {chip}", flush=True)
            for build in offline_gate.builds(spec, chip, spec.compiled)[0]:
                measured.setdefault(build.name, {})[chip] = offline_gate.row(build.machine)
        write(f"{op}.triton", offline_gate.COMPILER, measured)
    for source in cuda_budget.SOURCES:
        if names and source.stem not in names:
            continue
        print(f"{source.name}: nvcc", flush=True)
        write(f"{source.stem}.cuda", cuda_budget.compiler(), cuda_budget.compiled(source, cuda_budget.ARCHITECTURES))


if __name__ == "__main__":
    main(sys.argv[1:])
