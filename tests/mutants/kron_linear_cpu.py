"""Errors planted in the CPU kernels of kron_linear."""

from . import Mutant, Rung

CPU = "csrc/cpu/"
ROWS, REDUCE, PRODUCTS = CPU + "kron_linear_rows.h", CPU + "kron_reduce.h", CPU + "kron_products.h"


def native(case):
    return Rung(
        "tests/test_ops.py", f"kron_linear-native-{case}-float32 and test_matches_reference",
        plugins=("tests.mutants.extension_plugin",),
    )  # fmt: skip


EVERYTHING, BARE, SMALL = native("everything"), native("bare"), native("small")
FRESH = Rung(
    "tests/test_cpu_sanitized.py", "kron_linear-everything-float32 and test_usual_target_stays_in_bounds",
    plugins=("tests.mutants.objects_plugin",),
)  # fmt: skip
OUTPUT, GRAD = "output: (l2|max) error", "grad of {}: (l2|max) error"

MUTANTS = (
    Mutant(
        "scaled bias", "scale on the residual", {SMALL: OUTPUT},
        [(ROWS, "p.bias, 0, p.out, 1, w.bias,", "p.bias, 0, p.out, p.scale, w.bias,")],
        fast=True,
    ),
    Mutant(
        "gradient of a without the scale", "missing term", {SMALL: GRAD.format("a")},
        [(ROWS, "row[j] *= static_cast<C>(p.scale);", "row[j] *= 1;")],
        fast=True,
    ),
    Mutant(
        "gradient of a from the first term alone", "one tile of several", {EVERYTHING: GRAD.format("a")},
        [(ROWS, "for (int64_t ik = 0; ik < ranks(p); ++ik) {", "for (int64_t ik = 0; ik < p.q; ++ik) {")],
    ),
    Mutant(
        "gradient of s in the order of t", "stride ignored", {EVERYTHING: GRAD.format("s")},
        [(ROWS, "p.in.width, sums.s, false, scratch)", "p.in.width, sums.s, true, scratch)")],
    ),
    Mutant(
        "one token at the end of a block", "tail skipped", {BARE: "output: (l2|max) error|not finite"},
        [(PRODUCTS, "for (; t < n; ++t) f(RowCount<1>{}, t);", "f(RowCount<1>{}, t);")],
    ),
    Mutant(
        "first segment's sums for all rows", "tail skipped", {native("many-rows"): GRAD.format("s")},
        [(REDUCE, "for (int64_t s = 1; s < last - first; ++s)", "for (int64_t s = 1; s < 2; ++s)")],
    ),
    Mutant(
        "sums begin with what was there", "uninitialised memory", {FRESH: "grad of .*: not finite"},
        [(ROWS, "memset(memory, 0, partial_arena.used());", "")],
    ),
    Mutant(
        "each chunk taken for the next", "mask off by one", {EVERYTHING: OUTPUT},
        [(PRODUCTS, "x.rows[t + i] + c * x.chunk;", "x.rows[t + i] + (c ? c - 1 : 0) * x.chunk;")],
    ),
)
