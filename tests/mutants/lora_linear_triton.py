"""Errors planted in the Triton kernels of lora_linear."""

from . import Mutant, Rung

COMMON, FWD, BWD = "kernels/_common.py", "kernels/lora_linear.py", "kernels/lora_linear_bwd.py"


def interpreted(select, tests="tests/test_ops_numerics.py"):
    return Rung(tests, f"lora_linear-triton-{select}", interpret=True)


ACCURACY = "tests/test_ops.py"
EXACT = interpreted("integers-float32 and test_integers_are_exact")
ROUNDING = interpreted("everything-bfloat16 and test_rounds_where_the_docstring_says")
DORA = interpreted("dora-with-everything-float32 and test_matches_reference", ACCURACY)
DROPPED = interpreted("dropout-with-everything-float32 and test_matches_reference", ACCURACY)
TWO_TILES = interpreted("m32-d64-r16-float32 and test_matches_reference", ACCURACY)
MASK = Rung("tests/test_lora_linear_triton.py", "test_mask_of_every_kernel", interpret=True)
FAR = Rung("tests/test_lora_linear_triton.py", "test_mask_of_any_row_and_column and 2147483584", interpret=True)
GHOST = Rung(
    "tests/test_strict_interpreter.py", "test_offsets_of_the_launches_are_64_bit and lora_linear-large and contiguous",
    interpret=True,
)  # fmt: skip
BANK = interpreted("integers-in-a-bank-float32 and test_integers_are_exact")
SORTED = interpreted("bank-sorted-float32 and test_matches_reference", ACCURACY)
SEQUENCES = interpreted("bank-of-sequences-float32 and test_matches_reference", ACCURACY)
APART = Rung("tests/test_lora_linear.py", "test_an_adapter_reaches_no_row_but_its_own and triton", interpret=True)
OUTSIDE = Rung("tests/test_lora_linear.py", "test_ids_outside_the_bank_give_nan_rows", interpret=True)
GHOST_BANK = Rung(
    "tests/test_strict_interpreter.py", "test_offsets_of_the_launches_are_64_bit and lora_linear-bank-of-many and contiguous",
    interpret=True,
)  # fmt: skip
GRAD = "grad of {}: (l2|max) error"
OUTPUT = "output: ((l2|max) error|not finite)"

