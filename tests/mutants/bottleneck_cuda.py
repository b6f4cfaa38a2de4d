"""Errors planted in the CUDA kernels of bottleneck."""

from . import Mutant, Rung

HEADERS = "csrc/cuda/"
TILES, ROWS, FWD = HEADERS + "tiles.cuh", HEADERS + "rows.cuh", HEADERS + "bottleneck.cuh"
BWD, GRADIENTS = HEADERS + "bottleneck_backward.cuh", HEADERS + "bottleneck_gradients.cuh"
COMMON_PLAN = HEADERS + "plan.cuh"
PLAN, PLAN_BWD = HEADERS + "bottleneck_plan.cuh", HEADERS + "bottleneck_plan_backward.cuh"
CALL, BANK, SUMS = HEADERS + "call.h", HEADERS + "bank.cuh", HEADERS + "sums.cuh"
CU, HARDWARE = HEADERS + "bottleneck.cu", HEADERS + "hardware.cuh"
# What costs here is the compiler: one dtype is enough.
ONLY_BFLOAT16 = tuple((CALL, f"plan({other}{{}}, device)", "plan(bf16{}, device)") for other in ("float", "f16"))
ONLY_FLOAT32 = tuple((CALL, f"plan({other}{{}}, device)", "plan(float{}, device)") for other in ("bf16", "f16"))
KEPT = ("tests.mutants.objects_plugin",)


def emulated(select, tests="tests/test_cuda_emulated.py", edits=ONLY_BFLOAT16):
    return Rung(tests, f"bottleneck-{select}", plugins=KEPT, edits=edits)


NUMERICS = "tests/test_cuda_emulated_numerics.py"
PLAIN = emulated("m65-d129-r48-bfloat16 and test_matches_reference")
STRIDES = emulated("everything-bfloat16 and test_any_strides")
ALONE = emulated("everything-bfloat16 and test_one_gradient_alone")
ALONE_FLOAT32 = emulated("everything-float32 and test_one_gradient_alone", edits=ONLY_FLOAT32)
LARGE_MEAN = emulated("norm-of-large-mean-float32 and test_matches_reference", edits=ONLY_FLOAT32)
EXACT = emulated("integers-bfloat16 and test_integers_are_exact", NUMERICS)
EXACT_FLOAT32 = emulated("integers-float32 and test_integers_are_exact", NUMERICS, ONLY_FLOAT32)
EXACT_BANK = emulated("integers-in-a-bank-bfloat16 and test_integers_are_exact", NUMERICS)
ROUNDING = emulated("m33-d65-r17-bfloat16 and test_rounds_where_the_docstring_says", NUMERICS)
INFINITE = emulated("m33-d65-r17-float32 and test_nan_and_inf_spread_as_in_pytorch", NUMERICS, ONLY_FLOAT32)
ADDRESSES = emulated("m33-d65-r17-bfloat16-address and test_sanitizer_reports_nothing")
LARGEST_RANK = Rung(
    "tests/test_cuda_emulated.py", "test_tiles and largest-rank-bfloat16", plugins=KEPT, edits=ONLY_BFLOAT16
)
EMPTY = emulated("empty-bfloat16 and test_matches_reference")
MIXED = emulated("float32-parameters-bfloat16 and test_matches_reference")
LEFT_ALONE = emulated("m33-d65-r17-bfloat16 and test_inputs_are_left_alone", NUMERICS)
FAR = Rung("tests/test_far_rows.py", "test_emulated_cuda and bottleneck and not last_blocks", plugins=KEPT, edits=ONLY_BFLOAT16)
RACES = emulated("bank-with-everything-bfloat16-thread and test_sanitizer_reports_nothing")
MANY = Rung("tests/test_far_rows.py", "last_blocks and bottleneck-rows", plugins=KEPT, edits=ONLY_BFLOAT16)
HOST = Rung("tests/test_cuda_host.py", "bottleneck and test_launches", plugins=KEPT)
PTX = Rung("tests/test_ptx.py", "test_cuda_matches_reference and bottleneck-4-d-bfloat16", plugins=KEPT, edits=ONLY_BFLOAT16)
COMPILED = Rung("tests/test_cuda_compile.py", "test_compiles_and_fits and bottleneck and not elsewhere")
OUTPUT = "integers: y differs"
GRAD = "grad of {}: (l2|max) error"
ANY = "(l2|max) error|not finite|assert"

