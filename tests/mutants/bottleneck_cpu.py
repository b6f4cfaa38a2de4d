"""Errors planted in the CPU kernels of bottleneck."""

from . import Mutant, Rung

CPU = "csrc/cpu/"
GEMM, SIMD, ACTIVATION, PREPARE = CPU + "gemm.h", CPU + "simd.h", CPU + "activation.h", CPU + "bottleneck_prepare.h"
ROWS, REDUCE, CALL = CPU + "bottleneck_rows.h", CPU + "bottleneck_reduce.h", CPU + "bottleneck.cpp"


BUILT, KEPT = ("tests.mutants.extension_plugin",), ("tests.mutants.objects_plugin",)


def native(select, tests="tests/test_ops_numerics.py"):
    return Rung(tests, f"bottleneck-native-{select}", plugins=BUILT)


EXACT = native("integers-float32 and test_integers_are_exact")
BANK = native("integers-in-a-bank-float32 and test_integers_are_exact")
INFINITE = native("everything-float32 and test_nan_and_inf_spread_as_in_pytorch")
ROUNDING = native("everything-bfloat16 and test_rounds_where_the_docstring_says")
ACCURACY = "tests/test_ops.py"
EVERYTHING = native("everything-float32 and test_matches_reference", ACCURACY)
LARGE_MEAN = native("norm-of-large-mean-float32 and test_matches_reference", ACCURACY)
STRIDES = native("everything-float32 and test_any_strides and every-second", ACCURACY)
FROZEN = native("everything-float32 and test_only_what_is_wanted_is_returned", ACCURACY)
THREADS = Rung("tests/test_bottleneck.py", "test_bits_do_not_depend_on_the_number_of_threads", plugins=BUILT)
SANITIZED = "tests/test_cpu_sanitized.py"
ADDRESSES = Rung(
    SANITIZED, "bottleneck-m33-d65-r17-float32 and test_usual_target_stays_in_bounds", plugins=KEPT
)
SCRATCH = Rung(
    SANITIZED, "bottleneck-everything-float32 and test_usual_target_stays_in_bounds", plugins=KEPT
)
FAR = Rung("tests/test_far_rows.py", "test_native", plugins=BUILT)
RACES = Rung(SANITIZED, "bottleneck-r20 and test_has_no_race and not amx", plugins=KEPT)
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
        "a vector past the depth of a panel", "mask off by one", {ADDRESSES: "heap-buffer-overflow"},
        [(GEMM, "for (; i + L <= k1; i += L) {", "for (; i + L <= k1 + 1; i += L) {")],
    ),
    Mutant(
        "rows numbered in 32 bits", "32-bit offset", {FAR: "Segmentation fault"},
        [(
            ROWS,
            "rows.offsets ? rows.offsets[row] : row * rows.ld",
            "rows.offsets ? rows.offsets[row] : static_cast<int>(row) * static_cast<int>(rows.ld)",
        )],
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
        "relu by maximum", "NaN swallowed", {INFINITE: "spreads otherwise"},
        [(ACTIVATION, "value = z < 0 ? V{} : z;", "value = z > 0 ? z : V{};")],
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
        "slope without hidden_skip_weight", "missing term", {EVERYTHING: GRAD.format("x")},
        [(ROWS, "            slope += load<C>(hidden_skip + j);\n", "")],
    ),
    Mutant(
        "every adapter with the first weights", "wrong row of a bank", {BANK: ANY},
        [(PREPARE, "static_cast<const W*>(w.data) + id * w.stride_g + i", "static_cast<const W*>(w.data) + i")],
    ),
    Mutant(
        "no adapter taken for the first", "id -1 not honoured", {BANK: OUTPUT},
        [(CALL, "out.insert(out.end(), repeat, id);", "out.insert(out.end(), repeat, id < 0 ? 0 : id);")],
    ),
    Mutant(
        "grad_x made whenever", "gradient mask ignored", {FROZEN: "assert"},
        [(CALL, "p.wants[i] = output_mask[i];", "p.wants[i] = output_mask[i] || i == 0;")],
    ),
    Mutant(
        "partial sums not cleared", "uninitialised memory", {SCRATCH: ANY},
        [(ROWS, "    clear(p, q);\n    Block<T> b;\n", "    Block<T> b;\n")],
    ),
    Mutant(
        "sums of grad_y in 16 bits", "sum in 16 bits", {ROUNDING: "rounding model"},
        [(
            ROWS,
            "        total[i % 4] += v;\n",
            "        T rounded[lanes<C>];\n        store(rounded, total[i % 4] + v);\n        total[i % 4] = "
            "load<C>(rounded);\n",
        )],
    ),
    Mutant(
        "residual added to a rounded product", "residual added after rounding", {ROUNDING: "rounding model"},
        [(
            ROWS,
            "        if (added) y += load_at<C>(added[i + t], c, count, step);\n",
            "        if (added) {\n          T rounded[L];\n          store(rounded, y);\n          y = "
            "load<C>(rounded) + load_at<C>(added[i + t], c, count, step);\n        }\n",
        )],
    ),
    Mutant(
        "hidden values in 16 bits", "product in 16 bits", {ROUNDING: "rounding model"},
        [(
            ROWS,
            "          if (hidden_skip) a += load<C>(hidden_skip + j) * v;\n          store(z + i + j, a);",
            "          if (hidden_skip) a += load<C>(hidden_skip + j) * v;\n          T rounded[lanes<C>];\n          "
            "store(rounded, a);\n          store(z + i + j, load<C>(rounded));",
        )],
    ),
    Mutant(
        "mean not refined", "cancellation", {LARGE_MEAN: "(l2|max) error"},
        [(
            ROWS,
            "variance = (sum<C>(square) + tail_square) / d - shift * shift;",
            "variance = (sum<C>(square) + tail_square) / d;",
        )],
    ),
    Mutant(
        "each thread reduces every column", "race", {RACES: "data race"},
        [(
            REDUCE,
            "blocks * part / parts,\n                  blocks * (part + 1) / parts);",
            "0 * part / parts,\n                  blocks);",
        )],
    ),
    Mutant(
        "chunks of backward by the number of threads", "order of a sum left to chance", {THREADS: "assert"},
        [(CALL, "  if (!call.p.backward) return call.parts;\n", "  return call.parts;\n")],
    ),
)
