"""Errors planted in the CUDA kernels of adapter_fusion."""

from . import Mutant, Rung
from .bottleneck_cuda import KEPT, ONLY_BFLOAT16, ONLY_FLOAT32

HEADERS = "csrc/cuda/"
KERNELS, PLAN = HEADERS + "adapter_fusion.cuh", HEADERS + "adapter_fusion_plan.cuh"


def emulated(select, tests="tests/test_cuda_emulated.py", edits=ONLY_BFLOAT16):
    return Rung(tests, f"adapter_fusion-{select}", plugins=KEPT, edits=edits)


NUMERICS = "tests/test_cuda_emulated_numerics.py"
PLAIN = emulated("m33-d65-r17-bfloat16 and test_matches_reference")
SHARED = emulated("many-rows-bfloat16 and test_matches_reference")
WIDE = emulated("wide-and-shared-bfloat16 and test_matches_reference")
MANY = emulated("many-shared-adapters-float32 and test_matches_reference", edits=ONLY_FLOAT32)
INFINITE = emulated("m33-d65-r17-float32 and test_nan_and_inf_spread_as_in_pytorch", NUMERICS, ONLY_FLOAT32)
ROUNDING = emulated("everything-bfloat16 and test_rounds_where_the_docstring_says", NUMERICS)
ALONE = emulated("everything-bfloat16 and test_one_gradient_alone")
RACES = emulated("everything-bfloat16-thread and test_sanitizer_reports_nothing")
ADDRESSES = emulated("m33-d65-r17-bfloat16-address and test_sanitizer_reports_nothing")
ALIGNMENT = emulated("vector-bfloat16 and test_no_access_out_of_bounds")
FAR = Rung(
    "tests/test_far_rows.py", "test_emulated_cuda and adapter_fusion and not last_blocks", plugins=KEPT, edits=ONLY_BFLOAT16
)
ERROR = "grad of {}: (l2|max) error|not finite"
OUTPUT = "output: (l2|max) error|not finite"

MUTANTS = (
    Mutant(
        "adapters behind the first four not weighed", "tail skipped", {PLAIN: OUTPUT},
        [(KERNELS, "first < p.g; first += kTogether) {\n        Chunk<T> chunks",
          "first < least(p.g, kTogether); first += kTogether) {\n        Chunk<T> chunks")],
        fast=True,
    ),
    Mutant(
        "no mean in the gradient of the softmax", "missing term", {PLAIN: ERROR.format("query")},
        [(KERNELS, "weights[i] * (factor - mean)", "weights[i] * factor")],
        fast=True,
    ),
    Mutant(
        "gradient of the keys as values left out", "missing term", {SHARED: ERROR.format("keys")},
        [(KERNELS, "if (q.shares_keys) key[e]", "if (q.values) key[e]")],
    ),
    Mutant(
        "products of one warp of a wide row forgotten", "one tile of several", {WIDE: OUTPUT},
        [(KERNELS, "w = 1; w < kWarps", "w = 2; w < kWarps")],
    ),
    Mutant(
        "a warp too few for the last rows", "grid too small", {PLAIN: "not finite"},
        [(PLAN, "return divide_up(p.m, kThreads / p.row_threads);", "return p.m / (kThreads / p.row_threads);")],
    ),
    Mutant(
        "NaN weighs nothing", "NaN swallowed", {INFINITE: "spreads otherwise"},
        [(KERNELS, "expf(factor - top)", "fmaxf(expf(factor - top), 0.f)")],
    ),
    Mutant(
        "weights in 16 bits", "sum in 16 bits", {ROUNDING: "rounding model"},
        [(KERNELS, "factor /= sum;", "factor = to_float(from_float<T>(factor / sum));")],
    ),
    Mutant(
        "products for other gradients than the scale's alone", "gradient mask ignored", {ALONE: ERROR.format("scale")},
        [(KERNELS, "if (q.query || q.keys || q.scale) {", "if (q.query || q.keys) {")],
    ),
    Mutant(
        "parts of the scale's gradient in one place", "race", {ALONE: ERROR.format("scale")},
        [(KERNELS, "q.scale[blockIdx.x] = sum", "q.scale[0] = sum")],
    ),
    Mutant(
        "no barrier behind the weights", "missing barrier", {RACES: "data race"},
        [(KERNELS, "  __syncwarp();\n  row.weigh", "  row.weigh")],
    ),
    Mutant(
        "one column too many", "load out of bounds", {ADDRESSES: "heap-buffer-overflow"},
        [(KERNELS, "e < valid ?", "e <= valid ?")],
    ),
    Mutant(
        "adapters that begin anywhere read as vectors", "alignment assumed", {ALIGNMENT: "misaligned address"},
        [(PLAN, "vector &= array.size[0] == 1 ||", "vector &= array.size[0] >= 1 ||")],
    ),
    Mutant(
        "adapters less than 2**31 elements apart", "32-bit offset", {FAR: "Segmentation|error"},
        [(KERNELS, "int64_t stride;  // from one", "int stride;  // from one")],
    ),
    Mutant(
        "keys kept whether they fit or not", "too much shared memory", {MANY: "bytes of shared memory"},
        [(PLAN, "read_twice && 2 * bytes <= device.shared_limit", "read_twice")],
    ),
)  # fmt: skip
