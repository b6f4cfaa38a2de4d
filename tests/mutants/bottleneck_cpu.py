"""Errors planted in the CPU kernels of bottleneck."""

from . import Mutant, Rung

CPU = "csrc/cpu/"
GEMM, SIMD, ACTIVATION, PREPARE = CPU + "gemm.h", CPU + "simd.h", CPU + "activation.h", CPU + "bottleneck_prepare.h"
ROWS, ARGUMENTS = CPU + "rows.h", CPU + "arguments.h"


BUILT, KEPT = ("tests.mutants.extension_plugin",), ("tests.mutants.objects_plugin",)


def native(select, tests="tests/test_ops_numerics.py"):
    return Rung(tests, f"bottleneck-native-{select}", plugins=BUILT)


EXACT = native("integers-float32 and test_integers_are_exact")
BANK = native("integers-in-a-bank-float32 and test_integers_are_exact")
ACCURACY = "tests/test_ops.py"
EVERYTHING = native("everything-float32 and test_matches_reference", ACCURACY)
STRIDES = native("everything-float32 and test_any_strides and every-second", ACCURACY)
SANITIZED = "tests/test_cpu_sanitized.py"
ADDRESSES = Rung(
    SANITIZED, "bottleneck-m33-d65-r17-float32 and test_usual_target_stays_in_bounds", plugins=KEPT
)
OUTPUT = "output: (l2|max) error|integers: y differs"
GRAD = "grad of {}: (l2|max) error"
ANY = "(l2|max) error|not finite|integers: .* differs"

MUTANTS = (
    Mutant(
        "whole vectors read at the tail of a weight", "load out of bounds", {ADDRESSES: "heap-buffer-overflow"},
        [(
            GEMM,
            "v[t] = t < count ? load<C>(column + t * b.n_stride + i) : Vec<C>{};",
            "v[t] = load<C>(column + t * b.n_stride + i);",
        )],
    ),
    Mutant(
        "whole vectors written at the tail of a row", "store out of bounds", {ADDRESSES: "heap-buffer-overflow"},
        [(ROWS, "  if (count >= lanes<C>)\n    store(row + j, v);", "  if (count > 0)\n    store(row + j, v);")],
    ),
    Mutant(
        "columns taken as adjacent", "stride ignored", {STRIDES: ANY},
        [(
            ROWS,
            "load_some<C>(row + j * step, least(count, lanes<C>), step)",
            "load_some<C>(row + j, least(count, lanes<C>))",
        )],
    ),
    Mutant(
        "odd rows of a product left out", "tail skipped", {EXACT: ANY},
        [(GEMM, "  if (i < rows) f(RowCount<1>{}, i);\n", "")],
        fast=True,
    ),
    Mutant(
        "last vector of a product left out", "tail skipped", {EXACT: ANY},
        [(GEMM, "  if (rest == 1) f(RowCount<1>{}, j);\n", "")],
        fast=True,
    ),
    Mutant(
        "bias not scaled", "missing term", {EVERYTHING: OUTPUT},
        [(
            PREPARE,
            "for (int64_t i = 0; i < p.d; ++i) a.up_bias[i] *= c.scale[i];",
            "for (int64_t i = 0; i < 0; ++i) a.up_bias[i] *= c.scale[i];",
        )],
    ),
    Mutant(
        "every adapter with the first weights", "wrong row of a bank", {BANK: ANY},
        [(ROWS, "static_cast<const W*>(w.data) + id * w.stride_g + i", "static_cast<const W*>(w.data) + i")],
    ),
    Mutant(
        "no adapter taken for the first", "id -1 not honoured", {BANK: OUTPUT},
        [(ARGUMENTS, "out.insert(out.end(), repeat, id);", "out.insert(out.end(), repeat, id < 0 ? 0 : id);")],
    ),
)
