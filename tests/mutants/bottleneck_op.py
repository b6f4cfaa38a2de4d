"""Errors planted in the op itself: what PyTorch is told of the kernels of bottleneck, and what is asked of them."""

from . import ONCE, Mutant, Rung

OP, LEAF, CALL = "fastadapt/ops/bottleneck.py", "fastadapt/_leaf.py", "csrc/cpu/bottleneck.cpp"


def native(select, tests="tests/test_ops.py"):
    return Rung(tests, f"bottleneck-native-{select}", plugins=("tests.mutants.extension_plugin",))


REGISTERED = native("m33-d65-r17-float32 and test_registration")
COMPILED = native("m33-d65-r17-float32 and test_compiles_without_graph_break and True")
RECOMPILED = native("m33-d65-r17-float32 and test_scale_value_costs_no_recompilation")
TWICE = native("everything-float32 and test_double_backward_is_refused")
TRANSFORMED = native("everything-float32 and test_function_transforms")
ALLOCATED = native("m33-d65-r17-float32 and test_forward_allocates_the_output_only")
FROZEN = native("everything-bfloat16 and test_frozen_arguments_change_no_bit", "tests/test_ops_numerics.py")
ACCURATE = native("residual-float32 and test_matches_reference")
AUTOCAST = native("float32-parameters-float32 and test_autocast_casts_what_the_spec_names_alone")
MISSING = Rung("tests/test_ops.py", "test_missing_backend_is_refused", plugins=("tests.mutants.extension_plugin",))

MUTANTS = (
    Mutant(
        "strides of x promised for the output", "wrong promise to the compiler", {REGISTERED: "Stride mismatch"},
        [(OP, "    return x.new_empty(x.shape)\n", "    return x.new_empty(x.shape[::-1]).transpose(0, -1)\n")],
        fast=True,
    ),
    Mutant(
        "the output is the input", "wrong promise to the compiler", {REGISTERED: "alias|mutat"},
        [(CALL, "Tensor y = empty(x.sizes(), x);", "Tensor y = x;")],
    ),
    Mutant(
        "scale as a constant of the graph", "recompilation", {RECOMPILED: "assert"},
        [(OP, "        scale = scale * torch.ones((), dtype=", "        torch.ones((), dtype=")],
    ),
    Mutant(
        "value of a tensor looked at", "graph break", {COMPILED: "Unsupported|[Dd]ata-dependent"},
        [(OP, "    name = _fwd.choose(", "    if x.abs().max() > 1e30:\n        activation = None\n    name = _fwd.choose(")],
    ),
    Mutant(
        "gradients that go nowhere", "second differentiation", {TWICE: "differentiate twice"},
        [(OP, *ONCE)],
    ),
    Mutant(
        "kernels inside a transform", "function transform", {TRANSFORMED: "vmap|functorch|E  .*Error"},
        [(LEAF, "            if not transformed:\n", "            if True:\n")],
    ),
    Mutant(
        "x cast under autocast", "autocast", {AUTOCAST: "assert"},
        [(
            OP,
            "    name = _fwd.choose(",
            "    if torch.is_autocast_enabled('cpu'):\n        args = (x.bfloat16(), *args[1:])\n    name = _fwd.choose(",
        )],
    ),
    Mutant(
        "x copied", "hidden copy", {ALLOCATED: "assert"},
        [(OP, "    add_x = residual is x\n", "    add_x = residual is x\n    x = x.contiguous()\n")],
    ),
    Mutant(
        "gradient of the residual forgotten", "missing term", {ACCURATE: "grad of residual"},
        [(OP, "grad_residual = grad_y if needs[6] else None", "grad_residual = None")],
        fast=True,
    ),
    Mutant(
        "gradients one place on", "gradient mask ignored", {FROZEN: "wanted: .* differs"},
        [(OP, "for i in (1, 2, 3, 4, 5, 7, 8, 9, 10, 11)]", "for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)]")],
    ),
    Mutant(
        "reference where a backend is missing", "silent fallback", {MISSING: "DID NOT RAISE"},
        [(LEAF, "            raise RuntimeError(reason)\n", '            return "reference"\n')],
    ),
)
