"""Errors planted in the CUDA kernels of prefix_attention."""

from . import Mutant, Rung
from .bottleneck_cuda import KEPT, ONLY_BFLOAT16, ONLY_FLOAT32

HEADERS = "csrc/cuda/"
TILES, FWD = HEADERS + "prefix_attention_tiles.cuh", HEADERS + "prefix_attention.cuh"
PLAN = HEADERS + "prefix_attention_plan.cuh"
PAIRS, GRADIENTS = HEADERS + "prefix_attention_backward.cuh", HEADERS + "prefix_attention_gradients.cuh"
BACKWARD = HEADERS + "prefix_attention_plan_backward.cuh"


def emulated(select, tests="tests/test_cuda_emulated.py", edits=ONLY_BFLOAT16):
    return Rung(tests, f"prefix_attention-{select}", plugins=KEPT, edits=edits)


def matches(case, dtype="bfloat16"):
    edits = ONLY_FLOAT32 if dtype == "float32" else ONLY_BFLOAT16
    return emulated(f"{case}-{dtype} and test_matches_reference", edits=edits)


STRIDES = emulated("everything-bfloat16 and test_any_strides")
FAR = Rung(
    "tests/test_far_rows.py", "test_emulated_cuda and not last_blocks and prefix_attention", plugins=KEPT, edits=ONLY_BFLOAT16
)
RACES = emulated("everything-bfloat16-thread and test_sanitizer_reports_nothing")
ADDRESSES = emulated("odd-bfloat16 and test_no_access_out_of_bounds")
ALONE = emulated("gated-with-everything-bfloat16 and test_one_gradient_alone")
OUTPUT = "output: (l2|max) error|output: not finite"
ERROR = "grad of {0}: (l2|max) error|grad of {0}: not finite"

