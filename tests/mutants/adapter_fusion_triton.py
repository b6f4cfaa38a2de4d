"""Errors planted in the Triton kernels of adapter_fusion."""

from . import Mutant, Rung

FWD, BWD = "kernels/adapter_fusion.py", "kernels/adapter_fusion_bwd.py"


def interpreted(select, tests="tests/test_ops.py"):
    return Rung(tests, f"adapter_fusion-{select}", interpret=True)


MATCHES = interpreted("triton-m33-d65-r17-float32 and test_matches_reference")
EVERYTHING = interpreted("triton-everything-float32 and test_matches_reference")
NAN = interpreted("triton-m33-d65-r17-float32 and test_nan_and_inf_spread_as_in_pytorch", "tests/test_ops_numerics.py")
ROUNDING = interpreted("triton-everything-bfloat16 and test_rounds_where_the_docstring_says", "tests/test_ops_numerics.py")
TILES = interpreted("wide-float32 and test_every_tile_alone", "tests/test_strict_interpreter.py")
GHOST = interpreted("large-contiguous and test_offsets_of_the_launches_are_64_bit", "tests/test_strict_interpreter.py")
SHARE = Rung("tests/test_adapter_fusion_triton.py", "test_what_all_products_share_leaves_no_rounding")
ALONE = Rung("tests/test_adapter_fusion_triton.py", "test_layouts_change_no_bit and rows_alone")

MUTANTS = (
    Mutant(
        "the first adapter for all", "wrong row of a bank", {MATCHES: "output: (l2|max) error"},
        [(FWD, "here = tl.cast(i, tl.int64) * UNIT\n", "here = tl.cast(i, tl.int64) * 0\n")],
        fast=True,
    ),
    Mutant(
        "tiles unmasked", "load out of bounds", {MATCHES: "BoundsError: load"},
        [(BWD, "stride_d, mask=mask, other=0.0)", "stride_d)")],
        fast=True,
    ),
    Mutant(
        "scores of adapters behind the last one", "mask off by one", {MATCHES: r"grad of \w+: (l2|max) error"},
        [(FWD, 'scores = tl.full((BLOCK_M, BLOCK_G), -float("inf"), tl.float32)',
          "scores = tl.zeros((BLOCK_M, BLOCK_G), tl.float32)")],
    ),
    Mutant(
        "the sum not rescaled", "missing term", {MATCHES: "output: (l2|max) error"},
        [(FWD, "y = y * fade[:, None] + weight", "y = y + weight")],
    ),
    Mutant(
        "a highest score of minus infinity", "zero times infinity", {NAN: "in values|in keys|in query"},
        [(FWD, 'shift = tl.where(highest == -float("inf"), 0.0, highest)', "shift = highest")],
    ),
    Mutant(
        "sum of values in bfloat16", "sum in 16 bits", {ROUNDING: "rounding model"},
        [(FWD, "weight[:, None] * values\n", "(weight[:, None] * values).to(tl.bfloat16).to(tl.float32)\n")],
    ),
    Mutant(
        "products less nothing", "cancellation", {SHARE: r"assert \(tensor\(True\) and False\)"},
        [(BWD, "base = tl.where(weight > heaviest, product, base)", "base = tl.where(weight > heaviest, 0.0, base)")],
    ),
    Mutant(
        "base moved without the sum", "missing term", {MATCHES: "grad of query: (l2|max) error"},
        [(BWD, "acc += moved[:, None] * summed + pull[:, None] * keys", "acc += pull[:, None] * keys")],
    ),
    Mutant(
        "grad_keys without the scale", "missing term", {EVERYTHING: "grad of keys: (l2|max) error"},
        [(BWD, "query_stride_d, mask) * scale\n", "query_stride_d, mask)\n")],
    ),
    Mutant(
        "parts of grad_scale in one place", "race", {EVERYTHING: "RaceError|races with"},
        [(BWD, "parts_ptr + tl.program_id(0)", "parts_ptr + 0 * tl.program_id(0)")],
    ),
    Mutant(
        "dot products of the last piece alone", "one tile of several", {TILES: "output: (l2|max) error"},
        [(BWD, "        acc += dots(a,", "        acc = dots(a,")],
    ),
    Mutant(
        "first row of a program in 32 bits", "32-bit offset", {GHOST: "overflow"},
        [(FWD, "rows = tl.program_id(0).to(tl.int64) * BLOCK_M", "rows = tl.program_id(0) * BLOCK_M")],
    ),
    Mutant(
        "strides that the compiler looks at", "row depends on its neighbours", {ALONE: r"row \d+ alone has other bits"},
        [(BWD, 'for dim in "mg"]', 'for dim in ""]')],
    ),
)  # fmt: skip
