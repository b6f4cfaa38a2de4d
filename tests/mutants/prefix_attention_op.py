"""Errors planted in the op itself: what goes to the kernels of prefix_attention, what comes back, and its reference."""

from . import ONCE, Mutant, Rung

OP, LEAF = "fastadapt/ops/prefix_attention.py", "fastadapt/_leaf.py"
PLUGINS = ("tests.mutants.extension_plugin",)


def native(select, tests="tests/test_ops.py"):
    return Rung(tests, f"prefix_attention-native-{select}", plugins=PLUGINS)


def alone(select):
    return Rung("tests/test_prefix_attention.py", select, plugins=PLUGINS)


def reference(select):
    return Rung("tests/test_prefix_attention.py", f"{select} and reference")


REGISTERED = native("everything-float32 and test_registration")
CAST = native("float32-parameters-float32 and test_autocast")
FROZEN = native("everything-bfloat16 and test_frozen_arguments_change_no_bit", "tests/test_ops_numerics.py")
TWICE = native("everything-float32 and test_double_backward_is_refused")
IN_PLACE = alone("test_strided_inputs_and_broadcast_masks_are_read_in_place")
LEARNED = alone("test_a_mask_that_is_learned_goes_to_the_reference and native")
SHARED = alone("test_one_tensor_in_two_places and native")

MUTANTS = (
    Mutant(
        "causal mask from the top left", "missing term",
        {reference("test_causality_counts_from_the_last_query_and_key"): "assert"},
        [(OP, "keys > torch.arange(t, device=device)[:, None] + t_k - t", "keys > torch.arange(t, device=device)[:, None]")],
        fast=True,
    ),
    Mutant(
        "heads in turn instead of groups", "missing term",
        {alone("test_equals_pytorchs_attention and grouped and native"): "output: (l2|max) error"},
        # In what goes to the kernels, as in the reference: PyTorch's own attention disagrees.
        [(OP, "return q, k, v, prefix_k, prefix_v, gate, is_causal",
          "return q, k.roll(1, 1), v.roll(1, 1), prefix_k, prefix_v, gate, is_causal")],
    ),
    Mutant(
        "gate forgotten", "missing term",
        {reference("test_equals_pytorchs_attention and gate-of-zero"): "output: (l2|max) error"},
        [(OP, "(prefix if gate is None else gate.to(q.dtype)[:, None, None] * prefix)", "prefix")],
    ),
    Mutant(
        "a row without keys has even weights", "missing term",
        {reference("test_a_query_that_sees_nothing"): "assert"},
        [(OP, ".softmax(-1).masked_fill(dead, 0.0)", ".softmax(-1)")],
    ),
    Mutant(
        "columns of the own keys right behind the prefix", "missing term",
        {reference("test_forward_and_backward_drop_the_documented_weights"): "assert"},
        [(OP, "    return (p + 7) // 8 * 8\n", "    return p\n")],
    ),
    Mutant(
        "gradients one place on", "gradient mask ignored", {FROZEN: "wanted: .* differs|expected|None"},
        [(OP, "mask = list(ctx.needs_input_grad[1:7])", "mask = list(ctx.needs_input_grad[2:8])")],
    ),
    Mutant(
        "heads that lie apart", "wrong promise to the compiler", {REGISTERED: "Stride mismatch"},
        [(OP, "like.new_empty(b, t, h, e).transpose(1, 2)", "like.new_empty(b, h, t, e)")],
    ),
    Mutant(
        "one tensor in two places of a graph", "graph break", {SHARED: "Unsupported|twice|duplicate"},
        [(LEAF, "t.view_as(t) if twice else t for", "t for")],
    ),
    Mutant(
        "a copy of the mask for each head", "hidden copy", {IN_PLACE: "assert"},
        [(OP, "attn_mask.expand(*q.shape[:3], k.shape[2])", "attn_mask.expand(*q.shape[:3], k.shape[2]).contiguous()")],
    ),
    Mutant(
        "a learned mask without a gradient", "silent fallback", {LEARNED: "DID NOT RAISE"},
        [(OP, "if isinstance(attn_mask, Tensor) and attn_mask.requires_grad", "if False and attn_mask.requires_grad")],
    ),
    Mutant(
        "keys that autocast passes by", "autocast", {CAST: "k must be torch.bfloat16 like q"},
        [(OP, "autocast(q, (q, k, v), (", "autocast(q, (q,), (k, v, ")],
    ),
    Mutant(
        "gradients that go nowhere", "second differentiation", {TWICE: "differentiate twice"},
        [(OP, *ONCE)],
    ),
)  # fmt: skip
