"""Errors planted in the CPU kernels of lora_linear."""

from . import Mutant, Rung
from .extension import target

PHILOX, CALL = "csrc/cpu/philox.h", "csrc/cpu/lora_linear.cpp"
ROWS, COLUMNS = "csrc/cpu/lora_linear_rows.h", "csrc/cpu/lora_linear_columns.h"
NORMS, PRODUCT = "csrc/cpu/lora_linear_norms.h", "csrc/cpu/lora_linear_product.h"


def native(case):
    return Rung(
        "tests/test_ops.py", f"lora_linear-native-{case}-float32 and test_matches_reference",
        plugins=("tests.mutants.extension_plugin",),
    )  # fmt: skip


def sanitized(select):
    return Rung("tests/test_cpu_sanitized.py", f"lora_linear-{select}", plugins=("tests.mutants.objects_plugin",))


def own_product(case):
    selected = f"lora_linear-{case}-avx512-float32 and test_stays_in_bounds"
    return Rung("tests/test_cpu_sanitized.py", selected, plugins=("tests.mutants.objects_plugin",), target="avx512")


DROPPED, DORA, BANK = native("dropout"), native("dora-with-everything"), native("bank-with-everything")
ADDRESSES = sanitized("m33-d65-r17-float32 and test_usual_target_stays_in_bounds")
FRESH = sanitized("dora-with-everything-float32 and test_usual_target_stays_in_bounds")
STRIPS = Rung(
    "tests/test_ops_numerics.py", f"lora_linear-native-strips-float32-{target()} and test_every_instruction_set",
    plugins=("tests.mutants.extension_plugin",),
)  # fmt: skip
OUTPUT, GRAD = "output: (l2|max) error", "grad of {}: (l2|max) error"
OUTSIDE = "AddressSanitizer: (heap-buffer-overflow|unknown-crash)"

MUTANTS = (
    Mutant(
        "dropout of the row below", "mask off by one", {DROPPED: OUTPUT},
        [(ROWS, "p.order[position] : position, c, n, factors);", "p.order[position] : position + 1, c, n, factors);")],
        fast=True,
    ),
    Mutant(
        "gradient of lora_b without gain", "missing term", {DORA: GRAD.format("lora_b")},
        [(COLUMNS, "v[k] * (gain ? factor * t.gain[j + k] : factor)", "v[k] * factor")],
        fast=True,
    ),
    Mutant(
        "gradient of x through dropped elements", "missing term", {DROPPED: GRAD.format("x")},
        [(COLUMNS, "Store<T, C>{out, n, p.dropped ? t.drawn : nullptr,", "Store<T, C>{out, n, nullptr,")],
    ),
    Mutant(
        "norms without the update in the last columns", "missing term", {DORA: OUTPUT},
        [(NORMS, "tile[(c - j) / lanes<C>] + load_at", "load_at")],
    ),
    Mutant(
        "gradient of the diagonal without scale", "missing term", {native("diagonal"): GRAD.format("diagonal")},
        [(COLUMNS, "total * static_cast<C>(p.scale), count);", "total, count);")],
    ),
    Mutant(
        "every second word of a counter taken twice", "mask off by one", {DROPPED: OUTPUT},
        [(PHILOX, "| c[2 * w + 1] << 32;", "| c[2 * w] << 32;")],
    ),
    Mutant(
        "whole vectors written at the tail of a row", "store out of bounds",
        {ADDRESSES: OUTSIDE},
        [(ROWS, "if (j + NV * L <= columns && !factors) {", "if (!factors) {")],
    ),
    Mutant(
        "sums of a strip begin with what was there", "uninitialised memory", {FRESH: "grad of .*: not finite"},
        [(COLUMNS, "memset(sums, 0, 2 * high_columns * sizeof(C));", "")],
    ),
    Mutant(
        "last columns left out of a projection", "tail skipped", {STRIPS: "(l2|max) error"},
        [(
            ROWS,
            "for (int64_t c = 0; c == 0 || c < inner; c += wide_columns) {",
            "for (int64_t c = 0; c == 0 || c + wide_columns <= inner; c += wide_columns) {",
        )],
    ),
    Mutant(
        "one strip packed for all rows", "one tile of several", {STRIPS: "(l2|max) error"},
        [(ROWS, "const bool once = s.end - s.begin <= high_rows;", "const bool once = true;")],
    ),
    Mutant(
        "output of a bank's rows in the order of their adapters", "wrong row of a bank", {BANK: OUTPUT},
        [(COLUMNS, "(p.order ? p.order[first + i] : first + i) * p.n + begin;", "(first + i) * p.n + begin;")],
        fast=True,
    ),
    Mutant(
        "scale of the first adapter for all", "wrong row of a bank", {native("bank-of-ranks"): OUTPUT},
        [(ROWS, "parameter_at(p.diagonal, adapter, j,", "parameter_at(p.diagonal, 0, j,")],
    ),
    Mutant(
        "a gradient of x where there is no adapter", "id -1 not honoured",
        {sanitized("bank-with-everything-float32 and test_usual_target_stays_in_bounds"): OUTSIDE},
        [(
            COLUMNS,
            "const int64_t r = s.adapter < 0 ? 0 : p.r;\n      if (r) Base::read_factor",
            "const int64_t r = p.r;\n      if (s.adapter >= 0) Base::read_factor",
        )],
    ),
    Mutant(
        "own product: without the branch in its sums", "missing term", {own_product("m33-d65-r17"): OUTPUT},
        [(PRODUCT, "finish{ends ? r : 0,", "finish{0,")],
    ),
    Mutant(
        "own product: a bias where the branch has left one", "missing term", {own_product("bank-with-everything"): OUTPUT},
        [(PRODUCT, "p.bias.data && (gained || p.joined);", "p.bias.data;")],
    ),
    Mutant(
        "gradients of an adapter without rows left as they were", "uninitialised memory",
        {native("bank-with-everything"): "grad of lora_.: not finite"},
        [(CALL, "if (p.wants[i] && (reader.bank || p.m == 0))", "if (p.wants[i] && p.m == 0)")],
    ),
)
