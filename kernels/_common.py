"""What the Triton kernels of several ops share: activations, dropout, rows of strided tensors, tiles of a bank."""

import math
import re

import torch
import triton
import triton.language as tl

# KiB of shared memory that a program may use, by compute capability.
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
# Programs that fill the largest chips twice. The same everywhere, so that sums are split, and round, the same everywhere.
PROGRAMS = 264
# Before 3.7.1 Triton omits the fence between cp.async and wgmma on sm_90. Tiles under 64 rows use mma.sync, which needs none.
WGMMA = [int(n) for n in re.findall(r"\d+", triton.__version__)[:3]] >= [3, 7, 1]


@triton.jit
def tanh(z):
    """tanh of float32, to about one unit in the last place: exp alone would cancel near zero."""
    t = tl.exp(-2.0 * tl.abs(z))
    large = (1.0 - t) / (1.0 + t)
    q = z * z
    p = -5.895157651e-3 * q + 2.079597127e-2  # odd minimax polynomial on |z| < 0.6, relative error 3e-9
    p = ((p * q - 5.378383015e-2) * q + 1.333192413e-1) * q - 3.333329800e-1
    return tl.where(tl.abs(z) < 0.6, z + z * q * p, tl.where(z < 0, -large, large))


@triton.jit
def activation(z, CODE: tl.constexpr):
    """The activation of float32 ``z`` and its slope there; the one not used costs nothing. NaN passes as in PyTorch."""
    if CODE == 0:  # relu
        value = tl.where(z <= 0, 0.0, z)
        slope = tl.where(z <= 0, 0.0, 1.0)
    elif CODE == 1:  # gelu
        cdf = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        value = z * cdf
        slope = cdf + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    elif CODE == 2:  # gelu_tanh: 0.5 * (1 + tanh(u)) is s = sigmoid(2 * u); s * (1 - s) is t / (1 + t)^2, where nothing cancels
        q = z * z
        w = 1.5957691216057308 * z * (1.0 + 0.044715 * q)
        e = tl.exp(-w)
        value = z / (1.0 + e)
        t = tl.exp(-tl.abs(w))
        slope = 1.0 / (1.0 + e) + z * (t / ((1.0 + t) * (1.0 + t))) * (1.5957691216057308 * (1.0 + 0.134145 * q))
    elif CODE == 3:  # silu
        e = tl.exp(-z)
        value = z / (1.0 + e)
        t = tl.exp(-tl.abs(z))
        slope = 1.0 / (1.0 + e) + z * (t / ((1.0 + t) * (1.0 + t)))
    elif CODE == 4:  # tanh
        value = tanh(z)
        slope = 1.0 - value * value
    else:  # identity
        value = z
        slope = tl.full(z.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def bank_tile(starts_ptr, index, n_groups, size, GROUPS: tl.constexpr):
    """The ``index``-th tile when each group is cut into tiles of ``size`` positions: its group and its first and last position.

    ``starts_ptr`` holds n_groups + 1 ascending positions. A tile past the last one is empty.
    """
    groups = tl.arange(0, GROUPS)
    valid = groups < n_groups
    first = tl.load(starts_ptr + groups, mask=valid, other=0)
    last = tl.load(starts_ptr + 1 + groups, mask=valid, other=0)
    tiles = (last - first + size - 1) // size
    before = tl.cumsum(tiles, 0) <= index
    group = tl.sum(before.to(tl.int64), 0)
    here = groups == group
    start = tl.sum(tl.where(here, first, 0), 0) + (index - tl.sum(tl.where(before, tiles, 0), 0)) * size
    return group, start, tl.sum(tl.where(here, last, 0), 0)


@triton.jit
def bank_tiles(starts_ptr, group, n_groups, size, GROUPS: tl.constexpr):
    """Numbers of the first tile of ``group`` and of the tile after its last one, as ``bank_tile`` counts them."""
    groups = tl.arange(0, GROUPS)
    valid = groups < n_groups
    first = tl.load(starts_ptr + groups, mask=valid, other=0)
    last = tl.load(starts_ptr + 1 + groups, mask=valid, other=0)
    tiles = (last - first + size - 1) // size
    begin = tl.sum(tl.where(groups < group, tiles, 0), 0)
    return begin, begin + tl.sum(tl.where(groups == group, tiles, 0), 0)


@triton.jit
def row_offsets(rows, inside, table_ptr, stride):
    """Where ``rows`` of a tensor begin, in elements, as described by ``rows_of``."""
    if table_ptr is not None:
        rows = tl.load(table_ptr + rows, mask=inside, other=0)
    return rows * stride


@triton.jit
def moments(x_ptr, offsets, inside, stride_d, width, d, eps, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mean and reciprocal deviation of rows of x in one pass: the moments of each tile are merged into the running ones."""
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, width, BLOCK_D):
        cols = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = inside[:, None] & (cols < d)[None, :]
        tile = tl.load(x_ptr + offsets[:, None] + cols[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
        seen = (start + tl.zeros((1,), tl.int32)).to(tl.float32)
        n = tl.minimum(d - seen, BLOCK_D * 1.0)
        tile_mean = tl.sum(tile, 1) / n
        gap = tile - tile_mean[:, None]
        delta = tile_mean - mean
        mean += delta * (n / (seen + n))
        # Masked last: a product fused with the sum over lanes would round differently in each lane of a row.
        squares += tl.sum(tl.where(mask, gap * gap, 0.0), 1) + delta * delta * (seen * n / (seen + n))
    return mean, tl.rsqrt(squares / d + eps)


@triton.jit
def standardised(tile, mean, rstd):
    return (tile.to(tl.float32) - mean[:, None]) * rstd[:, None]


@triton.jit
def dropout_keeps(rows, start, seed_ptr, threshold, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of ``rows`` in BLOCK_D columns from ``start``, a multiple of 8, dropout keeps. A counter of Philox gives
    16 bits to each of 8 adjacent columns, as fastadapt/ops/dropout.py says."""
    blocks = (start // 8 + tl.arange(0, BLOCK_D // 8)).to(tl.uint32)[None, :]
    low, high = (rows & 0xFFFFFFFF).to(tl.uint32)[:, None], (rows >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), blocks, low, high, tl.zeros_like(high), 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last dimension becomes the lowest bit of the column
    halves = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    return tl.reshape(halves, (BLOCK_M, BLOCK_D)) >= threshold


@triton.jit
def project(
    ptr, offsets, inside, stride_d, weight_ptr, weight_stride_d, weight_stride_r, width, mean, rstd, norm_weight_ptr,
    norm_bias_ptr, scale_ptr, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, rows=None, seed_ptr=None, threshold=0, weight_stride_g=None, first=0, last=0,
):  # fmt: skip
    """Rows times a (width, R) weight: [BLOCK_M, BLOCK_R] in float32. On the way they are normalised, or scaled per channel, or
    lose what dropout drops. With ``weight_stride_g`` the weights of a bank stand side by side and the columns ``first`` to
    ``last`` are taken."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    present, rank_offsets = ranks < R, ranks * weight_stride_r
    if weight_stride_g is not None:
        ranks += first
        present, rank_offsets = ranks < last, ranks // R * weight_stride_g + ranks % R * weight_stride_r
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, width, BLOCK_D):
        cols = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        valid = cols < width
        tile = tl.load(ptr + offsets[:, None] + cols[None, :] * stride_d, mask=inside[:, None] & valid[None, :], other=0.0)
        if norm_weight_ptr is not None:
            normed = standardised(tile, mean, rstd)
            normed *= tl.load(norm_weight_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]
            if norm_bias_ptr is not None:
                normed += tl.load(norm_bias_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]
            tile = normed.to(dtype)
        if scale_ptr is not None:
            tile = (tile.to(tl.float32) * tl.load(scale_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]).to(dtype)
        if seed_ptr is not None:
            tile = tl.where(dropout_keeps(rows, start, seed_ptr, threshold, BLOCK_M, BLOCK_D), tile, 0.0)
        weight_ptrs = weight_ptr + cols[:, None] * weight_stride_d + rank_offsets[None, :]
        weight = tl.load(weight_ptrs, mask=valid[:, None] & present[None, :], other=0.0).to(dtype)  # [BLOCK_D, BLOCK_R]
        acc = tl.dot(tile, weight, acc, input_precision=PRECISION)
    if R != BLOCK_R:  # the padding of an infinite row is 0 * inf
        acc = tl.where(present[None, :], acc, 0.0)
    return acc


@triton.jit
def rank_vector(ptr, limit, BLOCK_R: tl.constexpr):
    ranks = tl.arange(0, BLOCK_R)
    return tl.load(ptr + ranks, mask=ranks < limit, other=0.0).to(tl.float32)[None, :]


@triton.jit
def hidden_layer(z, hidden_skip_ptr, R: tl.constexpr, BLOCK_R: tl.constexpr, ACTIVATION: tl.constexpr):
    """The hidden activations of float32 ``z`` and their slope."""
    value, slope = activation(z, ACTIVATION)
    if hidden_skip_ptr is not None:
        skip = rank_vector(hidden_skip_ptr, R, BLOCK_R)
        value += skip * z
        slope += skip
    return value, slope


@triton.jit
def sum_planes(ptr, first, last, stride, offsets, mask):
    total = tl.zeros(offsets.shape, tl.float32)
    for i in range(first, last):
        total += tl.load(ptr + tl.cast(i, tl.int64) * stride + offsets, mask=mask, other=0.0)
    return total


class Tiles(dict):
    """The tiles that a launcher chooses among, by a key. Every tile is right for every call of its key."""

    def pick(self, key, suits):
        """The first tile of ``key`` that suits the call, or the last one."""
        return next((tile for tile in self[key] if suits(tile)), self[key][-1])


def shared_memory(x: torch.Tensor) -> tuple[int, int]:
    """Bytes of shared memory that a program may fill with tiles on the device of ``x``, and the lanes of a warp."""
    if x.device.type == "cpu":
        arch, lanes = 90, 32
    else:
        target = triton.runtime.driver.active.get_current_target()
        arch, lanes = target.arch, target.warp_size
    return (_SHARED.get(arch, 64) - 16) * 1024, lanes  # the compiler moves other tiles through shared memory too


def precision(x: torch.Tensor) -> str:
    """float32 products are exact unless the user let PyTorch's own be rounded to TensorFloat-32."""
    return "tf32" if x.device.type != "cpu" and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def dense(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Parameters as the kernels read them; only a strided one is copied."""
    return [None if t is None else t.contiguous() for t in tensors]


def dropout_constants(p: float) -> tuple[int, float]:
    """Of 65536 how many elements are dropped, and what the others grow by: see fastadapt/ops/dropout.py."""
    threshold = round(p * 65536)
    return threshold, 65536 / (65536 - threshold)


def rows_of(t: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """``(table, stride)``: with its leading dims flattened, row i of ``t`` begins at ``table[i] * stride``; no table means i.

    The table (int64, one entry a row) replaces a copy of ``t`` when its leading dims can't be flattened in place.
    """
    dims = [(n, s) for n, s in zip(t.shape[:-1], t.stride()[:-1]) if n != 1]
    if all(outer == n * inner for (_, outer), (n, inner) in zip(dims, dims[1:])):
        return None, dims[-1][1] if dims else 0
    stride = math.gcd(*(s for _, s in dims))  # keeps the alignment of rows visible to the compiler
    table = torch.zeros((), dtype=torch.int64, device=t.device)
    for n, s in dims:
        table = table[..., None] + torch.arange(n, device=t.device) * (s // stride)
    return table.reshape(-1), stride


def bank_rows(adapter_ids: torch.Tensor, x: torch.Tensor, g: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(order, starts)``: the rows of ``x`` sorted by adapter, and where each adapter's rows begin in that order.

    Group g holds the rows without an adapter (id -1) and group g + 1 those with an id outside the bank. Nothing waits for the
    device.
    """
    ids = adapter_ids.reshape(adapter_ids.shape + (1,) * (x.dim() - 1 - adapter_ids.dim())).expand(x.shape[:-1]).reshape(-1)
    ids = ids.to(torch.int64)
    group = torch.where((ids >= 0) & (ids < g), ids, torch.where(ids == -1, g, g + 1)).to(torch.int32)
    group, order = group.sort(stable=True)
    return order, torch.searchsorted(group, torch.arange(g + 3, dtype=torch.int32, device=x.device))
