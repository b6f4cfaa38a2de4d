"""The mask of dropout: its rate, and that rows, columns, layers and steps have nothing to do with each other.

The seeds are fixed, so a test passes always or never; the bounds are five standard deviations of independent draws.
"""

import math

import pytest
import torch

from fastadapt import prefix_attention
from fastadapt.ops.dropout import draw_seed, kept, kept_scale, threshold

M, K = 1024, 768
SEED = torch.tensor(0x0123456789ABCDEF)


def dropped(p, seed=SEED):
    """1 where an element is dropped, less the probability, over the standard deviation: mean 0, variance 1."""
    q = threshold(p) / 65536
    return ((~kept(seed, M, K, p)).double() - q) / math.sqrt(q * (1 - q))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999, 20 / 65536])
def test_rate(p):
    """Of all elements; and rows, columns and places in a block of eight differ among themselves as much as chance has it."""
    z = dropped(p)
    assert abs(z.mean()) <= 5 / math.sqrt(z.numel())
    for groups in (z, z.T, z.view(M, K // 8, 8).permute(2, 0, 1).reshape(8, -1)):
        sums = groups.sum(1) / math.sqrt(groups.shape[1])
        kurtosis = (z**4).mean().item() / groups.shape[1] + 3  # of a sum; the variance of its square follows
        assert abs((sums**2).mean() - 1) <= 5 * math.sqrt((kurtosis - 1) / len(sums))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rows_and_columns_are_independent(p):
    z = dropped(p)
    for rows in range(4):
        for columns in (0, 1, 2, 3, 7, 8, 9, 16, 64):
            if rows or columns:
                product = z[rows:, columns:] * z[: M - rows, : K - columns]
                assert abs(product.mean()) <= 5 / math.sqrt(product.numel()), (rows, columns)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_layers_and_steps_are_independent(p):
    """Each call draws a seed. Seeds that differ in one bit give other masks too."""
    torch.manual_seed(0)
    seeds = [draw_seed(torch.device("cpu")) for _ in range(8)] + [SEED ^ (1 << bit) for bit in (0, 1, 31, 32, 61)] + [SEED]
    masks = torch.stack([dropped(p, seed) for seed in seeds]).flatten(1)
    correlations = masks @ masks.T / M / K - torch.eye(len(seeds))
    assert correlations.abs().max() <= 5.5 / math.sqrt(M * K) + abs((masks**2).mean() - 1)


def test_ends():
    """The probability comes in steps of 1 / 65536; what stays grows by the inverse of the probability to stay."""
    assert kept(SEED, M, K, 0.4 / 65536).all() and kept_scale(0.4 / 65536) == 1
    assert [threshold(p) for p in (0.1, 0.5, 0.999, 65535 / 65536)] == [6554, 32768, 65470, 65535]
    assert kept_scale(0.999) == 65536 / 66 and kept_scale(0.5) == 2
    mask = kept(SEED, M, K, 65535 / 65536)
    assert abs(mask.sum() - 12) <= 5 * math.sqrt(12)


def test_a_mask_is_part_of_every_larger_one():
    """An element depends on its row and column alone."""
    assert torch.equal(kept(SEED, 5, 13, 0.3), kept(SEED, 40, 70, 0.3)[:5, :13])


def test_torch_manual_seed_fixes_the_seed():
    torch.manual_seed(5)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert draw_seed(torch.device("cpu")) == first != second


def test_what_stays_grows_by_a_number_of_float64():
    """The weight of a query's one key is 1, so that its output is 0 or what the weight has grown to."""
    q, k = torch.zeros(1, 1, 40, 8, dtype=torch.float64), torch.ones(1, 1, 1, 8, dtype=torch.float64)
    y = prefix_attention(q, k, k, k[0, :, :0], k[0, :, :0], dropout_p=0.1, dropout_seed=SEED, backend="reference")
    assert set(y.unique().tolist()) == {0.0, kept_scale(0.1)}
