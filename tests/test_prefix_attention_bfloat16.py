"""prefix_attention in bfloat16 on a CPU, which multiplies tiles of prefix and own keys side by side where it has AMX."""

from dataclasses import replace

import pytest
import torch

from fastadapt.ops.prefix_attention import prefix_attention

from . import numerics
from .battery import check, on_cpu, run
from .specs.prefix_attention import SPEC, case
from .test_prefix_attention import HIDING, concatenated, hiding, run_masked

pytestmark = on_cpu
BF16 = torch.bfloat16

# Tiles of 256 keys: the first one ends within own keys, a whole one is of the prefix, queries of several heads share rows.
TILES = (
    case("dropped-behind-a-prefix", b=2, h=2, t=40, t_k=300, e=40, p=21, causal=True, dropout=0.2, lengths=[300, 240]),
    case("masked-behind-a-prefix", b=2, h=4, h_kv=2, t=20, t_k=300, e=24, p=21, causal=True, mask=(2, 1, 20, 300)),
    case("biased-behind-a-prefix", b=1, h=2, t=20, t_k=300, e=72, p=300, bias=(2, 1, 300)),
    case("prefixes-of-a-bank", b=5, h=4, h_kv=2, t=9, t_k=30, e=16, p=270, g=2, ids=[1, 0, 1, -1, 1], causal=True),
    case("gate-of-each", b=2, h=2, t=40, t_k=280, e=16, p=260, gate="drawn", each=True, parameters=torch.float32),
    case("downwards", b=2, h=2, t=40, e=16, p=5, causal=True, scale=-0.4),
    case("flat", b=2, h=2, t=40, e=16, p=5, causal=True, scale=0.0),
)
tiles = pytest.mark.parametrize("chosen", TILES, ids=lambda chosen: chosen.name)


@tiles
def test_tiles_match_the_reference(chosen):
    check(SPEC, "native", lambda: chosen.make(BF16, "cpu"))


@pytest.mark.parametrize("chosen", [
    *TILES[:2], TILES[3], SPEC.case("bank-with-everything"), case("batch", b=40, h=2, t=40, e=16, p=40, causal=True),
], ids=lambda chosen: chosen.name)  # fmt: skip
def test_bits_do_not_depend_on_the_number_of_threads(chosen):
    numerics.threads_change_no_bit(SPEC, chosen, BF16)


@tiles
def test_what_is_wanted_of_backward_changes_no_bit(chosen):
    numerics.frozen_arguments_change_no_bit(SPEC, "native", chosen, BF16, every=False)


def test_equals_pytorchs_attention_over_concatenated_keys():
    made = case("grouped", b=2, h=4, h_kv=2, t=40, t_k=270, e=16, p=20, causal=True, lengths=[270, 33])
    check(replace(SPEC, reference=concatenated), "native", lambda: made.make(BF16, "cpu"))


@pytest.mark.parametrize("how", HIDING)
def test_a_query_that_sees_nothing_gives_zero_and_takes_none(how):
    for options in ({"p": 0}, {"g": 2, "ids": [-1, -1]}, {"p": 0, "gate": "drawn"}):
        arguments, dead = hiding(how, **options)
        arguments = {n: t.to(BF16) if torch.is_tensor(t) and t.is_floating_point() else t for n, t in arguments.items()}
        result = run_masked(arguments, torch.randn_like(arguments["q"]), "native")
        assert all(t.isfinite().all() for t in result.values())
        assert not result["y"][:, :, :dead].any() and not result["q"][:, :, :dead].any()


def test_keys_behind_the_lengths_are_never_looked_at():
    """Nor does a sequence without a prefix look at any."""
    good = case("lengths", b=3, h=2, t=40, t_k=300, e=40, p=21, g=2, ids=[0, 1, -1], lengths=[300, 33, 250]).make(BF16, "cpu")
    bad = {**good, "prefix_k": good["prefix_k"].clone(), "prefix_v": good["prefix_v"].clone()}
    for name in ("k", "v"):
        behind = torch.arange(300) >= good["key_lengths"][:, None, None]
        bad[name] = good[name].masked_fill(behind[..., None], torch.nan)
        bad[f"prefix_{name}"][1] = torch.inf
    expected, actual = (run(prefix_attention, a, backend="native") for a in (good, bad))
    for name in ("y", "q", "k", "v"):
        assert torch.equal(actual[name][::2], expected[name][::2]), name
    assert not actual["y"][1].isfinite().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "prefix_k", "prefix_v"])
def test_nan_and_infinity_reach_the_queries_that_see_them(name, bad):
    arguments = case("open", b=2, h=2, t=40, t_k=280, e=40, p=21).make(BF16, "cpu")
    rows = arguments[name].view(-1, *arguments[name].shape[-2:])
    rows[1, 20, 3] = bad
    y = prefix_attention(**arguments, backend="native")
    plain = SPEC.reference(**{n: t.double() if torch.is_tensor(t) else t for n, t in arguments.items()})
    assert torch.equal(y.isfinite(), plain.isfinite())
