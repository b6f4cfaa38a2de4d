"""Errors planted in the Triton kernels of bottleneck."""

from . import Mutant, Rung

COMMON, FWD, BWD = "kernels/_common.py", "kernels/bottleneck.py", "kernels/bottleneck_bwd.py"


def interpreted(select, tests="tests/test_ops_numerics.py"):
    return Rung(tests, f"bottleneck-triton-{select}", interpret=True)


EXACT = interpreted("integers-float32 and test_integers_are_exact")
BANK = interpreted("integers-in-a-bank-float32 and test_integers_are_exact")
ROUNDING = interpreted("m33-d65-r17-bfloat16 and test_rounds_where_the_docstring_says")
INFINITE = interpreted("m33-d65-r17-float32 and test_nan_and_inf_spread_as_in_pytorch")
GRADIENTS = interpreted("m33-d65-r17-float32 and test_expanded_gradients_change_no_bit")
ALONE = interpreted("m33-d65-r17-float32 and test_a_row_alone_has_the_bits")
ACCURACY = "tests/test_ops.py"
EVERYTHING = interpreted("everything-float32 and test_matches_reference", ACCURACY)
LARGE_MEAN = interpreted("norm-of-large-mean-float32 and test_matches_reference", ACCURACY)
STRIDES = interpreted("m33-d65-r17-float32 and test_any_strides and every-second", ACCURACY)
EMPTY = interpreted("empty-float32 and test_matches_reference", ACCURACY)
FROZEN = interpreted("everything-float32 and test_only_what_is_wanted_is_returned", ACCURACY)
GHOST = Rung(
    "tests/test_strict_interpreter.py", "test_offsets_of_the_launches_are_64_bit and bottleneck-large and contiguous",
    interpret=True,
)  # fmt: skip
EXACT_BFLOAT16 = interpreted("integers-bfloat16 and test_integers_are_exact")
LEFT_ALONE = interpreted("m33-d65-r17-float32 and test_inputs_are_left_alone")
OTHER_TILES = Rung("tests/test_strict_interpreter.py", "test_every_tile_alone and bottleneck-r20-bfloat16", interpret=True)
LAUNCHER = Rung("tests/test_launchers.py", "bottleneck")
COMPILED, COMPILED_RANK_256 = (
    Rung("tests/test_triton_compile.py", f"test_compiles_and_fits and bottleneck-{chip}") for chip in (89, 86)
)
PTX = Rung("tests/test_ptx.py", "test_triton_matches_reference and bottleneck-m33-d65-r17-bfloat16-sm_80")

OUTPUT = "integers: y differs"
BOUNDS = "BoundsError: load"
GRAD = "grad of {}: (l2|max) error"

