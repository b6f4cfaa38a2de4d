"""Errors planted in the CPU kernels of prefix_attention."""

from . import Mutant, Rung

CPU = "csrc/cpu/prefix_attention"
FORWARD, TILES = CPU + "_forward.h", CPU + "_tiles.h"
BACKWARD, BACKWARD_TILES = CPU + "_backward.h", CPU + "_backward_tiles.h"
AMX_FORWARD, AMX_BACKWARD, AMX_TILES = (f"{CPU}_amx_{part}.h" for part in ("forward", "backward", "tiles"))


def native(case, test="test_ops.py", select="test_matches_reference"):
    return Rung(
        f"tests/{test}", f"prefix_attention-native-{case}-float32 and {select}", plugins=("tests.mutants.extension_plugin",)
    )


def amx(case, test="test_stays_in_bounds"):
    """On a processor with AMX."""
    selected = f"prefix_attention-{case}-amx and {test}"
    return Rung("tests/test_cpu_sanitized.py", selected, plugins=("tests.mutants.objects_plugin",), target="amx")


SANITIZED = Rung(
    "tests/test_cpu_sanitized.py", "prefix_attention-everything-float32 and test_usual_target_stays_in_bounds",
    plugins=("tests.mutants.objects_plugin",),
)  # fmt: skip
OUTPUT = "output: (l2|max) error"
WRONG = f"output: not finite|{OUTPUT}"
SPREADS = native("everything", "test_ops_numerics.py", "nan_and_inf_spread")
GRAD, ANY_GRAD = "grad of {}: (l2|max) error", "grad of .*: (l2|max) error"

