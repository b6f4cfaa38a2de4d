"""Errors planted in the CPU kernels of lora_linear."""

from . import Mutant, Rung
from .extension import target

ROWS, PHILOX = "csrc/cpu/lora_linear_rows.h", "csrc/cpu/philox.h"


def native(case):
    return Rung(
        "tests/test_ops.py", f"lora_linear-native-{case}-float32 and test_matches_reference",
        plugins=("tests.mutants.extension_plugin",),
    )  # fmt: skip


def sanitized(select):
    return Rung("tests/test_cpu_sanitized.py", f"lora_linear-{select}", plugins=("tests.mutants.objects_plugin",))


DROPPED, DORA = native("dropout"), native("dora-with-everything")
ADDRESSES = sanitized("m33-d65-r17-float32 and test_usual_target_stays_in_bounds")
FRESH = sanitized("dora-with-everything-float32 and test_usual_target_stays_in_bounds")
STRIPS = Rung(
    "tests/test_ops_numerics.py", f"lora_linear-native-columns-of-some-rows-float32-{target()} and test_every_instruction_set",
    plugins=("tests.mutants.extension_plugin",),
)  # fmt: skip
OUTPUT, GRAD = "output: (l2|max) error", "grad of {}: (l2|max) error"

MUTANTS = (
    Mutant(
        "dropout of the row below", "mask off by one", {DROPPED: OUTPUT},
        [(ROWS, "dropout_factors(drop, begin + i, c,", "dropout_factors(drop, begin + i + 1, c,")],
        fast=True,
    ),
    Mutant(
        "gradient of lora_b without gain", "missing term", {DORA: GRAD.format("lora_b")},
        [(ROWS, "padded<C>(p.n) + j) * gain : Vec<C>{};", "padded<C>(p.n) + j) : Vec<C>{};")],
        fast=True,
    ),
    Mutant(
        "gradient of x through dropped elements", "missing term", {DROPPED: GRAD.format("x")},
        [(ROWS, "Store<T, C>{out, n, p.dropped ? t.drawn : nullptr, factor_ld}", "Store<T, C>{out, n, nullptr, factor_ld}")],
    ),
    Mutant(
        "gradient of the diagonal without scale", "missing term", {native("diagonal"): GRAD.format("diagonal")},
        [(ROWS, "sum(first.diagonal + j) * static_cast<C>(p.scale);", "sum(first.diagonal + j);")],
    ),
    Mutant(
        "every second word of a counter taken twice", "mask off by one", {DROPPED: OUTPUT},
        [(PHILOX, "| c[2 * w + 1] << 32;", "| c[2 * w] << 32;")],
    ),
    Mutant(
        "whole vectors written at the tail of a row", "store out of bounds",
        {ADDRESSES: "AddressSanitizer: (heap-buffer-overflow|unknown-crash)"},
        [(ROWS, "if (j + NV * L <= columns && !factors) {", "if (!factors) {")],
    ),
    Mutant(
        "sums of a segment begin with what was there", "uninitialised memory", {FRESH: "grad of .*: not finite"},
        [(ROWS, "for (int64_t j = 0; sums && j < padded<C>(p.n); ++j) sums[j] = 0;", "(void)sums;")],
    ),
    Mutant(
        "last columns left out of a projection", "tail skipped", {STRIPS: "(l2|max) error"},
        [(
            ROWS,
            "for (int64_t c = 0; c < inner; c += strip, down += strip_size(p)) {",
            "for (int64_t c = 0; c == 0 || c + strip <= inner; c += strip, down += strip_size(p)) {",
        )],
    ),
)
