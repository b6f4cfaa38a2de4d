"""Errors planted in the CPU kernels of bottleneck."""

from . import Mutant, Rung
from .extension import target

CPU = "csrc/cpu/"
GEMM, SIMD, ACTIVATION, PREPARE = CPU + "gemm.h", CPU + "simd.h", CPU + "activation.h", CPU + "bottleneck_prepare.h"
ROWS, ARGUMENTS, CALL = CPU + "rows.h", CPU + "arguments.h", CPU + "bottleneck.cpp"
BY_ROWS, BY_COLUMNS, REDUCE = CPU + "bottleneck_rows.h", CPU + "bottleneck_columns.h", CPU + "bottleneck_reduce.h"
BUILT, KEPT = ("tests.mutants.extension_plugin",), ("tests.mutants.objects_plugin",)


def native(select, tests="tests/test_ops_numerics.py"):
    return Rung(tests, f"bottleneck-native-{select}", plugins=BUILT)


EXACT = native("integers-float32 and test_integers_are_exact")
BANK = native("integers-in-a-bank-float32 and test_integers_are_exact")
EXACT_BFLOAT16 = native("integers-bfloat16 and test_integers_are_exact")
INFINITE = native("m33-d65-r17-float32 and test_nan_and_inf_spread_as_in_pytorch")
ROUNDING = native("everything-bfloat16 and test_rounds_where_the_docstring_says")
LEFT_ALONE = native("m33-d65-r17-float32 and test_inputs_are_left_alone")
ALONE = native("m33-d65-r17-float32 and test_a_row_alone_has_the_bits")
MANY_ROWS = native(f"columns-of-some-rows-float32-{target()} and test_every_instruction_set")
ACCURACY = "tests/test_ops.py"
EVERYTHING = native("everything-float32 and test_matches_reference", ACCURACY)
LARGE_MEAN = native("norm-of-large-mean-float32 and test_matches_reference", ACCURACY)
FROZEN = native("everything-float32 and test_only_what_is_wanted_is_returned", ACCURACY)
THREADS = Rung("tests/test_bottleneck.py", "test_bits_do_not_depend_on_the_number_of_threads", plugins=BUILT)
FAR = Rung("tests/test_far_rows.py", "test_native and bottleneck", plugins=BUILT)
STRIDES = native("everything-float32 and test_any_strides and every-second", ACCURACY)
SANITIZED = "tests/test_cpu_sanitized.py"
ADDRESSES = Rung(
    SANITIZED, "bottleneck-m33-d65-r17-float32 and test_usual_target_stays_in_bounds", plugins=KEPT
)
DEPTH = Rung(SANITIZED, f"bottleneck-m31-d63-r15-{target()}-float32 and test_stays_in_bounds", plugins=KEPT)
SCRATCH = Rung(SANITIZED, "bottleneck-everything-float32 and test_usual_target_stays_in_bounds", plugins=KEPT)
RACES = Rung(SANITIZED, f"bottleneck-{target()}-float32 and test_has_no_race", plugins=KEPT)
OUTPUT = "output: (l2|max) error|integers: y differs"
GRAD = "grad of {}: (l2|max) error"
ANY = "(l2|max) error|not finite|integers: .* differs"

