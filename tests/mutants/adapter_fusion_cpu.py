"""Errors planted in the CPU kernels of adapter_fusion."""

from . import Mutant, Rung
from .extension import target

CALL, ROWS = "csrc/cpu/adapter_fusion.cpp", "csrc/cpu/adapter_fusion_rows.h"


def native(case, test="test_ops.py", select="test_matches_reference"):
    return Rung(
        f"tests/{test}", f"adapter_fusion-native-{case} and {select}", plugins=("tests.mutants.extension_plugin",)
    )  # fmt: skip


def alone(select):
    return Rung("tests/test_adapter_fusion.py", select, plugins=("tests.mutants.extension_plugin",))


def sanitized(select):
    return Rung("tests/test_cpu_sanitized.py", f"adapter_fusion-{select}", plugins=("tests.mutants.objects_plugin",))


SMALL, SHARED = native("small-float32"), native("two-float32")
SLICED = native("m33-d65-r17-float32-sliced", select="test_any_strides")
SPREADS = native("everything-float32", "test_ops_numerics.py", "nan_and_inf_spread")
ADDRESSES = sanitized("m33-d65-r17-float32 and test_usual_target_stays_in_bounds")
RACES = sanitized(f"{target()}-float32 and test_has_no_race")
STEEP, ORDER = alone("rows_that_one_adapter_wins and native"), alone("test_bits_of_long_sums")
OUTSIDE = "AddressSanitizer: (heap-buffer-overflow|unknown-crash)"
OUTPUT, GRAD = "output: (l2|max) error", "grad of {}: (l2|max) error"

MUTANTS = (
    Mutant(
        "scores without the scale", "missing term", {SMALL: OUTPUT},
        [(ROWS, "const Vec<C> score = scale * load<C>(scores + i);", "const Vec<C> score = load<C>(scores + i);")],
        fast=True,
    ),
    Mutant(
        "keys that are values too without the gradient of values", "missing term", {SHARED: GRAD.format("keys")},
        [(ROWS, "value += b[i] * load_at<C>(y + j, v, columns - v, 1);", "value += 0 * b[i];")],
        fast=True,
    ),
    Mutant(
        "gradients of weights as those of scores", "missing term", {SMALL: GRAD.format("query")},
        [(ROWS, "      softmax_gradient(p.g, s.weights, s.scores);\n", "")],
    ),
    Mutant(
        "a mean that isn't refined", "cancellation", {STEEP: GRAD.format("query")},
        [(ROWS, "for (int time = 0; time < 2; ++time) {", "for (int time = 0; time < 1; ++time) {")],
    ),
    Mutant(
        "the weights of a NaN are zero", "NaN swallowed", {SPREADS: "spreads otherwise"},
        [(ROWS, "weight < smallest ? Vec<C>{} : weight", "weight >= smallest ? weight : Vec<C>{}")],
    ),
    Mutant(
        "a sum without the adapters behind the last group", "tail skipped", {SMALL: OUTPUT},
        [(ROWS, "if (i < p.g) add(i, p.g - i);", "")],
    ),
    Mutant(
        "every row with the weights of a block's first", "row depends on its neighbours", {native("many-rows-float32"): OUTPUT},
        [(ROWS, "weights[i] = s.scores[i * L + r];", "weights[i] = s.scores[i * L];")],
    ),
    Mutant(
        "adapters one behind the other", "stride ignored", {SLICED: OUTPUT},
        [(ROWS, "first + i * stack.stride;", "first + i * p.m * p.d;")],
    ),
    Mutant(
        "whole vectors read at the end of a row", "load out of bounds", {ADDRESSES: OUTSIDE},
        [(ROWS, "const Vec<C> x = load_at<C>(row + j, v, columns - v, 1);", "const Vec<C> x = load<C>(row + j + v);")],
    ),
    Mutant(
        "whole vectors written at the end of a row", "store out of bounds", {ADDRESSES: OUTSIDE},
        [(ROWS, "store_at<C>(out + j, v, columns - v, value);", "store(out + j + v, value);")],
    ),
    Mutant(
        "one thread's memory for all", "race", {RACES: "ThreadSanitizer: data race"},
        [(CALL, "f(memory.data() + thread * thread_bytes, part,", "f(memory.data(), part,")],
    ),
    Mutant(
        "a sum for each thread", "order of a sum left to chance", {ORDER: "threads: scale differs"},
        [(CALL, "const int64_t parts = std::min(p.m, most_parts);",
          "const int64_t parts = std::min<int64_t>(p.m, torch::stable::get_num_threads());")],
    ),
)  # fmt: skip
