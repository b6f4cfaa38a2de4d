"""Errors planted in the Triton kernels of kron_linear, and in what they share with compacter."""

from . import Mutant, Rung

SHARED, KERNELS = "kernels/_kron.py", "kernels/kron_linear.py"


def interpreted(select, tests="tests/test_ops_numerics.py"):
    return Rung(tests, f"kron_linear-triton-{select}", interpret=True)


EXACT = interpreted("integers-float32 and test_integers_are_exact")
ROUNDING = interpreted("everything-bfloat16 and test_rounds_where_the_docstring_says")
EVERYTHING = interpreted("everything-float32 and test_matches_reference", "tests/test_ops.py")
LARGE_A = interpreted("large-a-float32 and test_matches_reference", "tests/test_ops.py")
GHOST = Rung(
    "tests/test_strict_interpreter.py", "test_offsets_of_the_launches_are_64_bit and kron_linear-large and contiguous",
    interpret=True,
)  # fmt: skip

MUTANTS = (
    Mutant(
        "ranks of the factors unmasked", "tail of the product unmasked", {EXACT: "BoundsError: load"},
        [(SHARED, "mask=(ks < K)[:, None] & valid[None, :], other", "mask=valid[None, :], other")],
        fast=True,
    ),
    Mutant(
        "a as it is for the transposed map", "stride ignored", {EXACT: "integers: x differs|BoundsError"},
        [(KERNELS, "a_strides=(term, chunk_out, chunk_in)", "a_strides=(term, chunk_in, chunk_out)")],
        fast=True,
    ),
    Mutant(
        "scale on the bias", "scale on the residual", {EXACT: "integers: y differs"},
        [(
            KERNELS,
            "y += tl.load(bias_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]",
            "y += scale_value * tl.load(bias_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]",
        )],
    ),
    Mutant(
        "scale on the gradient of the bias", "scale on the residual", {EXACT: "integers: bias differs"},
        [(KERNELS, "scaled_bias=False", "scaled_bias=True")],
    ),
    Mutant(
        "gradient of a without the scale", "missing term", {EXACT: "integers: a differs"},
        [(KERNELS, "sums=planes, scale=(None, scale), grad_bias=grad_a", "sums=planes, grad_bias=grad_a")],
    ),
    Mutant(
        "terms before a term in its gradient of a", "missing term", {EVERYTHING: "grad of a: (l2|max) error"},
        [(KERNELS, "ks // Q == term", "ks // Q <= term")],
    ),
    Mutant(
        "last chunks of y left out", "grid too small", {EXACT: "differs|not finite"},
        [(KERNELS, 'triton.cdiv(kron.a_out, blocks["BLOCK_A"]),)]', '(kron.a_out // blocks["BLOCK_A"]),)]')],
    ),
    Mutant(
        "ranks of x by every program of a row", "race", {LARGE_A: "RaceError|races with"},
        [(KERNELS, "mask=work_mask & (block == 0)", "mask=work_mask")],
    ),
    Mutant(
        "products of the mix rounded", "product in 16 bits", {ROUNDING: "rounding model"},
        [(
            KERNELS,
            "ranks += z[:, None, :] * (scale_value * a)[None, :, :]",
            "ranks += (z[:, None, :] * (scale_value * a)[None, :, :]).to(tl.bfloat16).to(tl.float32)",
        )],
    ),
    Mutant(
        "first row of a tile in 32 bits", "32-bit offset", {GHOST: "overflow"},
        [(KERNELS, "(tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M", "(tl.program_id(0) // blocks) * BLOCK_M")],
    ),
)
