"""Errors planted in the CUDA kernels of compacter."""

from . import Mutant, Rung
from .bottleneck_cuda import KEPT, ONLY_BFLOAT16, ONLY_FLOAT32

HEADERS = "csrc/cuda/"
KRON, PACK = HEADERS + "kron.cuh", HEADERS + "kron_pack.cuh"
FWD, BWD, PLAN = HEADERS + "compacter.cuh", HEADERS + "compacter_backward.cuh", HEADERS + "compacter_plan.cuh"


def emulated(select, tests="tests/test_cuda_emulated.py", edits=ONLY_BFLOAT16):
    return Rung(tests, f"compacter-{select}", plugins=KEPT, edits=edits)


NUMERICS = "tests/test_cuda_emulated_numerics.py"
PLAIN = emulated("m33-d65-r17-bfloat16 and test_matches_reference")
BANKED = emulated("bank-with-everything-bfloat16 and test_matches_reference")
INFINITE = emulated("m33-d65-r17-float32 and test_nan_and_inf_spread_as_in_pytorch", NUMERICS, ONLY_FLOAT32)
ROUNDING = emulated("everything-bfloat16 and test_rounds_where_the_docstring_says", NUMERICS)
ALONE = emulated("everything-bfloat16 and test_one_gradient_alone")
RACES = emulated("bank-with-everything-bfloat16-thread and test_sanitizer_reports_nothing")
ADDRESSES = emulated("bank-with-everything-bfloat16-address and test_sanitizer_reports_nothing")
SPLITS = emulated("many-rows-bfloat16 and test_matches_reference")
ERROR = "grad of {}: (l2|max) error|not finite"
OUTPUT = "output: (l2|max) error|not finite"

MUTANTS = (
    Mutant(
        "bias behind the activation", "bias after the activation", {PLAIN: OUTPUT},
        [(FWD, "    hidden[i] = activate(p.activation, v);\n", ""),
         (FWD, "    if (p.down_bias) v +=", "    hidden[i] = activate(p.activation, v);\n    if (p.down_bias) hidden[i] +=")],
        fast=True,
    ),
    Mutant(
        "first tile of a split forgotten", "missing term", {SPLITS: ERROR.format("down_s")},
        [(KRON, "data[i] = first ? v : data[i] + v;", "data[i] = v;")],
        fast=True,
    ),
    Mutant(
        "scale on the residual", "scale on the residual", {PLAIN: OUTPUT},
        [(FWD, "scale * v[e] + more[e]", "scale * (v[e] + more[e])")],
    ),
    Mutant(
        "biases of the first adapter", "wrong row of a bank", {BANKED: OUTPUT},
        [(FWD, "p.up_bias + static_cast<int64_t>(adapter) * p.d() : nullptr", "p.up_bias : nullptr")],
    ),
    Mutant(
        "rows without an adapter left out", "id -1 not honoured", {BANKED: "not finite"},
        [(PLAN, "p.groups.g + (p.groups.order ? 2 : 0)", "p.groups.g + 0")],
    ),
    Mutant(
        "infinities in the padding of the rank", "zero times infinity", {INFINITE: "spreads otherwise"},
        [(KRON, "if (column < rank.columns) {", "{")],
    ),
    Mutant(
        "hidden numbers in 16 bits", "sum in 16 bits", {ROUNDING: "rounding model"},
        [(FWD, "mix<false>(h, z, rows, p.up_a, adapter, p.rank);\n  __syncthreads();\n",
          "mix<false>(h, z, rows, p.up_a, adapter, p.rank);\n  __syncthreads();\n"
          "  for (int i = threadIdx.x; i < rows * p.numbers(); i += kThreads) h[i] = to_float(from_float<T>(h[i]));\n"
          "  __syncthreads();\n")],
    ),
    Mutant(
        "sums of grad_y for their own gradient alone", "gradient mask ignored", {ALONE: ERROR.format("scale")},
        [(BWD, "q.up_t || q.up_bias || (q.scale && bias)", "q.up_t || q.up_bias")],
    ),
    Mutant(
        "no barrier behind the table of rows", "missing barrier", {RACES: "data race"},
        [(KRON, "other_rows.offset(row[i]) : 0;\n    }\n    __syncthreads();\n", "other_rows.offset(row[i]) : 0;\n    }\n")],
    ),
    Mutant(
        "planes of every split in one", "race", {SPLITS: ERROR.format("down_s")},
        [(BWD, "blockIdx.x % (q.splits ? q.splits : 1) * p.groups.g + adapter", "adapter")],
    ),
    Mutant(
        "one line of a factor too many", "load out of bounds", {ADDRESSES: "heap-buffer-overflow"},
        [(PACK, "if (i >= lines || column_at", "if (i > lines || column_at")],
    ),
)  # fmt: skip
