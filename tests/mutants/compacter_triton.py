"""Errors planted in the Triton kernels of compacter, and in what they share with kron_linear."""

from . import Mutant, Rung

SHARED, FWD, BWD = "kernels/_kron.py", "kernels/compacter.py", "kernels/compacter_bwd.py"


def interpreted(select, tests="tests/test_ops_numerics.py"):
    return Rung(tests, f"compacter-triton-{select}", interpret=True)


EXACT = interpreted("integers-float32 and test_integers_are_exact")
BANK = interpreted("integers-in-a-bank-float32 and test_integers_are_exact")
ROUNDING = interpreted("everything-bfloat16 and test_rounds_where_the_docstring_says")
EVERYTHING = interpreted("everything-float32 and test_matches_reference", "tests/test_ops.py")
GHOST = Rung(
    "tests/test_strict_interpreter.py", "test_offsets_of_the_launches_are_64_bit and compacter-large and contiguous",
    interpret=True,
)  # fmt: skip

MUTANTS = (
    Mutant(
        "columns of the factors unmasked", "tail of the product unmasked", {EXACT: "BoundsError: load"},
        [(SHARED, "mask=valid[:, None] & present[None, :], other", "mask=valid[:, None], other")],
        fast=True,
    ),
    Mutant(
        "scale on the residual", "scale on the residual", {EXACT: "integers: y differs"},
        [(FWD, "                y = x.to(tl.float32) + y\n", "                y = x.to(tl.float32) * scale + y\n")],
        fast=True,
    ),
    Mutant(
        "down_bias behind the activation", "bias after the activation", {EXACT: "integers: y differs"},
        [(
            BWD,
            "        v += rank_vector(bias_ptr, limit, BLOCK_R)\n    value, slope = activation(v, ACTIVATION)\n",
            "        value, slope = activation(v, ACTIVATION)\n        value += rank_vector(bias_ptr, limit, BLOCK_R)\n",
        )],
    ),
    Mutant(
        "up_t of the first adapter", "wrong row of a bank", {BANK: "integers: y differs"},
        [(FWD, "        up_t_ptr += group * N * Q * chunk\n", "        up_t_ptr += 0\n")],
        fast=True,
    ),
    Mutant(
        "folded weights transposed for the wrong side", "stride ignored", {EXACT: "integers: y differs"},
        [(BWD, "stride_inner: tl.constexpr = N if UP else 1", "stride_inner: tl.constexpr = 1")],
    ),
    Mutant(
        "gradients of up_a and up_s without the scale", "missing term", {EXACT: "integers: up_[as] differs"},
        [(FWD, 'self.of_folded("grad_up", "hidden", scale,', 'self.of_folded("grad_up", "hidden", (None, 1.0),')],
    ),
    Mutant(
        "grad_scale without the bias", "missing term", {EVERYTHING: "grad of scale: (l2|max) error"},
        [(SHARED, "                grad_scale += sums * bias\n", "                grad_scale += 0 * bias\n")],
    ),
    Mutant(
        "hidden layer rounded", "product in 16 bits", {ROUNDING: "rounding model"},
        [(BWD, "    return v, value, slope", "    return v, value.to(tl.bfloat16).to(tl.float32), slope")],
    ),
    Mutant(
        "ranks of every chunk in one place", "race", {EXACT: "integers: .* differs|not finite"},
        [(BWD, "tl.store(grad_z_ptr + work_k + part * (N * Q)", "tl.store(grad_z_ptr + work_k + 0 * part")],
    ),
    Mutant(
        "planes of every chunk of rows in one place", "race", {EXACT: "RaceError|races with"},
        [(SHARED, "columns = index * parts * width + cols", "columns = 0 * index + cols")],
    ),
    Mutant(
        "first row of a tile in 32 bits", "32-bit offset", {GHOST: "overflow"},
        [(SHARED, "    index = tl.program_id(0).to(tl.int64)\n", "    index = tl.program_id(0)\n")],
    ),
)
