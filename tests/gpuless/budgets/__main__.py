"""Compile every kernel for every chip and write the budgets. Takes about a quarter of an hour of one core."""

from ...specs import SPECS
from .. import cuda_budget, offline_gate
from ..offline import CHIPS
from . import write


def main():
    for op, spec in SPECS.items():
        measured = {}
        for chip in CHIPS:
            print(f"{op}: Triton for {chip}", flush=True)
            for build in offline_gate.builds(spec, chip, spec.compiled)[0]:
                measured.setdefault(build.name, {})[chip] = offline_gate.row(build.machine)
        write(f"{op}.triton", offline_gate.COMPILER, measured)
    for source in cuda_budget.SOURCES:
        print(f"{source.name}: nvcc", flush=True)
        write(f"{source.stem}.cuda", cuda_budget.compiler(), cuda_budget.compiled(source, cuda_budget.ARCHITECTURES))


if __name__ == "__main__":
    main()
