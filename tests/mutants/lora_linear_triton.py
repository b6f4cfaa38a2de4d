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
GRAD = "grad of {}: (l2|max) error"

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
                "    tl.store(out_ptr + rows[:, None] * n",
                "    if gain_ptr is not None:\n"
                "        acc *= tl.load(gain_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]\n"
                "    tl.store(out_ptr + rows[:, None] * n",
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
        [(FWD, "(ranks < R)[:, None] & valid[None, :], other=0.0).to(dtype)", "valid[None, :], other=0.0).to(dtype)")],
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
)
