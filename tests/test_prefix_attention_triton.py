"""What the battery can't say of the Triton kernels of prefix_attention: values that a GPU can't check, and what is launched."""

import pytest
import torch

from fastadapt._leaf import INTERPRET
from fastadapt.ops.prefix_attention import _bwd, _fwd

from .gpuless import offline
from .specs.prefix_attention import EVERYTHING, SPEC, make

interpreted = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 runs the kernels")


def both(arguments):
    """Output, and gradients of all that has one for a ``grad_y`` of ones."""
    args = SPEC.leaf_args(arguments)
    y, lse = _fwd.launcher(*args)
    wanted = [isinstance(arguments.get(name), torch.Tensor) for name in SPEC.bwd_outputs]
    grads = _bwd.launcher(torch.ones_like(y), y, lse, *args[:-1], wanted)
    return {"y": y, **{name: grad for name, grad, want in zip(SPEC.bwd_outputs, grads, wanted) if want}}


@interpreted
def test_ids_outside_the_bank_give_nan_sequences_on_the_device():
    """Reading ids on a GPU would stall its stream, so the kernels mark such sequences and read nothing outside the bank."""
    arguments = SPEC.case("bank-with-gate").make(torch.float32, "cpu")  # ids 2, 0, -1, 2
    good = both(arguments)
    arguments["adapter_ids"] = torch.tensor([2, 3, -1, -2])
    bad = both(arguments)
    for name in ("y", "q", "k", "v"):
        assert bad[name][[1, 3]].isnan().all() and torch.equal(bad[name][[0, 2]], good[name][[0, 2]]), name
    assert all(bad[name].isfinite().all() and not bad[name][:2].any() for name in ("prefix_k", "prefix_v"))


@interpreted
def test_lengths_outside_the_keys_count_as_none_or_all():
    arguments = SPEC.case("key-lengths").make(torch.float32, "cpu")
    results = []
    for lengths in ([33, 0, 1, 20], [2**40, -(2**40), 1, 20]):
        arguments["key_lengths"] = torch.tensor(lengths)
        results.append(both(arguments))
    assert all(torch.equal(t, results[1][name]) for name, t in results[0].items())


def launched(wanted, **options):
    arguments = make(torch.bfloat16, "meta", **{"b": 2, "t": 300, "e": 64, "p": 40, **EVERYTHING, **options})
    args = SPEC.leaf_args(arguments)
    with offline.target(90), offline.captured() as launches:
        y, _ = _fwd.launcher(*args)
        _bwd.launcher(*SPEC.bwd_leaf_args(y, args, [name in wanted for name in SPEC.bwd_outputs]))
    return [(launch.kernel.fn.__name__[17:-7], launch) for launch in launches]


@compiled
def test_a_frozen_argument_launches_nothing_for_it():
    kernels = lambda *wanted, **options: [name for name, _ in launched(wanted, **options)][1:]  # noqa: E731
    assert kernels() == []
    assert kernels("q") == ["bwd_delta", "bwd_queries"]
    assert kernels("v") == ["bwd_keys"]
    assert kernels("prefix_v") == ["bwd_prefix", "bwd_reduce"]
    assert kernels("gate", gate="drawn") == ["bwd_delta"]
    assert kernels("prefix_k", "prefix_v", p=0) == ["bwd_delta"]


@compiled
def test_short_heads_share_a_tile():
    """A token that is decoded: the query heads of a key head are the rows of one tile."""
    (_, launch), *_ = launched((), t=1, t_k=300)
    assert launch.grid == (2 * 2,) and launch.kwargs["PACKED"]
