"""Errors planted in the op itself: what goes to the kernels of lora_linear, and what comes back."""

from . import ONCE, Mutant, Rung

OP = "fastadapt/ops/lora_linear.py"


def native(select, tests="tests/test_ops.py"):
    return Rung(tests, f"lora_linear-native-{select}", plugins=("tests.mutants.extension_plugin",))


EVERYTHING = native("everything-float32 and test_matches_reference")
DORA = native("dora-with-everything-float32 and test_matches_reference")
FROZEN = native("everything-bfloat16 and test_frozen_arguments_change_no_bit", "tests/test_ops_numerics.py")
RECOMPILED = native("m33-d65-r17-float32 and test_scale_value_costs_no_recompilation")
TWICE = native("everything-float32 and test_double_backward_is_refused")
PEFT = Rung(
    "tests/test_peft_library.py", "test_equals_the_library and dora-float32-False", plugins=("tests.mutants.extension_plugin",)
)

BANK = Rung("tests/test_ops.py", "lora_linear-triton-bank-with-everything-float32 and test_matches_reference", interpret=True)

MUTANTS = (
    Mutant(
        "bias of the adapter without the gain", "missing term", {DORA: "output: (l2|max) error"},
        [(OP, "        added = added if gain is None else gain * added\n", "")],
        fast=True,
    ),
    Mutant(
        "a scale that is a tensor beside a diagonal forgotten", "missing term", {EVERYTHING: "output: (l2|max) error"},
        [(OP, "else scale * diagonal.to(wide)", "else diagonal.to(wide)")],
        fast=True,
    ),
    Mutant(
        "bias of the first adapter for rows without one", "missing term", {BANK: "output: (l2|max) error"},
        [(OP, "torch.where(ids < 0, len(lora_bias), ids.clamp(max=len(lora_bias)))", "ids.clamp(min=0)")],
    ),
    Mutant(
        "scale of the first adapter for every bias", "missing term", {BANK: "output: (l2|max) error"},
        [(OP, "table = F.pad((scale[:, None] if", "table = F.pad((scale[0] if")],
    ),
    Mutant(  # the reference takes the norm from the same function
        "norm of the frozen rows alone", "missing term", {PEFT: "(l2|max) error"},
        [(OP, "torch.addmm(block.to(wide), update, a)", "block.to(wide)")],
    ),
    Mutant(
        "norm differentiated", "missing term", {PEFT: "(l2|max) error"},
        [(OP, "    with torch.no_grad(), without_autocast(weight):", "    with without_autocast(weight):")],
    ),
    Mutant(
        "gradients one place on", "gradient mask ignored", {FROZEN: "wanted: .* differs|expected|None"},
        [(OP, "mask = list(ctx.needs_input_grad[1:8])", "mask = list(ctx.needs_input_grad[2:9])")],
    ),
    Mutant(
        "scale as a constant of the graph", "recompilation", {RECOMPILED: "assert"},
        [(OP, "    if compiling or isinstance(scale, Tensor):", "    if isinstance(scale, Tensor):")],
    ),
    Mutant(
        "gradients that go nowhere", "second differentiation", {TWICE: "differentiate twice"},
        [(OP, *ONCE)],
    ),
)
