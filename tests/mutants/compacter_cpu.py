"""Errors planted in the CPU kernels of compacter."""

from . import Mutant, Rung
from .extension import target

CPU = "csrc/cpu/"
ROWS, REDUCE, RUN = CPU + "compacter_rows.h", CPU + "compacter_reduce.h", CPU + "kron_run.h"
MEMORY, PRODUCTS = CPU + "kron_memory.h", CPU + "kron_products.h"


def native(case):
    return Rung(
        "tests/test_ops.py", f"compacter-native-{case}-float32 and test_matches_reference",
        plugins=("tests.mutants.extension_plugin",),
    )  # fmt: skip


def sanitized(select):
    return Rung("tests/test_cpu_sanitized.py", f"compacter-{select}", plugins=("tests.mutants.objects_plugin",))


EVERYTHING, BANK = native("everything"), native("bank-with-everything")
ADDRESSES = sanitized("m33-d65-r17-float32 and test_usual_target_stays_in_bounds")
RACES = sanitized(f"{target()}-float32 and test_has_no_race")
OUTSIDE = "AddressSanitizer: (heap-buffer-overflow|unknown-crash)"
OUTPUT, GRAD = "output: (l2|max) error", "grad of {}: (l2|max) error"

MUTANTS = (
    Mutant(
        "no down bias", "missing term", {EVERYTHING: OUTPUT},
        [(ROWS, "s.z, block_rows, w.down_bias, s.hidden,", "s.z, block_rows, nullptr, s.hidden,")],
        fast=True,
    ),
    Mutant(
        "gradient of x without the residual's", "missing term", {native("many-rows"): GRAD.format("x")},
        [(ROWS, "w.s, p.add_x, sums.s, sums.t,", "w.s, false, sums.s, sums.t,")],
        fast=True,
    ),
    Mutant(
        "gradient of x without the residual's where ranks take more than one tile", "missing term",
        {native("n5-rank-7"): GRAD.format("x")},
        [(ROWS, "nullptr, p.add_x ? &grad_y : nullptr, grad);", "nullptr, nullptr, grad);")],
    ),
    Mutant(
        "an up bias that isn't scaled", "missing term", {EVERYTHING: OUTPUT},
        [(ROWS, "p.up_bias, adapter, shape(p), scale(p), w.up_bias,", "p.up_bias, adapter, shape(p), C(1), w.up_bias,")],
    ),
    Mutant(
        "gradient of the scale without the bias's share", "missing term", {EVERYTHING: GRAD.format("scale")},
        [(REDUCE, "grad_of_scale += sum<C>(total);", "")],
    ),
    Mutant(
        "down bias of the first adapter for all", "wrong row of a bank", {BANK: OUTPUT},
        [(ROWS, "p.down_bias, adapter, {1, p.r}", "p.down_bias, 0, {1, p.r}")],
    ),
    Mutant(
        "rows without an adapter adapted", "id -1 not honoured", {BANK: OUTPUT},
        [(
            ROWS,
            "const bool adapts = segment.adapter >= 0;\n    if (adapts) read_weights(p, segment, w);\n"
            "    const Rows out{p.y,",
            "const bool adapts = true;\n    Segment other = segment;\n    if (other.adapter < 0) other.adapter = 0;\n"
            "    read_weights(p, other, w);\n"
            "    const Rows out{p.y,",
        )],
    ),
    Mutant(
        "tokens past the last in a sum", "mask off by one", {native("small"): "grad of .*: (l2|max) error|not finite"},
        [(
            ROWS,
            "product<false, true, C>(middle(p), n, ld, s.z,",
            "product<false, true, C>(middle(p), block_rows, ld, s.z,",
        )],
    ),
    Mutant(
        "whole vectors read at the tail of a chunk", "load out of bounds", {ADDRESSES: OUTSIDE},
        [(
            MEMORY,
            "store(out + j, load_at<C>(chunk, j, s.width - j, rows.step));",
            "store(out + j, load_at<C>(chunk, j, lanes<C>, rows.step));",
        )],
    ),
    Mutant(
        "whole vectors written at the tail of a chunk", "store out of bounds", {ADDRESSES: OUTSIDE},
        [(MEMORY, "store_at<C>(chunk, j, s.width - j, load<C>(from + j));", "store(chunk + j, load<C>(from + j));")],
    ),
    Mutant(
        "of a long sum the last block alone", "one tile of several", {native("wide"): OUTPUT},
        [(PRODUCTS, "acc[t][v], ACCUMULATE || k0);", "acc[t][v], ACCUMULATE);")],
    ),
    Mutant(
        "one thread's memory for all", "race", {RACES: "ThreadSanitizer: data race"},
        [(RUN, "k.forward(p, memory.data() + part * thread, s);", "k.forward(p, memory.data(), s);")],
    ),
)
