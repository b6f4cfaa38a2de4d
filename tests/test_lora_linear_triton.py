"""What the battery can't say of the Triton kernels of lora_linear: the mask to the bit, and what a frozen argument costs."""

import pytest
import torch
import triton
import triton.language as tl

from fastadapt._leaf import INTERPRET
from fastadapt.kernels._common import dropout_constants, dropout_keeps
from fastadapt.ops import dropout

from .gpuless import offline
from .specs.lora_linear import ALL, SPEC, make

interpreted = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
P, SEED = 0.3, 0x7123456789ABCDEF


@triton.jit
def keeps_kernel(rows_ptr, out_ptr, seed_ptr, threshold, start, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    keeps = dropout_keeps(tl.load(rows_ptr + i), start, seed_ptr, threshold, BLOCK_M, BLOCK_D)
    tl.store(out_ptr + i[:, None] * BLOCK_D + j[None, :], keeps)


@interpreted
@pytest.mark.parametrize("start", (0, 64, 2**31 - 64, 2**34))
def test_mask_of_any_row_and_column(start):
    rows = torch.cat([torch.arange(9), torch.tensor([2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**40 + 3, 2**62])])
    blocks, zero = start // 8 + torch.arange(8), torch.zeros((), dtype=torch.int64)
    words = dropout.philox((blocks + zero, rows[:, None] & 0xFFFFFFFF, rows[:, None] >> 32, zero), torch.tensor(SEED))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1).flatten(1)
    threshold, scale = dropout_constants(P)
    keeps = torch.empty(16, 64, dtype=torch.bool)
    keeps_kernel[(1,)](rows, keeps, torch.tensor([SEED]), threshold, start, BLOCK_M=16, BLOCK_D=64)
    assert torch.equal(keeps, halves >= dropout.threshold(P)) and scale == dropout.kept_scale(P)


@interpreted
def test_mask_of_every_kernel():
    """Identity matrices let the mask through, times the scale of what stays: forward, and both products of backward."""
    m = k = 136
    expected = dropout.kept(torch.tensor(SEED), m, k, P) * dropout.kept_scale(P)
    eye, ones, rest = torch.eye(k), torch.ones(m, k), (None, None, 1.0, P, torch.tensor(SEED), None)
    _, u, _ = SPEC.fwd.triton(ones, 0 * eye, None, eye, eye, *rest, False)
    assert torch.equal(u, expected.float())
    for grad_y, lora_a, lora_b, wanted in (
        (torch.ones(m, 1), torch.ones(1, k), torch.ones(1, 1), 0), (torch.eye(m), ones, torch.eye(m), 3)
    ):  # fmt: skip
        mask, u = [i == wanted for i in range(7)], torch.ones(m, len(lora_a))
        grads = SPEC.bwd.triton(grad_y, ones, u, None, 0 * ones[: len(lora_b)], None, lora_a, lora_b, *rest, mask)
        assert torch.equal(grads[wanted], expected.float())


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 runs the kernels")
@pytest.mark.parametrize(
    "r, name, kernels",
    [
        (16, "x", ["bwd_columns", "product"]),  # low ranks: t in planes, from the pass that grad_lora_b would take
        (16, "lora_a", ["bwd_columns", "bwd_columns", "bwd_reduce"]),
        (16, "lora_b", ["bwd_columns", "bwd_reduce"]),
        (64, "x", ["rank", "product"]),
        (64, "lora_a", ["rank", "bwd_columns", "bwd_reduce"]),
        (64, "bias", ["bwd_columns", "bwd_reduce"]),
        (64, "magnitude", ["bwd_columns", "bwd_reduce"]),
        (64, "weight", []),
    ],
)
def test_a_frozen_parameter_launches_nothing_for_it(r, name, kernels):
    args = SPEC.leaf_args(arguments := make(torch.bfloat16, "meta", shape=(4096, 1024), n=1024, r=r, **ALL))
    with offline.target(90), offline.captured() as launches:
        mask = [name == other for other in SPEC.bwd_outputs]
        SPEC.bwd.launcher(*SPEC.bwd_leaf_args(SPEC.output(arguments), args, mask))
    assert [launch.kernel.fn.__name__[12:-7] for launch in launches] == kernels
