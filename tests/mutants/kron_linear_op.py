"""Errors planted in the op itself: what goes to the kernels of kron_linear, what comes back, and PyTorch's own products."""

from . import ONCE, Mutant, Rung

OP = "fastadapt/ops/kron_linear.py"


def native(select, tests="tests/test_ops.py"):
    return Rung(tests, f"kron_linear-native-{select}", plugins=("tests.mutants.extension_plugin",))


def alone(select):
    return Rung("tests/test_kron_linear.py", select, plugins=("tests.mutants.extension_plugin",))


SCALED = native("learned-scale-float32 and test_matches_reference")
EVERYTHING = native("everything-float32 and test_matches_reference")
FROZEN = native("everything-bfloat16 and test_frozen_arguments_change_no_bit", "tests/test_ops_numerics.py")
RECOMPILED = native("m33-d65-r17-float32 and test_scale_value_costs_no_recompilation")
TWICE = native("everything-float32 and test_double_backward_is_refused")

MUTANTS = (
    Mutant(
        "gradient of the residual forgotten", "missing term", {EVERYTHING: "grad of residual: (l2|max) error"},
        [(OP, "grad_y if ctx.needs_input_grad[7] else None", "0 * grad_y if ctx.needs_input_grad[7] else None")],
        fast=True,
    ),
    Mutant(
        "a term of the sum is not the term of b", "missing term",
        {alone("test_plain_pytorch_in_every_order and first"): "output: (l2|max) error"},
        [(OP, 'torch.einsum("matp,tab->mbp", products, a)', 'torch.einsum("matp,tab->mbp", products.flip(1), a)')],
        fast=True,
    ),
    Mutant(
        "the dearest order", "silent fallback", {alone("test_the_order_is_the_cheapest"): "assert"},
        [(OP, '"b first": m * terms * a_in', '"b first": 0 * m * terms * a_in')],
    ),
    Mutant(
        "the matrix in float16", "missing term", {alone("test_a_dense_b_in_float16"): "assert"},
        [(OP, "dense=x.dtype != torch.float16", "dense=True")],
    ),
    Mutant(
        "gradients one place on", "gradient mask ignored", {FROZEN: "wanted: .* differs|expected|None"},
        [(OP, "mask = list(ctx.needs_input_grad[2:7])", "mask = list(ctx.needs_input_grad[3:8])")],
    ),
    Mutant(
        "scale as a constant of the graph", "recompilation", {RECOMPILED: "assert"},
        [(OP, "scale != 1 and torch.compiler.is_compiling():", "scale is None:")],
    ),
    Mutant(
        "gradients that go nowhere", "second differentiation", {TWICE: "differentiate twice"},
        [(OP, *ONCE)],
    ),
)
