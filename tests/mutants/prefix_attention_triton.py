"""Errors planted in the Triton kernels of prefix_attention."""

from . import Mutant, Rung

SHARED, FWD, BWD = "kernels/_attention.py", "kernels/prefix_attention.py", "kernels/prefix_attention_bwd.py"


def interpreted(case):
    return Rung("tests/test_ops.py", f"prefix_attention-triton-{case}-float32 and test_matches_reference", interpret=True)


CONTINUED, ODD, GROUPED, DROPOUT = (interpreted(case) for case in ("continued", "odd", "grouped", "dropout"))
GATED, ZERO, BANK, WIDE = (
    interpreted(case) for case in ("gated-with-everything", "gate-of-zero", "bank-of-sequences", "wide")
)
COMPILED = Rung("tests/test_ptx.py", "test_triton_matches_reference and prefix_attention-everything-float32-sm_80")
SPREAD = Rung(
    "tests/test_ops_numerics.py", "prefix_attention-triton-everything-float32 and test_nan_and_inf_spread_as_in_pytorch",
    interpret=True,
)  # fmt: skip
GHOST = Rung(
    "tests/test_strict_interpreter.py", "test_offsets_of_the_launches_are_64_bit and prefix_attention-large and contiguous",
    interpret=True,
)  # fmt: skip

MUTANTS = (
    Mutant(
        "causal mask from the top left", "mask off by one", {CONTINUED: "output: (l2|max) error"},
        [(SHARED, "queries + (t_k - t) + 1", "queries + 1")],
        fast=True,
    ),
    Mutant(
        "last tile of the prefix one key too long", "mask off by one", {ODD: "output: (l2|max) error"},
        [(FWD, "prefix_limits = tl.where(inside, prefix_length, 0)", "prefix_limits = tl.where(inside, prefix_length + 1, 0)")],
        fast=True,
    ),
    Mutant(
        "first own column of dropout", "mask off by one", {DROPOUT: "output: (l2|max) error"},
        [(FWD, "(self.p + 7) // 8 * 8", "self.p // 8 * 8")],
    ),
    Mutant(
        "tiles end where the first row does", "tail skipped", {ODD: "output: (l2|max) error"},
        [(FWD, "tl.max(limits, 0)", "tl.min(limits, 0)")],
    ),
    Mutant(
        "scores without the scale", "missing term", {ODD: "output: (l2|max) error"},
        [(FWD, "row_products(q, k, PRECISION) * scale", "row_products(q, k, PRECISION)")],
    ),
    Mutant(
        "the first half of a wide head twice", "missing term", {WIDE: "output: (l2|max) error"},
        [(SHARED, "rows_tile(ptr, offsets, inside, stride, dtype, E, HALF, HALF)", "left")],
    ),
    Mutant(
        "lse by base 2", "missing term", {ODD: "grad of q: (l2|max) error"},
        [(FWD, "(top + tl.log2(total)) * LN2", "top + tl.log2(total)")],
    ),
    Mutant(
        "gradients of scores of the prefix without the mean", "missing term", {ODD: "grad of q: (l2|max) error"},
        [(BWD, "kept_scale, prefix_lse, prefix_delta, TAIL", "kept_scale, prefix_lse, 0 * prefix_delta, TAIL")],
    ),
    Mutant(
        "the prefix in the own mean without the gate", "missing term", {GATED: "grad of q: (l2|max) error"},
        [(BWD, "delta -= gates_of(gate_ptr, head, members, inside, group) * prefix_delta", "delta -= prefix_delta")],
    ),
    Mutant(
        "gradient of the gate times the gate", "missing term", {ZERO: "grad of gate: (l2|max) error"},
        [(FWD, "self.delta[1].sum((0, 2))", "self.delta[1].sum((0, 2)) * self.gate")],
        fast=True,
    ),
    Mutant(
        "a shared prefix with the stride of a batch", "load out of bounds", {ODD: "BoundsError: load"},
        [
            (SHARED, "    elif ALONE:\n", "    else:\n"),
            (FWD, "(0,) * (4 - t.dim()) + t.stride()", "t.stride()[:1] * (4 - t.dim()) + t.stride()"),
        ],
    ),
    Mutant(
        "keys of the first key head", "stride ignored", {GROUPED: "output: (l2|max) error"},
        [(FWD, "    k_ptr += sequence * k_strides[0] + head * k_strides[1]\n", "    k_ptr += sequence * k_strides[0]\n")],
    ),
    Mutant(
        "a prefix for id -1", "id -1 not honoured", {BANK: "BoundsError: load|output: (l2|max) error"},
        [(SHARED, "tl.where(valid & (owner >= 0), length, 0)", "tl.where(valid, length, 0)")],
    ),
    Mutant(
        "sequences of a bank out of order", "wrong row of a bank", {BANK: "grad of prefix_[kv]: (l2|max) error"},
        [(BWD, "sequence = tl.load(order_ptr + sequence).to(tl.int64)", "sequence = sequence + 0")],
    ),
    Mutant(
        "shares of all programs in one plane", "race", {ODD: "RaceError|races with"},
        [(BWD, "split * tl.cast(g, tl.int64) + owner", "0 * split * tl.cast(g, tl.int64) + owner")],
    ),
    Mutant(
        "products fused with the first sum of two lanes", "race", {COMPILED: "race between lanes of one warp"},
        [(
            BWD, "tl.sum(tl.fma(grad_y[0].to(tl.float32), y.to(tl.float32), 0.0), 1)",
            "tl.sum(grad_y[0].to(tl.float32) * y.to(tl.float32), 1)",
        )],
    ),
    Mutant(
        "hidden keys of a row that is NaN", "NaN swallowed", {SPREAD: "spreads otherwise"},
        [(BWD, "            grad_scores = tl.where(seen, grad_scores, 0.0)\n", "            grad_scores += 0.0\n")],
    ),
    Mutant(
        "sequence in 32 bits", "32-bit offset", {GHOST: "overflow"},
        [(SHARED, "(index % b).to(tl.int64), (index // b)", "index % b, (index // b)")],
    ),
)  # fmt: skip