MUTANTS = (
    Mutant(
        "forward: a causal mask from the top left", "mask off by one", {native("continued"): OUTPUT},
        [(TILES, "least(p.t_k, l + p.t_k - p.t + 1) : p.t_k;", "least(p.t_k, l + 1) : p.t_k;")],
        fast=True,
    ),
    Mutant(
        "forward: sums of weights aren't scaled when the largest score grows", "missing term", {native("steep"): OUTPUT},
        [(FORWARD, "store(s.total + row * L, load<C>(s.total + row * L) * shrink);", "")],
    ),
    Mutant(
        "forward: the keys behind a tile's last count as keys", "mask off by one", {native("small"): OUTPUT},
        [(FORWARD, "bool ragged = n % L;", "bool ragged = false;")],
    ),
    Mutant(
        "forward: every head takes the first one's prefix", "wrong row of a bank", {native("small"): OUTPUT},
        [(FORWARD, "t.packed[0] == u.kv && t.packed[1] == index;", "t.packed[1] == index;")],
    ),
    Mutant(
        "forward: id -1 takes the first prefix", "id -1 not honoured", {native("bank-of-sequences"): OUTPUT},
        [(FORWARD, "index = p.prefix_of[u.i];", "index = most(0, p.prefix_of[u.i]);")],
    ),
    Mutant(
        "dropout of own keys begins behind the last prefix key", "mask off by one", {native("dropout"): OUTPUT},
        [(TILES, "{ return round_up(p.p, 8); }", "{ return p.p; }")],
    ),
    Mutant(
        "forward: the log of a row's weights without its largest score", "missing term",
        {native("odd"): GRAD.format("q")},
        [(FORWARD, "(s.top[row] + __builtin_log2(total))", "(__builtin_log2(total))")],
    ),
    Mutant(
        "forward: sums begin with what was there", "uninitialised memory", {SANITIZED: "output: not finite"},
        [(FORWARD, "memset(s.y, 0, rows * s.ld * sizeof(C));", "")],
    ),
    Mutant(
        "forward: a tile of values has a row more", "load out of bounds",
        {SANITIZED: "AddressSanitizer: (heap-buffer-overflow|unknown-crash)"},
        [(FORWARD, "pack_values<W>(p.prefix_v, index, u.kv, first, n, p.e, values);",
          "pack_values<W>(p.prefix_v, index, u.kv, first, n + 1, p.e, values);")],
    ),
    Mutant(
        "backward: the prefix's gradients from its last sequences alone", "missing term",
        {native("small"): GRAD.format("prefix_k")},
        [(BACKWARD, "total += load<C>(prefix_sums", "total = load<C>(prefix_sums")],
        fast=True,
    ),
    Mutant(
        "backward: a causal mask from the top left", "mask off by one", {native("continued"): ANY_GRAD},
        [(BACKWARD_TILES, "l + p.t_k - p.t - tile.first) : tile_keys;", "l - tile.first) : tile_keys;")],
    ),
    Mutant(
        "backward: a query sees the key after its last", "mask off by one", {native("odd"): ANY_GRAD},
        [(BACKWARD_TILES, "index <= static_cast<int>(s.limit + r)", "index <= static_cast<int>(s.limit + r + 1)")],
    ),
    Mutant(
        "backward: the last keys of a cut tile get nothing", "tail skipped", {native("odd"): ANY_GRAD},
        [(BACKWARD_TILES, "c < tile.n && c - s.limit < s.m;", "c + strip <= tile.n && c - s.limit < s.m;")],
    ),
    Mutant(
        "backward: sums of keys begin with those of the tile before", "uninitialised memory", {native("long"): ANY_GRAD},
        [(BACKWARD, "for (C* grad : {w.grad_k, w.grad_v}) memset(grad, 0, rows * width(p) * sizeof(C));", "")],
    ),
    Mutant(
        "backward: dropped weights have gradients", "missing term", {native("dropout"): GRAD.format("q")},
        [(BACKWARD_TILES, "(MODIFIED ? grad * factor : grad)", "grad")],
    ),
    Mutant(
        "backward: the gate's gradient times the gate", "missing term", {native("gate-of-zero"): GRAD.format("gate")},
        [(BACKWARD, "grad_gate[g] = total;", "grad_gate[g] = total * gate;")],
    ),
    Mutant(
        "backward: the prefix's part of grad_y * y with the own keys", "missing term", {native("gate"): GRAD.format("q")},
        [(BACKWARD, "w.own.delta[g * p.t + l] -= gate * delta[l];", "w.own.delta[g * p.t + l] -= 0;")],
    ),
    Mutant(
        "backward: the first prefix of a bank for all", "wrong row of a bank",
        {native("bank-of-sequences"): GRAD.format("q")},
        [(BACKWARD_TILES, "p.prefix_v, p.prefix_of[tile.i]);", "p.prefix_v, 0);")],
    ),
    Mutant(
        "backward: weights of a sum that is NaN are 0", "NaN swallowed", {SPREADS: "spreads otherwise"},
        [(BACKWARD_TILES, "const C nothing = lse == lse ? 0 : lse;", "const C nothing = 0;")],
    ),
    Mutant(
        "AMX forward: own keys lie over those of the prefix", "missing term", {amx("small"): WRONG},
        [(AMX_FORWARD, "t.rows + tile.prefix * ld, n - tile.prefix, ld);", "t.rows, n - tile.prefix, ld);")],
    ),
    Mutant(
        "AMX forward: the columns behind the last key count as keys", "mask off by one", {amx("small"): WRONG},
        [(AMX_FORWARD, "if (end < n) hide(end, n, scores);", "")],
    ),
    Mutant(
        "AMX forward: a causal mask without the prefix", "mask off by one", {amx("odd"): WRONG},
        [(AMX_FORWARD, "t.ends[r] = all.prefix + (own ?", "t.ends[r] = most(all.prefix, own ?")],
    ),
    Mutant(
        "AMX forward: a whole tile of the prefix is never packed", "uninitialised memory",
        {amx("wide-heads", "test_large_calls_stay_in_bounds"): WRONG},
        [(AMX_FORWARD, "if (!stays || !here) pack(", "if (!stays) pack(")],
    ),
    Mutant(
        "AMX forward: dropout of own keys is that of the tile's first column", "mask off by one",
        {amx("dropped", "test_large_calls_stay_in_bounds"): WRONG},
        [(AMX_FORWARD, "return t.factors + shift;", "return t.factors;")],
    ),
    Mutant(
        "AMX forward: a mask hides the keys of the prefix", "mask off by one", {amx("left-padding"): WRONG},
        [(AMX_FORWARD, "end - tile.prefix, scores + tile.prefix);", "end - tile.prefix, scores);")],
    ),
    Mutant(
        "AMX backward: queries see the key after their last", "mask off by one", {amx("odd"): ANY_GRAD},
        [(AMX_BACKWARD, "k < tile.n ? k - s.limit : tile_queries", "k < tile.n ? k - s.limit - 1 : tile_queries")],
    ),
    Mutant(
        "AMX: rows of a right operand in each other's place", "missing term", {amx("small"): WRONG},
        [(AMX_TILES, "l % block * 16;", "(l ^ 2) % block * 16;")],
    ),
)
