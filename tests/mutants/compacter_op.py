"""Errors planted in the op itself: what goes to the kernels of compacter, and what comes back."""

from . import ONCE, Mutant, Rung

OP = "fastadapt/ops/compacter.py"


def native(select, tests="tests/test_ops.py"):
    return Rung(tests, f"compacter-native-{select}", plugins=("tests.mutants.extension_plugin",))


SMALL = native("small-float32 and test_matches_reference")
EVERYTHING = native("everything-float32 and test_matches_reference")
FROZEN = native("everything-bfloat16 and test_frozen_arguments_change_no_bit", "tests/test_ops_numerics.py")
RECOMPILED = native("m33-d65-r17-float32 and test_scale_value_costs_no_recompilation")
TWICE = native("everything-float32 and test_double_backward_is_refused")

MUTANTS = (
    Mutant(
        "x forgotten as its own residual", "missing term", {SMALL: "output: (l2|max) error"},
        [(OP, "    add_x = residual is x\n", "    add_x, residual = False, None if residual is x else residual\n")],
        fast=True,
    ),
    Mutant(
        "gradient of the residual forgotten", "missing term", {EVERYTHING: "grad of residual: (l2|max) error"},
        [(OP, "grad_residual = grad_y if needs[10] else None", "grad_residual = 0 * grad_y if needs[10] else None")],
        fast=True,
    ),
    Mutant(
        "gradients one place on", "gradient mask ignored", {FROZEN: "wanted: .* differs|expected|None"},
        [(OP, "mask = [*needs[1:10], needs[11]]", "mask = [*needs[2:11], needs[11]]")],
    ),
    Mutant(
        "scale as a constant of the graph", "recompilation", {RECOMPILED: "assert"},
        [(OP, "    if isinstance(scale, (int, float)) and torch.compiler.is_compiling():", "    if False:")],
    ),
    Mutant(
        "gradients that go nowhere", "second differentiation", {TWICE: "differentiate twice"},
        [(OP, *ONCE)],
    ),
)