MUTANTS = (
    Mutant(
        "mask of the column beside", "mask off by one", {MASK: "assert False"},
        [(COMMON, "tl.join(words & 0xFFFF, words >> 16)", "tl.join(words >> 16, words & 0xFFFF)")],
        fast=True,
    ),
    Mutant(
        "backward with the mask of its tile's first columns", "mask off by one", {MASK: "assert False"},
        [(BWD, "dropout_keeps(rows, tile * BLOCK_D, seed_ptr", "dropout_keeps(rows, 0, seed_ptr")],
    ),
    Mutant(
        "rows of the mask in 32 bits", "32-bit offset", {FAR: "assert \\(False"},
        [(COMMON, "(rows >> 32).to(tl.uint32)[:, None]", "((rows >> 32) * 0).to(tl.uint32)[:, None]")],
    ),
    Mutant(
        "dropout of grad_x without its scale", "missing term", {DROPPED: GRAD.format("x")},
        [(FWD, "acc * kept_scale, 0.0)", "acc, 0.0)")],
    ),
    Mutant(
        "gain on the bias", "scale on the residual", {DORA: "output: (l2|max) error"},
        [
            (FWD, "        acc *= tl.load(gain_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]\n", "        pass\n"),
            (
                FWD,
                "    tl.store(out_ptr + places",
                "    if gain_ptr is not None:\n"
                "        acc *= tl.load(gain_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]\n"
                "    tl.store(out_ptr + places",
            ),
        ],
    ),
    Mutant(
        "diagonal twice in grad_lora_a", "missing term", {EXACT: "integers: lora_a differs"},
        [(
            FWD,
            "self.columns(self.x_rows, self.k, None, t, self.dropout",
            "self.columns(self.x_rows, self.k, None, t if self.diagonal is None else t * self.diagonal, self.dropout",
        )],
        fast=True,
    ),
    Mutant(
        "ranks of lora_b unmasked", "tail of the product unmasked", {EXACT: "BoundsError: load"},
        [(FWD, "(ranks < R)[:, None] & valid[None, :], other=0.0).to(dtype)  #", "valid[None, :], other=0.0).to(dtype)  #")],
    ),
    Mutant(
        "depth of the weight unmasked", "tail of the product unmasked", {EXACT: "BoundsError: load"},
        [(
            FWD,
            "begin * weight_stride_d, mask=deep[:, None] & valid[None, :], other=0.0)",
            "begin * weight_stride_d, mask=valid[None, :], other=0.0)",
        )],
    ),
    Mutant(
        "first row of a tile in 32 bits", "32-bit offset", {GHOST: "overflow"},
        [(FWD, "(group * 8 + place % height).to(tl.int64) * BLOCK_M", "(group * 8 + place % height) * BLOCK_M")],
    ),
    Mutant(
        "u rounded before its scale", "product in 16 bits", {ROUNDING: "rounding model"},
        [(BWD, "return tile * c[None, :]", "return tile.to(tl.bfloat16).to(tl.float32) * c[None, :]")],
    ),
    Mutant(
        "t of every tile in one plane", "race", {TWO_TILES: "RaceError|races with"},
        [(BWD, "(tile * m + rows)[:, None] * R", "(0 * tile * m + rows)[:, None] * R")],
    ),
    Mutant(
        "grad_y without gain in t", "missing term", {DORA: GRAD.format("lora_a")},
        [(FWD, "t = self.ranks(self.grad_rows, self.n, self.gain,", "t = self.ranks(self.grad_rows, self.n, None,")],
    ),
    Mutant(
        "ranks of every adapter in every row", "wrong row of a bank", {BANK: "integers: .* differs", SORTED: OUTPUT},
        [(FWD, "own, c_ptr = inside & (ids == adapter), diagonal_ptr", "own, c_ptr = inside & (ids >= 0), diagonal_ptr")],
        fast=True,
    ),
    Mutant(
        "u of the adapter beside", "wrong row of a bank", {BANK: "integers: .* differs", SORTED: OUTPUT},
        [(FWD, "own = inside[:, None] & (ids[:, None] ==", "own = inside[:, None] & ((ids[:, None] + 1) % g ==")],
    ),
    Mutant(
        "last adapter of a tile left out", "mask off by one", {BANK: "integers: .* differs", SORTED: OUTPUT},
        [(FWD, "tl.max(tl.where(here, ids + 1, 0), 0)", "tl.max(tl.where(here, ids, 0), 0)")],
    ),
    Mutant(
        "first adapter of a tile left out", "mask off by one", {BANK: "integers: .* differs", SORTED: OUTPUT},
        [(FWD, "tl.min(tl.where(here, ids, g), 0)", "(tl.min(tl.where(here, ids, g), 0) + 1)")],
    ),
    Mutant(
        "-1 as the last adapter", "id -1 not honoured", {BANK: "integers: .* differs", APART: "assert|not close"},
        [
            (
                FWD,
                "    here = inside & (ids >= 0) & (ids < g)\n",
                "    ids = tl.where(ids == -1, g - 1, ids)\n    here = inside & (ids >= 0) & (ids < g)\n",
            )
        ],
    ),
    Mutant(
        "adapters up to the largest id", "load out of bounds", {OUTSIDE: "BoundsError: load|overflow"},
        [(FWD, "here = inside & (ids >= 0) & (ids < g)", "here = inside & (ids >= 0)")],
    ),
    Mutant(
        "ids beyond the bank as -1", "NaN swallowed", {OUTSIDE: "assert"},
        [(FWD, "acc = tl.where(((ids >= -1) & (ids < g))[:, None]", "acc = tl.where((ids >= -1)[:, None]")],
    ),
    Mutant(
        "an id for each row of a sequence", "load out of bounds", {SEQUENCES: "BoundsError: load"},
        [(FWD, "tl.load(ids_ptr + rows // rows_per_id, mask", "tl.load(ids_ptr + rows, mask")],
    ),
    Mutant(
        "scale of the first adapter", "wrong row of a bank", {BANK: "integers: y differs", SORTED: OUTPUT},
        [(FWD, "c_ptr = diagonal_ptr + adapter * R", "c_ptr = diagonal_ptr")],
    ),
    Mutant(
        "scale of the first adapter in backward", "wrong row of a bank", {SORTED: GRAD.format("lora_b")},
        [(BWD, "            diagonal_ptr += group * R\n", "            diagonal_ptr += 0\n")],
    ),
    Mutant(
        "adapters multiplied by what is zero", "zero times infinity", {APART: "assert|not close"},
        [(
            FWD,
            "acc = tl.where(own[:, None], tl.dot(low, side, acc, input_precision=PRECISION), acc)",
            "acc = tl.dot(low, side, acc, input_precision=PRECISION)",
        )],
    ),
    Mutant(
        "a plane of the neighbour", "wrong row of a bank", {SORTED: "not finite|" + GRAD.format("lora_a")},
        [(BWD, "first64.to(tl.int32), last64.to(tl.int32)", "first64.to(tl.int32), last64.to(tl.int32) + 1")],
    ),
    Mutant(
        "rows of the neighbour", "mask off by one", {SORTED: "BoundsError|" + GRAD.format("lora_a")},
        [(BWD, "        end = tl.minimum(start + chunk, end)\n", "        end = start + chunk\n")],
    ),
    Mutant(
        "rows as they come for sorted chunks", "wrong row of a bank", {SORTED: GRAD.format("lora_a")},
        [(BWD, "            rows = tl.load(order_ptr + rows, mask=inside, other=0)\n", "            rows += 0\n")],
    ),
    Mutant(
        "gradient of the bias without rows of -1", "missing term", {SEQUENCES: "BoundsError: store"},
        [(FWD, "None, grad_bias, by_adapter=False)", "None, grad_bias)")],
    ),
    Mutant(
        "u of rows without an adapter left unwritten", "uninitialised memory", {OUTSIDE: "assert"},
        [(FWD, "tl.float32), mask=none)", "tl.float32), mask=none & (m < 0))")],
    ),
    Mutant(
        "adapters in 32 bits", "32-bit offset", {GHOST_BANK: "overflow"},
        [(FWD, "adapter = (step // STEPS).to(tl.int64)", "adapter = step // STEPS")],
    ),
)