MUTANTS = (
    Mutant(
        "no barrier before a tile is used", "missing barrier", {PLAIN: ANY},
        [(TILES, "      __syncthreads();\n    }\n", "    }\n")],
        fast=True,
    ),
    Mutant(
        "no barrier after the last tile", "missing barrier", {RACES: "data race"},
        [(TILES, "  cp_async_wait<0>();\n  __syncthreads();\n", "  cp_async_wait<0>();\n")],
    ),
    Mutant(
        "waits for too few copies", "missing wait", {PLAIN: ANY},
        [(TILES, "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()")],
        fast=True,
    ),
    Mutant(
        "barrier of the threads that hold a row", "divergent barrier", {PLAIN: "wait for ever|divergent"},
        [(
            FWD,
            "b.table->sum_xhat[i] = 0.f;\n  }\n  __syncthreads();\n",
            "b.table->sum_xhat[i] = 0.f;\n  }\n  if (threadIdx.x < BM) __syncthreads();\n",
        )],
    ),
    Mutant(
        "load past the last column", "load out of bounds", {ADDRESSES: "heap-buffer-overflow"},
        [(TILES, "from && column < valid ?", "from && column <= valid ?")],
    ),
    Mutant(
        "one row of a weight too many", "mask off by one", {ADDRESSES: "heap-buffer-overflow"},
        [(TILES, "return n0 + i < n ? weight + (n0 + i) * row + k0", "return n0 + i <= n ? weight + (n0 + i) * row + k0")],
    ),
    Mutant(
        "a pair stored where one column is left", "store out of bounds", {ADDRESSES: "heap-buffer-overflow"},
        [(TILES, "if (left > 1) to[1] = pair.second;", "to[1] = pair.second;")],
    ),
    Mutant(
        "depth of the weights unmasked", "tail of the product unmasked", {ADDRESSES: "heap-buffer-overflow"},
        [(TILES, "return k0 + i < k ? weight + (k0 + i) * row + n0 : nullptr;", "return weight + (k0 + i) * row + n0;")],
    ),
    Mutant(
        "rows numbered in 32 bits", "32-bit offset", {FAR: "Segmentation fault"},
        [(
            ROWS,
            "    return sum + row * stride[0];",
            "    return sum + static_cast<int>(row) * static_cast<int>(stride[0]);",
        )],
    ),
    Mutant(
        "columns taken as adjacent", "stride ignored", {STRIDES: ANY},
        [(TILES, "from && column < valid ? from[column * inner.stride]", "from && column < valid ? from[column]")],
    ),
    Mutant(
        "rows of any stride copied by 16 bytes", "alignment assumed", {STRIDES: "align"},
        [(
            HEADERS + "plan.cuh",
            "yes &= array.size[i] == 1 || array.stride[i] * element % 16 == 0;",
            "yes &= array.size[i] == 1 || array.stride[i] > 0;",
        )],
    ),
    Mutant(
        "float32 weights read as bfloat16", "dtypes mixed up", {MIXED: ANY},
        [(COMMON_PLAN, "if (array.kind == kind_of<T>() && aligned(array, sizeof(T)))", "if (aligned(array, sizeof(T)))")],
    ),
    Mutant(
        "last tile of columns left out", "tail skipped", {EXACT: OUTPUT},
        [(FWD, "      divide_up(d, kN) * parts,\n", "      d / kN * parts,\n")],
    ),
    Mutant(
        "last tiles of a bank not launched", "grid too small", {EXACT_BANK: OUTPUT},
        [(PLAN, "(p.groups.order ? p.groups.g + 2 : 0)", "(p.groups.order ? 1 : 0)")],
    ),
    Mutant(
        "at most 65535 tiles", "grid too small", {MANY: "nothing has written the end of"},
        [(
            PLAN,
            "return divide_up(p.m, tile_rows) + (p.groups.order ? p.groups.g + 2 : 0);",
            "return least<int64_t>(65535, divide_up(p.m, tile_rows) + (p.groups.order ? p.groups.g + 2 : 0));",
        )],
    ),
    Mutant(
        "tiles in the second dimension of the grid", "grid too large", {MANY: "CUDA takes no grid"},
        [
            (
                PLAN,
                "const dim3 grid(static_cast<unsigned>(tile_count(p, rows)));\n  if (grid.x == 0)",
                "const dim3 grid(1, static_cast<unsigned>(tile_count(p, rows)));\n  if (grid.y == 0)",
            ),
            (FWD, "find_tile(p.groups, blockIdx.x, BM)", "find_tile(p.groups, blockIdx.y, BM)"),
        ],
    ),
    Mutant(
        "no rows launched", "empty input", {EMPTY: "CUDA takes no grid"},
        [(COMMON_PLAN, "  if (blocks > 0) launch(kernel", "  launch(kernel")],
    ),
    Mutant(
        "launched on device 0", "wrong device", {HOST: "device 0 is current"},
        [(CALL, "  torch::stable::accelerator::DeviceGuard guard(index);\n", "")],
    ),
    Mutant(
        "last columns left out of tall tiles", "one tile of several", {PLAIN: ANY},
        [(FWD, "      divide_up(d, kN) * parts,\n", "      (BM == 64 ? d / kN : divide_up(d, kN)) * parts,\n")],
    ),
    Mutant(
        "relu by maximum", "NaN swallowed", {INFINITE: "spreads otherwise"},
        [(HEADERS + "activation.cuh", "case 0: return z < 0.f ? 0.f : z;", "case 0: return std::fmax(z, 0.f);")],
    ),
    Mutant(
        "padded ranks of an infinite row", "zero times infinity", {INFINITE: "spreads otherwise"},
        [
            (
                FWD,
                "at_first.live ? at_first.hidden(p.activation, z.x) : 0.f",
                "at_first.live ? at_first.hidden(p.activation, z.x) : z.x * 0.f",
            ),
            (
                FWD,
                "at_second.live ? at_second.hidden(p.activation, z.y) : 0.f",
                "at_second.live ? at_second.hidden(p.activation, z.y) : z.y * 0.f",
            ),
        ],
    ),
    Mutant(
        "residual times scale", "scale on the residual", {EXACT: OUTPUT},
        [(FWD, "        if (add) y += e;\n", "        if (add) y += at.scale * e;\n")],
    ),
    Mutant(
        "bias behind the activation", "bias after the activation", {EXACT: OUTPUT},
        [
            (FWD, "        z.x += at_first.bias, z.y += at_second.bias;\n", ""),
            (FWD, "at_first.hidden(p.activation, z.x)", "at_first.hidden(p.activation, z.x) + at_first.bias"),
            (FWD, "at_second.hidden(p.activation, z.y)", "at_second.hidden(p.activation, z.y) + at_second.bias"),
        ],
    ),
    Mutant(
        "slope without hidden_skip_weight", "missing term", {EXACT: "integers: x differs"},
        [(BWD, "(activate_gradient(activation, z) + h.at.skip)", "activate_gradient(activation, z)")],
    ),
    Mutant(
        "every adapter with the first biases", "wrong row of a bank", {EXACT_BANK: OUTPUT},
        [(ROWS, "const int64_t o = adapter * group + i * stride;", "const int64_t o = i * stride;")],
    ),
    Mutant(
        "no adapter taken for the first", "id -1 not honoured", {EXACT_BANK: OUTPUT},
        [(BANK, "return id == -1 ? g : id >= 0", "return id == -1 ? 0 : id >= 0")],
    ),
    Mutant(
        "sums of grad_z only for the biases", "gradient mask ignored", {ALONE: ANY + "|Fatal|Segmentation"},
        [(
            PLAN_BWD,
            "grad_z_sum = o.down_bias.data || o.norm_bias.data || (o.down_weight.data && p.norm_bias.data);",
            "grad_z_sum = o.down_bias.data || o.norm_bias.data;",
        )],
    ),
    Mutant(
        "planes of adapters without rows left unwritten", "uninitialised memory", {EXACT_BANK: "integers: .* differs"},
        [(
            GRADIENTS,
            "    if (c0 + c < p.d && r0 + j < p.r) out[",
            "    if (c0 + c < p.d && r0 + j < p.r && span.begin < span.end) out[",
        )],
    ),
    Mutant(
        "y written over x", "input overwritten", {LEFT_ALONE: "x was written to"},
        [(CU, "Tensor y = torch::stable::new_empty(x, x.sizes());", "Tensor y = x;")],
    ),
    Mutant(
        "operands of float32 products in 11 bits", "tf32 product", {EXACT_FLOAT32: OUTPUT},
        [(TILES, "v[3] = four.w;\n  }\n", "v[3] = four.w;\n  }\n  for (float& x : v) x = to_float(from_float<f16>(x));\n")],
    ),
    Mutant(
        "sums of grad_y in 16 bits", "sum in 16 bits", {ALONE_FLOAT32: GRAD.format("up_bias")},
        [(
            SUMS,
            "    sum.x += (part[0].x + part[1].x) + (part[2].x + part[3].x);\n",
            "    sum.x = to_float(from_float<bf16>(sum.x + (part[0].x + part[1].x) + (part[2].x + part[3].x)));\n",
        )],
    ),
    Mutant(
        "accumulator of the projection in 16 bits", "product in 16 bits", {ROUNDING: "rounding model"},
        [(
            TILES,
            "      if constexpr (SUM)\n        if (sums) mma",
            "      for (auto& blocks : acc)\n        for (auto& block : blocks)\n          for (float& v : block) v = "
            "to_float(from_float<T>(v));\n      if constexpr (SUM)\n        if (sums) mma",
        )],
    ),
    Mutant(
        "residual added to a rounded product", "residual added after rounding", {ROUNDING: "rounding model"},
        [(FWD, "        if (add) y += e;\n", "        if (add) y = to_float(from_float<T>(y)) + e;\n")],
    ),
    Mutant(
        "variance as a difference of squares", "cancellation", {LARGE_MEAN: "(l2|max) error"},
        [
            (
                FWD,
                "      const float v = to_float(x[c * p.x.inner.stride]) - mean;\n",
                "      const float v = to_float(x[c * p.x.inner.stride]);\n",
            ),
            (FWD, "1.f / sqrtf(square / p.d + p.norm_eps)", "1.f / sqrtf(square / p.d - mean * mean + p.norm_eps)"),
        ],
    ),
    Mutant(
        "blocks that write one sum", "race", {RACES: "data race"},
        [(BWD, "q.hidden_sums[(blockIdx.x * int64_t{2} + i / kN)", "q.hidden_sums[(0 * int64_t{2} + i / kN)")],
    ),
    Mutant(
        "no barrier of the warp that sorts", "race", {RACES: "data race"},
        [(
            BANK,
            "    const int64_t before = row < end ? count[adapter] : 0;\n    __syncwarp();\n",
            "    const int64_t before = row < end ? count[adapter] : 0;\n",
        )],
    ),
    Mutant(
        "instruction that waits for one copy less", "missing wait", {PTX: "unfinished cp.async|in flight"},
        [(HARDWARE, '"cp.async.wait_group %0;" ::"n"(GROUPS)', '"cp.async.wait_group %0;" ::"n"(GROUPS + 1)')],
    ),
    Mutant(
        "bfloat16 multiplied as float16", "wrong instruction", {PTX: ANY},
        [(HARDWARE, "m16n8k16.row.col.f32.bf16.bf16.f32", "m16n8k16.row.col.f32.f16.f16.f32")],
    ),
    Mutant(
        "eight blocks a multiprocessor", "spilled registers", {COMPILED: "bytes of spills"},
        [(
            GRADIENTS,
            "__launch_bounds__(kThreads, 3) bottleneck_bwd_weights_kernel",
            "__launch_bounds__(kThreads, 8) bottleneck_bwd_weights_kernel",
        )],
    ),
    Mutant(
        "tall tiles whatever their memory", "too much shared memory", {LARGEST_RANK: "shared"},
        [(PLAN, " && Block<T, 64>::bytes(r) <= device.shared_limit;", ";")],
    ),
)