MUTANTS = (
    Mutant(
        "whole vectors read at the tail of a weight", "load out of bounds", {ADDRESSES: "heap-buffer-overflow"},
        [(
            GEMM,
            "v[t] = t >= count ? Vec<C>{} : end - from >= L ? load<C>(from) : load_some<C>(from, end - from);",
            "v[t] = load<C>(from);",
        )],
    ),
    Mutant(
        "whole vectors written at the tail of a row", "store out of bounds", {ADDRESSES: "heap-buffer-overflow"},
        [(ROWS, "  if (count >= lanes<C>)\n    store(row + j, v);", "  if (count > 0)\n    store(row + j, v);")],
    ),
    Mutant(
        "a vector past the depth of a weight", "mask off by one",
        {DEPTH: "AddressSanitizer: (heap-buffer-overflow|unknown-crash)"},
        [(GEMM, "b.data + (b.n - 1) * b.n_stride + b.k;", "b.data + (b.n - 1) * b.n_stride + b.k + 1;")],
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
        "last rows left out of tall calls", "one tile of several", {MANY_ROWS: ANY},
        [(BY_COLUMNS, "int64_t blocks = ceil_div(p.m, row_block), begin", "int64_t blocks = p.m / row_block, begin")],
    ),
    Mutant(
        "relu by maximum", "NaN swallowed", {INFINITE: "spreads otherwise"},
        [(ACTIVATION, "value = z < 0 ? V{} : z;", "value = z > 0 ? z : V{};")],
    ),
    Mutant(
        "infinite gradient times a slope of 0", "zero times infinity", {INFINITE: "spreads otherwise"},
        [(BY_ROWS, "decltype(code)::value == relu ? (z <= 0 ? Vec<C>{} : grad_a) : grad_a * slope", "grad_a * slope")],
    ),
    Mutant(
        "residual times scale", "scale on the residual", {EXACT: OUTPUT},
        [
            (
                BY_ROWS,
                "if (added) y += load<C>(added[i + t] + j + v * L);",
                "if (added) y += static_cast<C>(p.scale_value) * load<C>(added[i + t] + j + v * L);",
            ),
            (
                BY_ROWS,
                "if (added) y += load_at<C>(added[i + t], c, count, step);",
                "if (added) y += static_cast<C>(p.scale_value) * load_at<C>(added[i + t], c, count, step);",
            ),
        ],
    ),
    Mutant(
        "bias behind the activation", "bias after the activation", {EVERYTHING: OUTPUT},
        [(
            BY_ROWS,
            "a.down, a.down_bias, s.z);\n      activate(p, b.n * ldz, s.z, c.hidden_skip);\n",
            "a.down, static_cast<const C*>(nullptr), s.z);\n      activate(p, b.n * ldz, s.z, c.hidden_skip);\n      "
            "for (int64_t i = 0; i < b.n * ldz; ++i) s.z[i] += a.down_bias[i % ldz];\n",
        )],
    ),
    Mutant(
        "slope without hidden_skip_weight", "missing term", {EXACT: "integers: x differs"},
        [(BY_ROWS, "        if (hidden_skip) grad_z += grad_a * load<C>(hidden_skip + j);\n", "")],
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
    Mutant(
        "grad_x made whenever", "gradient mask ignored", {FROZEN: "assert"},
        [(CALL, "p.wants[i] = output_mask[i];", "p.wants[i] = output_mask[i] || i == 0;")],
    ),
    Mutant(
        "sums of a segment not cleared", "uninitialised memory", {SCRATCH: ANY},
        [(BY_ROWS, "    clear(p, q);\n    Block<T> b;\n", "    Block<T> b;\n")],
    ),
    Mutant(
        "y written over x", "input overwritten", {LEFT_ALONE: "x was written to"},
        [(CALL, "Tensor y = empty(x.sizes(), x);", "Tensor y = x;")],
    ),
    Mutant(
        "sums of grad_y in 16 bits", "sum in 16 bits", {EXACT_BFLOAT16: "integers: up_bias differs"},
        [(
            BY_ROWS,
            "        total[i % 4] += v;\n",
            "        T rounded[lanes<C>];\n        store(rounded, total[i % 4] + v);\n        total[i % 4] = "
            "load<C>(rounded);\n",
        )],
    ),
    Mutant(
        "hidden values in 16 bits", "product in 16 bits", {ROUNDING: "rounding model"},
        [(
            BY_ROWS,
            "* v;\n        store(z + i + j, a);",
            "* v;\n        if constexpr (sizeof(C) == 4) {\n          BFloat16 rounded[lanes<C>];\n          "
            "store(rounded, a);\n          a = load<C>(rounded);\n        }\n        store(z + i + j, a);",
        )],
    ),
    Mutant(
        "residual added to a rounded product", "residual added after rounding", {ROUNDING: "rounding model"},
        [(
            BY_ROWS,
            "        if (added) y += load_at<C>(added[i + t], c, count, step);\n",
            "        if (added) {\n          T rounded[lanes<C>];\n          store(rounded, y);\n          y = "
            "load<C>(rounded) + load_at<C>(added[i + t], c, count, step);\n        }\n",
        )],
    ),
    Mutant(
        "operands of float32 products in 11 bits", "tf32 product", {EXACT: OUTPUT},
        [(
            GEMM,
            "const C s = TRANSPOSED ? a[i] : a[i * a_stride];",
            "const C s = static_cast<C>(static_cast<_Float16>(TRANSPOSED ? a[i] : a[i * a_stride]));",
        )],
    ),
    Mutant(
        "variance as a difference of squares", "cancellation", {LARGE_MEAN: "(l2|max) error"},
        [(ROWS, "    const C mean = sum<C>(total) / d;\n", "    const C mean = 0 * sum<C>(total);\n")],
    ),
    Mutant(
        "each thread reduces every column", "race", {RACES: "data race"},
        [
            (REDUCE, "end = least(p.d, blocks * (part + 1) / parts * lanes<C>);", "end = least(p.d, blocks * lanes<C>);"),
            (REDUCE, "for (int64_t c = blocks * part / parts * lanes<C>; c < end;", "for (int64_t c = 0 * part; c < end;"),
        ],
    ),
    Mutant(
        "chunks of backward by the number of threads", "order of a sum left to chance", {THREADS: "threads: .* differs"},
        [(CALL, "  if (!call.p.backward) return call.parts;\n", "  return call.parts;\n")],
    ),
    Mutant(
        "one row by another way", "row depends on its neighbours", {ALONE: "alone has other bits"},
        [(CALL, "(small ? 48 : 128)) return true;\n", "(small ? 48 : 128)) return p.m > 1;\n")],
    ),
)
