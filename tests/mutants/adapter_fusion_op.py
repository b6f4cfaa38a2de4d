"""Errors planted in the op itself: what goes to the kernels of adapter_fusion, and what comes back."""

from . import ONCE, Mutant, Rung

OP = "fastadapt/ops/adapter_fusion.py"


def native(select, tests="tests/test_ops.py"):
    return Rung(tests, f"adapter_fusion-native-{select}", plugins=("tests.mutants.extension_plugin",))


def alone(select):
    return Rung("tests/test_adapter_fusion.py", f"{select} and native", plugins=("tests.mutants.extension_plugin",))


SMALL = native("small-float32 and test_matches_reference")
REGISTERED = native("everything-bfloat16 and test_registration")
FROZEN = native("everything-bfloat16 and test_frozen_arguments_change_no_bit", "tests/test_ops_numerics.py")
RECOMPILED = native("m33-d65-r17-float32 and test_scale_value_costs_no_recompilation")
TWICE = native("everything-float32 and test_double_backward_is_refused")

MUTANTS = (
    Mutant(
        "keys for values", "missing term", {SMALL: "output: (l2|max) error"},
        [(OP, "return query, keys, None if values is keys else values, scale,", "return query, keys, None, scale,")],
        fast=True,
    ),
    Mutant(
        "weights promised in 16 bits", "wrong promise to the compiler", {REGISTERED: "Dtypes torch.float32 and torch.bfloat16"},
        [(OP, "query.new_empty(shape, dtype=torch.promote_types(query.dtype, torch.float32))", "query.new_empty(shape)")],
    ),
    Mutant(
        "gradients one place on", "gradient mask ignored", {FROZEN: "wanted: .* differs|expected|None"},
        [(OP, "mask = list(ctx.needs_input_grad[1:])", "mask = [*ctx.needs_input_grad[2:], False]")],
    ),
    Mutant(
        "scale as a constant of the graph", "recompilation", {RECOMPILED: "assert"},
        [(OP, "    if isinstance(scale, (int, float)) and torch.compiler.is_compiling():", "    if False:")],
    ),
    Mutant(
        "gradients that go nowhere", "second differentiation", {TWICE: "differentiate twice"},
        [(OP, *ONCE)],
    ),
    Mutant(
        "values as they are under autocast", "autocast", {alone("test_autocast"): "values must be torch.bfloat16 like query"},
        [(OP, "keys, None if shared else values), (", "keys), (None if shared else values, ")],
    ),
    Mutant(
        "keys that are read twice under autocast", "hidden copy", {alone("test_autocast"): "assert"},
        [(OP, "shared = values is keys", "shared = False")],
    ),
)  # fmt: skip
