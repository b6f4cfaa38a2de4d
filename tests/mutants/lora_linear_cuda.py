"""Errors planted in the CUDA kernels of lora_linear."""

from . import Mutant, Rung
from .bottleneck_cuda import KEPT, ONLY_BFLOAT16, ONLY_FLOAT32

HEADERS = "csrc/cuda/"
DROPOUT, FWD, BWD = HEADERS + "dropout.cuh", HEADERS + "lora_linear.cuh", HEADERS + "lora_linear_gradients.cuh"
PLAN, SIDE, BANK = HEADERS + "lora_linear_plan.cuh", HEADERS + "lora_linear_bank.cuh", HEADERS + "bank.cuh"


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
SMALL = Rung("tests/test_cuda_lora_linear.py", "test_small_magnitudes", plugins=KEPT, edits=ONLY_BFLOAT16)
CHUNKS = Rung("tests/test_cuda_lora_linear.py", "test_depth_of_several_chunks and bfloat16", plugins=KEPT, edits=ONLY_BFLOAT16)
BANKED = emulated("bank-with-everything-bfloat16 and test_matches_reference")
SORTED = emulated("bank-sorted-bfloat16 and test_matches_reference")
PADDED = emulated("bank-of-ranks-bfloat16 and test_matches_reference")
RACES = emulated("bank-with-everything-bfloat16-thread and test_sanitizer_reports_nothing")
OUTSIDE = Rung("tests/test_cuda_lora_linear.py", "test_id_outside_the_bank", plugins=KEPT, edits=ONLY_BFLOAT16)
BITS = Rung("tests/test_cuda_lora_linear.py", "test_row_of_a_bank and float32 and many", plugins=KEPT, edits=ONLY_FLOAT32)
ERROR = "grad of {}: (l2|max) error"
OUTPUT = "output: (l2|max) error|not finite"

MUTANTS = (
    Mutant(
        "mask of the neighbouring columns", "mask off by one", {DROPPED: ERROR.format("x")},
        [(DROPOUT, "column0 / 8 + j + own);", "column0 / 8 + j + 1 + own);")],
        fast=True,
    ),
    Mutant(
        "adapter left out where the depth ends with it", "missing term", {PLAIN: "output: (l2|max) error"},
        [(SIDE, "slot[i] + bank.width > from)", "slot[i] + bank.width >= from + kRankStep)")],
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
        "rows begin in 32 bits", "32-bit offset", {FAR: "(l2|max) error|not finite|Segmentation fault"},
        [(SIDE, "offset[i] = valid ? rows.offset(number) : -1;",
          "offset[i] = valid ? static_cast<int>(rows.offset(number)) : -1;")],
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
        "gradient of gain from what it has multiplied", "missing term", {SMALL: ERROR.format("magnitude")},
        [(FWD, "static_cast<T*>(p.z) + place, v[0], v[1],", "static_cast<T*>(p.z) + place, first, second,")],
    ),
    Mutant(
        "every split writes one plane", "race", {SPLITS: "error|not finite"},
        [(BWD, "p.planes + ((split * q.groups.g + adapter) * p.columns", "p.planes + (int64_t{adapter} * p.columns")],
    ),
    Mutant(
        "ranks of every adapter", "wrong row of a bank", {BANKED: OUTPUT},
        [(FWD, "const int rank = r0 + column - table.slot[i];", "const int rank = (r0 + column) % bank.width;")],
    ),
    Mutant(
        "diagonal of the first adapter", "wrong row of a bank", {BANKED: OUTPUT},
        [(FWD, "p.diagonal.at<T>(adapter, j)", "p.diagonal.at<T>(j)")],
    ),
    Mutant(
        "sorted rows stored where they stand", "wrong row of a bank", {SORTED: OUTPUT},
        [(FWD, "place = table.row[at] * p.n", "place = (row0 + at) * p.n")],
    ),
    Mutant(
        "a row of the next adapter added", "wrong row of a bank", {BANKED: ERROR.format("lora_a")},
        [(BWD, "split_rows(q.groups, adapter, split, p.splits, Outer<T>::kDepth)",
          "split_span(q.groups.first(adapter), q.groups.first(adapter + 1) + 1, split, p.splits, Outer<T>::kDepth)")],
    ),
    Mutant(
        "no adapter taken for the first", "id -1 not honoured", {BANKED: OUTPUT},
        [(BANK, "return id == -1 ? g : id >= 0", "return id == -1 ? 0 : id >= 0")],
    ),
    Mutant(
        "an id behind the last adapter", "load out of bounds", {OUTSIDE: "assert"},
        [(BANK, "id >= 0 && id < g ? static_cast<int>(id)", "id >= 0 && id <= g ? static_cast<int>(id)")],
    ),
    Mutant(
        "every other step of ranks", "tail skipped", {BANKED: OUTPUT},
        [
            (FWD, "table.next(bank, rank + kRankStep)) steps_r++", "table.next(bank, rank + 2 * kRankStep)) steps_r++"),
            (FWD, "next_r = table.next(bank, r0 + kRankStep);", "next_r = table.next(bank, r0 + 2 * kRankStep);"),
        ],
    ),
    Mutant(
        "steps that begin with an adapter", "row depends on its neighbours", {BITS: "assert"},
        [(SIDE, "return found / kRankStep * kRankStep;", "return found;")],
    ),
    Mutant(
        "ranks that fill up an adapter", "tail of the product unmasked", {PADDED: OUTPUT},
        [(SIDE, "adapter < groups.g ? r - j : 0", "adapter < groups.g ? width - j : 0")],
    ),
    Mutant(
        "planes of rows that no block has", "uninitialised memory", {OUTSIDE: "assert"},
        [(FWD, "has_one && i < p.count", "i < p.count")],
    ),
    Mutant(
        "mask of the place among the sorted rows", "mask off by one", {SORTED: ERROR.format("lora_a")},
        [(BWD, "begin + i < span.end ? q.groups.row(begin + i) : 0", "begin + i < span.end ? begin + i : 0")],
    ),
    Mutant(
        "tiles of a sorted bank not launched", "grid too small", {SORTED: OUTPUT},
        [(PLAN, "(sorted ? bank.groups.g + 2 : 0)", "0")],
    ),
    Mutant(
        "no barrier behind the table of rows", "missing barrier", {RACES: "data race"},
        [(SIDE, ": -bank.width;\n    }\n    __syncthreads();\n", ": -bank.width;\n    }\n")],
    ),
)  # fmt: skip