MUTANTS = (
    Mutant(
        "rows of x unmasked", "load out of bounds", {EXACT: BOUNDS},
        [(
            COMMON,
            "mask=inside[:, None] & valid[None, :], other=0.0)\n        if norm",
            "mask=valid[None, :], other=0.0)\n        if norm",
        )],
        fast=True,
    ),
    Mutant(
        "rows of y unmasked", "store out of bounds", {EXACT: "BoundsError: store", PTX: "access out of bounds: .* of y_ptr"},
        [(
            FWD,
            "(base + y).to(y_ptr.dtype.element_ty), mask=mask)",
            "(base + y).to(y_ptr.dtype.element_ty), mask=(cols < d)[None, :])",
        )],
    ),
    Mutant(
        "one row too many", "mask off by one", {EXACT: BOUNDS},
        [(FWD, "inside = positions < end", "inside = positions <= end")],
    ),
    Mutant(
        "one column of a sum too many", "mask off by one", {EXACT: BOUNDS},
        [(
            BWD,
            "valid = cols < d\n    ranks = tl.arange(0, BLOCK_R).to(tl.int64)\n    acc",
            "valid = cols <= d\n    ranks = tl.arange(0, BLOCK_R).to(tl.int64)\n    acc",
        )],
    ),
    Mutant(
        "depth of the down weight unmasked", "tail of the product unmasked", {EXACT: BOUNDS},
        [(
            COMMON,
            "mask=valid[:, None] & present[None, :], other=0.0).to(dtype)",
            "mask=present[None, :], other=0.0).to(dtype)",
        )],
    ),
    Mutant(
        "ranks of the up weight unmasked", "tail of the product unmasked", {EXACT: BOUNDS},
        [(
            FWD,
            "mask=(ranks < R)[:, None] & valid[None, :], other=0.0).to(hidden.dtype)",
            "mask=valid[None, :], other=0.0).to(hidden.dtype)",
        )],
    ),
    Mutant(
        "load without other", "masked-off lanes undefined", {EXACT: "integers: .* differs"},
        [(
            COMMON,
            "mask=inside[:, None] & valid[None, :], other=0.0)\n        if norm",
            "mask=inside[:, None] & valid[None, :])\n        if norm",
        )],
    ),
    Mutant(
        "row number of the forward in 32 bits", "32-bit offset", {GHOST: "overflow"},
        [(
            FWD,
            "start, end, width, rank = tl.program_id(0).to(tl.int64) * BLOCK_M",
            "start, end, width, rank = tl.program_id(0) * BLOCK_M",
        )],
    ),
    Mutant(
        "chunk number of the sums in 32 bits", "32-bit offset", {GHOST: "overflow"},
        [(BWD, "index = (tl.program_id(0) // tiles_d).to(tl.int64)", "index = tl.program_id(0) // tiles_d")],
    ),
    Mutant(
        "columns of x taken as adjacent", "stride ignored", {STRIDES: BOUNDS},
        [(
            COMMON,
            "offsets[:, None] + cols[None, :] * stride_d, mask=inside[:, None] & valid",
            "offsets[:, None] + cols[None, :], mask=inside[:, None] & valid",
        )],
    ),
    Mutant(
        "grad_y read with the strides of x", "stride ignored", {GRADIENTS: BOUNDS},
        [(
            FWD,
            "self.grad_y, *self.grad_rows, x, *self.x_rows, grad_x",
            "self.grad_y, *self.x_rows, x, *self.x_rows, grad_x",
        )],
    ),
    Mutant(
        "strides taken as multiples of 16", "alignment assumed", {EXACT: "hint|multiple_of|multiple of"},
        [(COMMON, "    return rows * stride\n", "    return rows * tl.multiple_of(stride, 16)\n")],
    ),
    Mutant(
        "last tile of columns left out", "tail skipped", {EXACT: "integers: .* differs"},
        [(FWD, "for first in range(0, d, BLOCK_D):", "for first in range(0, d // BLOCK_D * BLOCK_D, BLOCK_D):")],
    ),
    Mutant(
        "last tile of rows not launched", "grid too small", {EXACT: "integers: .* differs"},
        [(FWD, 'grid = (triton.cdiv(m, blocks["BLOCK_M"]) + ', 'grid = (m // blocks["BLOCK_M"] + ')],
    ),
    Mutant(
        "last tiles of a bank not launched", "grid too small", {BANK: OUTPUT},
        [(FWD, 'blocks["BLOCK_M"]) + (g + 2 if groups', 'blocks["BLOCK_M"]) + (g - 3 if groups')],
    ),
    Mutant(
        "at most 65535 programs", "grid too small", {GHOST: "too few programs"},
        [(
            FWD,
            'grid = (triton.cdiv(m, blocks["BLOCK_M"]) + (g + 2 if groups["GROUPS"] else 0),)',
            'grid = (min(65535, triton.cdiv(m, blocks["BLOCK_M"]) + (g + 2 if groups["GROUPS"] else 0)),)',
        )],
    ),
    Mutant(
        "rows in the second dimension of the grid", "grid too large", {LAUNCHER: "assert"},
        [
            (
                FWD,
                'grid = (triton.cdiv(m, blocks["BLOCK_M"]) + (g + 2 if groups["GROUPS"] else 0),)',
                'grid = (1, triton.cdiv(m, blocks["BLOCK_M"]) + (g + 2 if groups["GROUPS"] else 0))',
            ),
            (
                FWD,
                "start, end, width, rank = tl.program_id(0).to(tl.int64) * BLOCK_M",
                "start, end, width, rank = tl.program_id(1).to(tl.int64) * BLOCK_M",
            ),
            (
                FWD,
                "group, start, end = bank_tile(starts_ptr, tl.program_id(0).to(tl.int64)",
                "group, start, end = bank_tile(starts_ptr, tl.program_id(1).to(tl.int64)",
            ),
        ],
    ),
    Mutant(
        "backward on whatever device is current", "wrong device", {LAUNCHER: "asks for the GPU before|is launched on whatever"},
        [(FWD, "    with torch.cuda.device_of(x):\n        call = _Backward(", "    if True:\n        call = _Backward(")],
    ),
    Mutant(
        "last columns left out of tall tiles", "one tile of several", {OTHER_TILES: "not finite|assert"},
        [(FWD, "for first in range(0, d, BLOCK_D):", "for first in range(0, d - d % BLOCK_D * (BLOCK_M // 64), BLOCK_D):")],
    ),
    Mutant(
        "backward of no rows", "empty input", {EMPTY: "ZeroDivisionError"},
        [(
            FWD,
            "    want = _Wanted(*output_mask)\n    if not x.numel():",
            "    want = _Wanted(*output_mask)\n    if not x.shape[-1]:",
        )],
    ),
    Mutant(
        "relu by maximum", "NaN swallowed", {INFINITE: "spreads otherwise"},
        [(COMMON, "value = tl.where(z <= 0, 0.0, z)", "value = tl.maximum(z, 0.0)")],
    ),
    Mutant(
        "padded ranks of an infinite row", "zero times infinity", {INFINITE: "spreads otherwise"},
        [(COMMON, "acc = tl.where(present[None, :], acc, 0.0)", "acc += tl.where(present[None, :], 0.0, 0.0)")],
    ),
    Mutant(
        "residual times scale", "scale on the residual", {EXACT: OUTPUT},
        [(FWD, "(base + y).to(", "(base * scale + y).to(")],
    ),
    Mutant(
        "bias behind relu", "bias after the activation", {EXACT: OUTPUT},
        [(
            FWD,
            "        z += rank_vector(down_bias_ptr, rank, BLOCK_R)\n    value, _ = hidden_layer(z, hidden_skip_ptr, "
            "R, BLOCK_R, ACTIVATION)\n",
            "        bias = rank_vector(down_bias_ptr, rank, BLOCK_R)\n    value, _ = hidden_layer(z, hidden_skip_ptr, "
            "R, BLOCK_R, ACTIVATION)\n    value += bias\n",
        )],
    ),
    Mutant(
        "slope without hidden_skip_weight", "missing term", {EXACT: "integers: x differs"},
        [(COMMON, "        slope += skip\n", "")],
    ),
    Mutant(
        "norm_bias missing in grad_down", "missing term", {EVERYTHING: GRAD.format("down_weight")},
        [(
            BWD,
            "                    product += bias[:, None] * grad_z_sums[None, :]\n",
            "                    product += 0.0 * bias[:, None] * grad_z_sums[None, :]\n",
        )],
    ),
    Mutant(
        "every adapter with the first down weight", "wrong row of a bank", {BANK: OUTPUT},
        [(FWD, "        down_ptr += group * R * d\n", "")],
    ),
    Mutant(
        "gradients of the adapter before", "wrong row of a bank", {BANK: "integers: up_weight differs"},
        [(BWD, "up_offsets = group * d * R +", "up_offsets = (group ^ 1) * d * R +")],
    ),
    Mutant(
        "no adapter taken for the first", "id -1 not honoured", {BANK: OUTPUT},
        [(COMMON, "group = torch.where((ids >= 0) & (ids < g), ids,", "group = torch.where(ids < g, ids.clamp(min=0),")],
    ),
    Mutant(
        "grad_x made whenever", "gradient mask ignored", {FROZEN: "assert"},
        [(
            FWD,
            "return x.new_empty(0) if grad_x is None else grad_x",
            "return x.new_zeros(x.shape) if grad_x is None else grad_x",
        )],
    ),
    Mutant(
        "last rank of a partial left unwritten", "uninitialised memory", {EXACT: "integers: .* differs"},
        [(
            BWD,
            "tl.store(hidden_ptr + work, value.to(dtype), mask=inside[:, None])",
            "tl.store(hidden_ptr + work, value.to(dtype), mask=inside[:, None] & (ranks != R - 1)[None, :])",
        )],
    ),
    Mutant(
        "y written over x", "input overwritten", {EXACT: "integers: .* differs"},
        [(FWD, "    y = x.new_empty(x.shape)\n", "    y = x if add_x and x.is_contiguous() else x.new_empty(x.shape)\n")],
    ),
    Mutant(
        "sums over rows in 16 bits", "sum in 16 bits",
        {EVERYTHING: GRAD.format("up_bias"), EXACT_BFLOAT16: "integers: .*_bias differs"},
        [(
            BWD,
            "tl.store(sums_ptr + columns, tl.sum(sums, 0), mask=valid)",
            "tl.store(sums_ptr + columns, tl.sum(sums.to(tl.bfloat16), 0).to(tl.float32), mask=valid)",
        )],
    ),
    Mutant(
        "accumulator of the projection in 16 bits", "product in 16 bits", {ROUNDING: "rounding model"},
        [(
            COMMON,
            "acc = tl.dot(tile, weight, acc, input_precision=PRECISION)",
            "acc = tl.dot(tile, weight, acc, input_precision=PRECISION).to(dtype).to(tl.float32)",
        )],
    ),
    Mutant(
        "residual added to a rounded product", "residual added after rounding", {ROUNDING: "rounding model"},
        [(FWD, "(base + y).to(", "(base + y.to(y_ptr.dtype.element_ty).to(tl.float32)).to(")],
    ),
    Mutant(
        "up projection in tf32", "tf32 product", {EXACT: OUTPUT},
        [(FWD, "y = tl.dot(hidden, up, input_precision=PRECISION)", "y = tl.dot(hidden, up)")],
        fast=True,
    ),
    Mutant(
        "hidden values in 16 bits before the bias", "product in 16 bits", {ROUNDING: "rounding model"},
        [(
            FWD,
            "        z += rank_vector(down_bias_ptr, rank",
            "        z = z.to(x_ptr.dtype.element_ty).to(tl.float32) + rank_vector(down_bias_ptr, rank",
        )],
    ),
    Mutant(
        "variance as a difference of squares", "cancellation", {LARGE_MEAN: "(l2|max) error"},
        [
            (COMMON, "gap = tile - tile_mean[:, None]", "gap = tile"),
            (
                COMMON,
                "squares += tl.sum(tl.where(mask, gap * gap, 0.0), 1) + delta * delta * (seen * n / (seen + n))",
                "squares += tl.sum(tl.where(mask, gap * gap, 0.0), 1)",
            ),
            (COMMON, "tl.rsqrt(squares / d + eps)", "tl.rsqrt(squares / d - mean * mean + eps)"),
        ],
    ),
    Mutant(
        "sums of all chunks in one plane", "race", {EXACT: "races with"},
        [(
            BWD,
            "tl.store(sums_ptr + columns, tl.sum(sums, 0), mask=valid)",
            "tl.store(sums_ptr + cols, tl.load(sums_ptr + cols, mask=valid) + tl.sum(sums, 0), mask=valid)",
        )],
    ),
    Mutant(
        "sums by atomics", "order of a sum left to chance", {EXACT: "RaceError: atomic"},
        [
            (
                FWD,
                "sums = new((self.chunks, d), dtype=torch.float32) if sums else None",
                "sums = torch.zeros((1, d), device=left.device) if sums else None",
            ),
            (
                BWD,
                "tl.store(sums_ptr + columns, tl.sum(sums, 0), mask=valid)",
                "tl.atomic_add(sums_ptr + cols, tl.sum(sums, 0), mask=valid)",
            ),
            (
                BWD,
                "sums = sum_planes(sums_ptr, first, last, d, cols, valid)",
                "sums = sum_planes(sums_ptr, 0, 1, d, cols, valid)",
            ),
            (
                BWD,
                "grad_z_sums = sum_planes(grad_z_sums_ptr, first, last, R,",
                "grad_z_sums = sum_planes(grad_z_sums_ptr, 0, 1, R,",
            ),
            (BWD, "out = sum_planes(grad_skip_sums_ptr, first, last, R,", "out = sum_planes(grad_skip_sums_ptr, 0, 1, R,"),
        ],
    ),
    Mutant(
        "width of a tile by the number of rows", "row depends on its neighbours", {ALONE: "alone has other bits"},
        [(
            FWD,
            "    return _blocks(x, block_r, block_m, block_d, block_d",
            "    block_d = min(block_d, max(16, triton.next_power_of_2(m)))\n    return _blocks(x, block_r, block_m, "
            "block_d, block_d",
        )],
    ),
    Mutant(
        "eight tiles in flight", "too much shared memory", {COMPILED: "bytes of shared memory, the chip has"},
        [(FWD, '"num_stages": max(1, min(4, max(', '"num_stages": 20 + max(1, min(4, max(')],
    ),
    Mutant(
        "tall tiles for a large rank", "spilled registers", {COMPILED_RANK_256: "local memory|stack"},
        [(FWD, "_HIGH = ((32, 64, 4096), (16, 64, None))", "_HIGH = ((32, 64, 4096), (128, 64, None))")],
    ),
    Mutant(
        "products of depth 8", "shape that only the interpreter takes", {COMPILED_RANK_256: "Input shapes should have"},
        [(FWD, "_HIGH = ((32, 64, 4096), (16, 64, None))", "_HIGH = ((32, 64, 4096), (16, 8, None))")],
    ),
    Mutant(
        "products without tensor cores", "slow instructions", {COMPILED: "use no tensor cores|its budget is"},
        [(
            FWD,
            "y = tl.dot(hidden, up, input_precision=PRECISION)",
            "y = tl.sum(hidden.to(tl.float32)[:, :, None] * up.to(tl.float32)[None, :, :], 1)",
        )],
    ),
)
