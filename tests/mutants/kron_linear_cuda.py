"""Errors planted in the CUDA kernels of kron_linear."""

from . import Mutant, Rung
from .bottleneck_cuda import KEPT, ONLY_BFLOAT16, ONLY_FLOAT32

HEADERS = "csrc/cuda/"
KRON, PACK = HEADERS + "kron.cuh", HEADERS + "kron_pack.cuh"
LINEAR = HEADERS + "kron_linear.cuh"


def emulated(select, tests="tests/test_cuda_emulated.py", edits=ONLY_BFLOAT16):
    return Rung(tests, f"kron_linear-{select}", plugins=KEPT, edits=edits)


PLAIN = emulated("m33-d65-r17-bfloat16 and test_matches_reference")
SQUARE = emulated("square-bfloat16 and test_matches_reference")
STRIDES = emulated("m33-d65-r17-bfloat16 and test_any_strides")
SPLITS = emulated("many-rows-bfloat16 and test_matches_reference")
ADDRESSES = emulated("m33-d65-r17-bfloat16-address and test_sanitizer_reports_nothing")
FAR = Rung("tests/test_far_rows.py", "test_emulated_cuda and kron_linear", plugins=KEPT, edits=ONLY_BFLOAT16)
EXACT = emulated("integers-float32 and test_integers_are_exact", "tests/test_cuda_emulated_numerics.py", ONLY_FLOAT32)
PTX = Rung(
    "tests/test_ptx.py", "test_cuda_matches_reference and kron_linear-small-float32-1-sm_80", plugins=KEPT, edits=ONLY_FLOAT32
)
ERROR = "grad of {}: (l2|max) error|not finite"
OUTPUT = "output: (l2|max) error|not finite"

MUTANTS = (
    Mutant(
        "rule the wrong way round", "stride ignored", {PLAIN: "(l2|max) error|not finite"},
        [(KRON, "const int step = TRANSPOSED ? 1 : rule.to, line = TRANSPOSED ? rule.to : 1;",
          "const int step = TRANSPOSED ? rule.to : 1, line = TRANSPOSED ? 1 : rule.to;")],
        fast=True,
    ),
    Mutant(
        "last lines of a warp left out", "tail skipped", {PLAIN: OUTPUT},
        [(KRON, "divide_up(count, kLines) * blocks", "count / kLines * blocks")],
        fast=True,
    ),
    Mutant(
        "quads of any chunk loaded at once", "alignment assumed", {ADDRESSES: "misaligned|heap-buffer-overflow"},
        [(KRON, "rows.inner.vector && features % 4 == 0", "rows.inner.stride == 1")],
    ),
    Mutant(
        "elements beside each other", "stride ignored", {STRIDES: OUTPUT},
        [(KRON, "to_float(from[e * inner.stride])", "to_float(from[e])")],
    ),
    Mutant(
        "a feature too many", "mask off by one", {ADDRESSES: "heap-buffer-overflow"},
        [(KRON, "if (e < left) to[e] =", "if (e <= left) to[e] =")],
    ),
    Mutant(
        "lines of a factor in their own order", "stride ignored", {SQUARE: OUTPUT},
        [(PACK, "if (placed) i = Placed(", "if (false) i = Placed(")],
    ),
    Mutant(
        "rows begin in 32 bits", "32-bit offset", {FAR: "(l2|max) error|not finite|Segmentation fault"},
        [(KRON, "x[i] = x_rows.offset(row[i]);", "x[i] = static_cast<int>(x_rows.offset(row[i]));")],
    ),
    Mutant(
        "every plane but the first four", "missing term", {SPLITS: ERROR.format("s")},
        [(PACK, "divide_up(p.splits - warp, kWarps)", "least<int64_t>(p.splits - warp, 1)")],
    ),
    Mutant(
        "factor scale forgotten in the gradient of x", "missing term", {PLAIN: ERROR.format("x")},
        [(LINEAR, "0, p.rank, p.scale);", "0, p.rank);")],
    ),
    Mutant(
        "no barrier between projection and rule", "missing barrier", {PTX: "race between (warps|lanes)"},
        [(LINEAR, "rows, p.s, 0);\n  __syncthreads();\n", "rows, p.s, 0);\n")],
    ),
)  # fmt: skip