MUTANTS = (
    Mutant(
        "causal mask from the top left", "mask off by one", {matches("continued"): OUTPUT},
        [(TILES, "const int end = token + t_k - t + 1;", "const int end = token + 1;")],
        fast=True,
    ),
    Mutant(
        "own keys begin in the dropout matrix where the prefix ends", "mask off by one", {matches("dropout"): OUTPUT},
        [(PLAN, "p.own_column = round_up(p.p, 8)", "p.own_column = p.p / 8 * 8")],
    ),
    Mutant(
        "causal bound of the first row of a tile", "tail skipped", {matches("long"): OUTPUT},
        [(FWD, "own_end = p.bound(last_row / p.group, own_keys);", "own_end = p.bound(row0 / p.group, own_keys);")],
    ),
    Mutant(
        "whole tiles by the last row's bound", "mask off by one", {matches("long", "float32"): OUTPUT},
        [(FWD, "least_bound = p.bound(row0 / p.group, own_keys);", "least_bound = p.bound(last_row / p.group, own_keys);")],
    ),
    Mutant(
        "zeros beyond the prefix take part", "tail of the product unmasked", {matches("small"): OUTPUT},
        [(FWD, "!masked && begin + width <= (own ? least_bound : prefix.keys)",
          "!masked && (!own || begin + width <= least_bound)")],
    ),
    Mutant(
        "one tile of the prefix too few", "one tile of several", {matches("long"): OUTPUT},
        [(FWD, "static_cast<int>(divide_up(prefix.keys, Tile::kKeys));",
          "static_cast<int>(divide_up(prefix.keys, Tile::kKeys) > 1 ? prefix.keys / Tile::kKeys : 1);")],
    ),
    Mutant(
        "sum not rescaled by a later tile", "missing term", {matches("long"): OUTPUT},
        [(FWD, "sum[half] = sum[half] * decay[half] + part", "sum[half] = sum[half] + part")],
    ),
    Mutant(
        "prefix without its gate", "missing term", {matches("gate"): OUTPUT},
        [(FWD, "factor[half] = gated ? p.gate.at<T>(query.head) : 1.f;", "factor[half] = 1.f;")],
    ),
    Mutant(
        "weights of the prefix divided by the sum of one tile", "one tile of several",
        {matches("gate-of-a-long-prefix"): OUTPUT},
        [(FWD, "if (gated && step == second_pass) close(1, false);",
          "if (gated && step == second_pass - (prefix_tiles > 1)) close(1, false);")],
    ),
    Mutant(
        "key head of another group", "wrong row of a bank", {matches("grouped"): OUTPUT},
        [(TILES, "head(key_head * p.group + row % p.group)", "head(row % p.group * p.h_kv + key_head)")],
    ),
    Mutant(
        "prefix of the first sequence", "wrong row of a bank", {matches("each"): OUTPUT},
        [(TILES, "index(i), keys(p.p)", "index(0), keys(p.p)")],
    ),
    Mutant(
        "sequences without a prefix get the first", "id -1 not honoured", {matches("bank-of-sequences"): OUTPUT},
        [(TILES, "if (index < 0 || outside) keys = 0;", "if (index < 0) index = 0;")],
    ),
    Mutant(
        "inner stride of a float32 prefix", "stride ignored", {STRIDES: OUTPUT},
        [(TILES, "from[row * heads.token + column * heads.inner.stride]", "from[row * heads.token + column]")],
    ),
    Mutant(
        "mask of the first query", "stride ignored", {matches("mask-of-pairs"): OUTPUT},
        [(TILES, "return i * sequence + of_head * head + of_token * token;", "return i * sequence + of_head * head;")],
    ),
    Mutant(
        "sequences begin in 32 bits", "32-bit offset", {FAR: "(l2|max) error|not finite|Segmentation fault"},
        [(TILES, "static_cast<const T*>(data) + i * sequence +",
          "static_cast<const T*>(data) + static_cast<int>(i * sequence) +")],
    ),
    Mutant(
        "-inf less -inf where nothing is seen", "NaN swallowed", {matches("more-queries-without-prefix"): "not finite"},
        [(TILES, "return top == -INFINITY ? 0.f : top;", "return top;")],
    ),
    Mutant(
        "sum of a row without keys", "cancellation", {matches("key-lengths-without-prefix"): "not finite"},
        [(FWD, "total == 0.f ? 0.f : 1.f / total", "1.f / total")],
    ),
    Mutant(
        "no shift by the largest score", "cancellation", {matches("steep"): "not finite|" + OUTPUT},
        [(FWD, "const float shift = shift_of(high);", "const float shift = 0.f;")],
    ),
    Mutant(
        "no barrier before keys are used", "missing barrier", {RACES: "data race"},
        [(FWD, "    __syncthreads();  // the keys are there", "    // the keys are there")],
    ),
    Mutant(
        "no barrier before values are used", "missing barrier", {RACES: "data race"},
        [(FWD, "    __syncthreads();  // the values are there", "    // the values are there")],
    ),
    Mutant(
        "no wait for the values", "missing wait", {matches("everything"): "asynchronous copies in flight"},
        [(FWD, "    cp_async_wait<0>();\n    __syncthreads();  // the values", "    __syncthreads();  // the values")],
    ),
    Mutant(
        "one key too many loaded", "load out of bounds", {ADDRESSES: "heap-buffer-overflow"},
        [(TILES, "return begin + row < end ? from + row * heads.token : nullptr;",
          "return begin + row <= end ? from + row * heads.token : nullptr;")],
    ),
    Mutant(
        "delta of the own keys with that of the prefix", "missing term", {matches("gate"): ERROR.format("k")},
        [(PAIRS, "dots[row] - p.a.gate.at<T>(query.head) * of_prefix", "dots[row]")],
        fast=True,
    ),
    Mutant(
        "gradients of the prefix without its gate", "missing term", {matches("gate"): ERROR.format("prefix_v")},
        [(PAIRS, "!FOR_DELTA && prefix && a.gate.data ? a.gate.at<T>(query.head) : 1.f", "1.f")],
    ),
    Mutant(
        "dropped weights pass a gradient", "missing term", {matches("dropout"): ERROR.format("q")},
        [(PAIRS, "if (a.dropout.threshold) product = stays ?", "if (a.dropout.threshold) product = true ?")],
    ),
    Mutant(
        "gradient of values without the scale of dropout", "missing term", {matches("dropout"): ERROR.format("v")},
        [(GRADIENTS, "store(of_values, q.v, q.prefix_v, a.dropout.threshold ? a.dropout.scale : 1.f);",
          "store(of_values, q.v, q.prefix_v, 1.f);")],
    ),
    Mutant(
        "weights where nothing is seen", "zero times infinity",
        {matches("more-queries-without-prefix"): ERROR.format("(k|v)")},
        [(PAIRS, "if (lse != -INFINITY) seen =", "seen =")],
    ),
    Mutant(
        "keys of the causal diagonal meet the next rows", "tail skipped", {matches("long"): ERROR.format("k")},
        [(GRADIENTS, "least(a.first_token(key), a.t) * a.group / kSide;",
          "static_cast<int>(divide_up(least(a.first_token(key), a.t) * a.group + 1, kSide));")],
    ),
    Mutant(
        "delta of the first columns", "tail skipped", {matches("odd", "float32"): ERROR.format("q")},
        [(PAIRS, "while (lanes * 8 < p.a.e)", "while (lanes * 16 <= p.a.e)")],
    ),
    Mutant(
        "splits share a plane", "race", {matches("long-unmasked", "float32"): ERROR.format("prefix_k")},
        [(GRADIENTS, "plane = ((split * q.prefixes", "plane = ((0 * q.prefixes")],
    ),
    Mutant(
        "first plane alone", "one tile of several", {matches("long-unmasked", "float32"): ERROR.format("prefix_v")},
        [(GRADIENTS, "add_planes(planes + at, p.splits, p.size)", "add_planes(planes + at, 1, p.size)")],
    ),
    Mutant(
        "sequences of a bank in their own order", "wrong row of a bank",
        {matches("bank-of-sequences", "float32"): ERROR.format("prefix_k")},
        [(GRADIENTS, "walk.order = q.groups.order", "walk.order = nullptr")],
    ),
    Mutant(
        "delta for the queries alone", "gradient mask ignored", {ALONE: ERROR.format("(k|prefix_k|gate)")},
        [(BACKWARD, "if (o.q.data || o.k.data || o.prefix_k.data || o.gate.data) {", "if (o.q.data) {")],
    ),
)  # fmt: skip
