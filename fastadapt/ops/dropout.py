"""Dropout as a function of (seed, row, column): no mask is stored, and every kernel draws the same one.

Element ``(i, j)`` of an ``(m, k)`` matrix takes 16 bits of ``philox(counter=(j // 8, i mod 2**32, i // 2**32, 0), key=seed)``:
of the four 32-bit words, word ``j % 8 // 2``, its low half if ``j`` is even. It is dropped if they are below
``threshold(p)``. Seven rounds are the fewest that pass the tests of BigCrush. Source: Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3".
"""

import torch
from torch import Tensor

from .._check import same_device, tensor

ROUNDS = 7
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Of 65536: how often an element is dropped, as near to ``p`` as 16 bits come."""
    return round(p * 65536)


# A greater rate leaves nothing.
LARGEST = 65535 / 65536


def kept_scale(p: float) -> float:
    """What keeps the expectation: the inverse of the probability that an element stays."""
    return 65536 / (65536 - threshold(p))


def check(p: float, seed: Tensor | None, x: Tensor, like: str = "x") -> None:
    """``p`` must be a probability that leaves something, ``seed``, if given, a tensor beside ``x``, called ``like``."""
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"dropout_p must be a number in [0, 1), got {p!r}")
    if threshold(p) > 65535:
        raise ValueError(f"dropout_p must leave at least one element in 65536, got {p!r}")
    if seed is not None:
        tensor("dropout_seed", seed)
        if seed.dtype != torch.int64 or seed.dim():
            raise ValueError(f"dropout_seed must be a 0-d int64 tensor, got {tuple(seed.shape)} {seed.dtype}")
        same_device("dropout_seed", seed, x, like)


def draw_seed(device: torch.device) -> Tensor:
    """A 0-d int64 tensor from torch's generator of the device."""
    return torch.randint(2**62, (), dtype=torch.int64, device=device)


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two 32-bit numbers. The signed product wraps to the bits of the unsigned one."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Philox4x32 with 7 rounds; words are int64 tensors with values below ``2**32``."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, 0xD2511F53)
        high1, low1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def kept(seed: Tensor, m: int, k: int, p: float) -> Tensor:
    """Which elements of an ``(m, k)`` matrix stay: bool, ``(m, k)``."""
    rows = torch.arange(m, device=seed.device)[:, None]
    blocks = torch.arange((k + 7) // 8, device=seed.device)[None]
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words = philox((blocks + zero, rows & _LOW, rows >> 32, zero), seed)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    return halves.flatten(1)[:, :k] >= threshold(p)
