"""Errors planted in the CUDA kernels of lora_linear."""

from . import Mutant, Rung
from .bottleneck_cuda import KEPT, ONLY_BFLOAT16, ONLY_FLOAT32

HEADERS = "csrc/cuda/"
DROPOUT, FWD, BWD = HEADERS + "dropout.cuh", HEADERS + "lora_linear.cuh", HEADERS + "lora_linear_gradients.cuh"
PLAN = HEADERS + "lora_linear_plan.cuh"


def emulated(select, tests="tests/test_cuda_emulated.py", edits=ONLY_BFLOAT16):
    return Rung(tests, f"lora_linear-{select}", plugins=KEPT, edits=edits)


NUMERICS = "tests/test_cuda_emulated_numerics.py"
PLAIN = emulated("m65-d129-r48-bfloat16 and test_matches_reference")
DROPPED = emulated("dropout-bfloat16 and test_matches_reference")
DORA = emulated("dora-bfloat16 and test_matches_reference")
TRANSPOSED = emulated("transposed-float32 and test_matches_reference", edits=ONLY_FLOAT32)
ALONE = emulated("everything-bfloat16 and test_one_gradient_alone")
EXACT = emulated("integers-bfloat16 and test_integers_are_exact", NUMERICS)
ROUNDING = emulated("everything-bfloat16 and test_rounds_where_the_docstring_says", NUMERICS)
FAR = Rung("tests/test_far_rows.py", "test_emulated_cuda and lora_linear", plugins=KEPT, edits=ONLY_BFLOAT16)
SPLITS = emulated("many-rows-float32 and test_matches_reference", edits=ONLY_FLOAT32)
MASK = Rung("tests/test_cuda_lora_linear.py", "test_mask_of_any_row")
GAIN = Rung("tests/test_cuda_lora_linear.py", "test_gain_of_zero", plugins=KEPT, edits=ONLY_BFLOAT16)
CHUNKS = Rung("tests/test_cuda_lora_linear.py", "test_depth_of_several_chunks and bfloat16", plugins=KEPT, edits=ONLY_BFLOAT16)
ERROR = "grad of {}: (l2|max) error"

MUTANTS = (
    Mutant(
        "mask of the neighbouring columns", "mask off by one", {DROPPED: ERROR.format("x")},
        [(DROPOUT, "column0 / 8 + j + own);", "column0 / 8 + j + 1 + own);")],
        fast=True,
    ),
    Mutant(
        "adapter left out where the depth ends with it", "missing term", {PLAIN: "output: (l2|max) error"},
        [(FWD, "steps_r = static_cast<int>(divide_up(p.r, E::kDepth))", "steps_r = p.r / E::kDepth")],
        fast=True,
    ),
    Mutant(
        "numbers of six rounds", "mask off by one", {MASK: "assert"},
        [(DROPOUT, "round < 7", "round < 6")],
    ),
    Mutant(
        "rows of the mask in 32 bits", "32-bit offset", {MASK: "assert"},
        [(DROPOUT, "c2 = static_cast<uint32_t>(position >> 32);", "c2 = 0;")],
    ),
    Mutant(
        "rows begin in 32 bits", "32-bit offset", {FAR: "(l2|max) error|Segmentation fault"},
        [(FWD, "offsets[i] = row0 + i < m ? rows.offset(row0 + i) : -1;",
          "offsets[i] = row0 + i < m ? static_cast<int>(rows.offset(row0 + i)) : -1;")],
    ),
    Mutant(
        "planes of the first chunks overwritten", "missing term", {CHUNKS: "assert"},
        [(FWD, "store(p.splits == 1 ? 0 : chunk0 + step / kSteps);", "store(p.splits == 1 ? 0 : chunk0);")],
    ),
    Mutant(
        "last rows of columns left out", "tail skipped", {EXACT: "integers: y differs"},
        [(PLAN, "launch_over(divide_up(p.m, BM) * divide_up(p.n, BN)", "launch_over(p.m / BM * divide_up(p.n, BN)")],
    ),
    Mutant(
        "scale of dropout forgotten", "missing term", {DROPPED: ERROR.format("x")},
        [(DROPOUT, "pair[half * 2 + 1] * dropout.scale", "pair[half * 2 + 1]")],
    ),
    Mutant(
        "gain not in grad_y", "missing term", {DORA: ERROR.format("x")},
        [(PLAN, "if (!plan.a.gain.data) return plan.grad_y;", "return plan.grad_y;")],
    ),
    Mutant(
        "adapter in the layout of an ordinary layer", "stride ignored", {TRANSPOSED: "error|not finite"},
        [(PLAN, "transposed ? adapter.transposed().array() : adapter.array()", "adapter.array()")],
    ),
    Mutant(
        "t only for the gradient of x", "gradient mask ignored", {ALONE: "error|not finite|Fatal|Segmentation"},
        [(PLAN, "const bool needs_t = o.x.data || o.lora_a.data || o.diagonal.data;",
          "const bool needs_t = o.x.data || o.diagonal.data;")],
    ),
    Mutant(
        "sum over chunks in 16 bits", "sum in 16 bits", {ROUNDING: "rounding model"},
        [(FWD, "    sum *= p.factor;\n", "    sum = to_float(from_float<T>(sum)) * p.factor;\n")],
    ),
    Mutant(
        "rounding divided by a gain of zero", "NaN swallowed", {GAIN: "assert"},
        [(BWD, 'v = divisor == 0.f ? nanf("") : v / divisor;', "v = v / divisor;")],
    ),
    Mutant(
        "every split writes one plane", "race", {SPLITS: "error|not finite"},
        [(BWD, "float* plane = p.planes + (split * p.columns + c0) * q.r + r0;", "float* plane = p.planes + c0 * q.r + r0;")],
    ),
)  # fmt: skip
