"""Triton kernels of lora_linear's sums over rows: columns in planes, then an ordered sum of the planes."""

import triton
import triton.language as tl

from ._common import bank_tile, bank_tiles, dropout_keeps, row_offsets, sum_planes


@triton.jit
def rank_tile(ptr, rows, inside, ranks, diagonal_ptr, scale_value, R: tl.constexpr):
    """Rows of a float32 (m, R) tensor times ``c = scale * diagonal``."""
    tile = tl.load(ptr + rows[:, None] * R + ranks[None, :], mask=inside[:, None] & (ranks < R)[None, :], other=0.0)
    if diagonal_ptr is not None:
        c = scale_value * tl.load(diagonal_ptr + ranks, mask=ranks < R, other=0.0).to(tl.float32)
        return tile * c[None, :]
    return tile * scale_value


@triton.jit
def lora_linear_bwd_columns_kernel(
    left_ptr, left_table_ptr, left_stride_m, left_stride_d, gain_ptr, z_ptr, rank_ptr, diagonal_ptr, scale_value, seed_ptr,
    threshold, weight_ptr, weight_stride_d, weight_stride_r, planes_ptr, sums_ptr, dots_ptr, t_planes_ptr,
    order_ptr, starts_ptr, m, d, g, chunk, R: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_D columns of ``left`` over one chunk of its rows, in a bank of those of one adapter: the product of
    ``dropout(left * gain).T`` with ``rank * c``, the sums of ``left`` and its dot products with ``z`` go to the plane of that
    chunk, the products of its rows with ``weight`` to the plane of those columns."""
    dtype: tl.constexpr = left_ptr.dtype.element_ty
    tiles_d = tl.cdiv(d, BLOCK_D)
    index, tile = (tl.program_id(0) // tiles_d).to(tl.int64), (tl.program_id(0) % tiles_d).to(tl.int64)
    start, end = index * chunk, tl.minimum((index + 1) * chunk, m)
    cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = cols < d
    if GROUPS:
        group, start, end = bank_tile(starts_ptr, index, g, chunk, GROUPS)
        end = tl.minimum(start + chunk, end)
        if diagonal_ptr is not None:
            diagonal_ptr += group * R
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    dots = tl.zeros((BLOCK_D,), tl.float32)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + cols, mask=valid, other=0.0).to(tl.float32)
    if t_planes_ptr is not None:
        weight_ptrs = weight_ptr + cols[:, None] * weight_stride_d + ranks[None, :] * weight_stride_r
        weight = tl.load(weight_ptrs, mask=valid[:, None] & (ranks < R)[None, :], other=0.0).to(dtype)  # [BLOCK_D, BLOCK_R]
    for first in range(0, (end - start).to(tl.int32), BLOCK_M):
        rows = start + first + tl.arange(0, BLOCK_M)
        inside = rows < end
        if GROUPS:
            rows = tl.load(order_ptr + rows, mask=inside, other=0)
        mask = inside[:, None] & valid[None, :]
        offsets = row_offsets(rows, inside, left_table_ptr, left_stride_m)
        left = tl.load(left_ptr + offsets[:, None] + cols[None, :] * left_stride_d, mask=mask, other=0.0)
        if sums_ptr is not None:
            sums += tl.sum(left.to(tl.float32), 0)
        if dots_ptr is not None:
            z = tl.load(z_ptr + rows[:, None] * d + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            # A product that a compiler fuses with the first sum of two lanes has other bits in either, which both store.
            dots += tl.sum(tl.fma(left.to(tl.float32), z, 0.0), 0)
        if gain_ptr is not None:
            left = (left.to(tl.float32) * gain[None, :]).to(dtype)
        if seed_ptr is not None:
            left = tl.where(dropout_keeps(rows, tile * BLOCK_D, seed_ptr, threshold, BLOCK_M, BLOCK_D), left, 0.0)
        if planes_ptr is not None:
            right = rank_tile(rank_ptr, rows, inside, ranks, diagonal_ptr, scale_value, R).to(dtype)  # [BLOCK_M, BLOCK_R]
            acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
        if t_planes_ptr is not None:
            t = tl.dot(left, weight, input_precision=PRECISION)
            t_ptrs = t_planes_ptr + (tile * m + rows)[:, None] * R + ranks[None, :]
            tl.store(t_ptrs, t, mask=inside[:, None] & (ranks < R)[None, :])
    columns = index * d + cols
    if planes_ptr is not None:
        tl.store(planes_ptr + columns[:, None] * BLOCK_R + ranks[None, :], acc, mask=valid[:, None])
    if sums_ptr is not None:
        tl.store(sums_ptr + columns, sums, mask=valid)
    if dots_ptr is not None:
        tl.store(dots_ptr + columns, dots, mask=valid)


@triton.jit
def lora_linear_bwd_reduce_kernel(
    planes_ptr, sums_ptr, dots_ptr, kept_scale, grad_ptr, grad_stride_d, grad_stride_r, grad_stride_g, grad_bias_ptr,
    grad_gain_ptr, starts_ptr, chunks, d, g, chunk, R: tl.constexpr, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_D columns, in a bank those of one adapter: it adds the planes of all chunks in order and turns the
    sums into gradients."""
    tile, first, last = tl.program_id(0), 0, chunks
    if GROUPS:
        tiles_d = tl.cdiv(d, BLOCK_D)
        tile, group = tl.program_id(0) % tiles_d, (tl.program_id(0) // tiles_d).to(tl.int64)
        first64, last64 = bank_tiles(starts_ptr, group, g, chunk, GROUPS)
        first, last = first64.to(tl.int32), last64.to(tl.int32)
        if grad_ptr is not None:
            grad_ptr += group * grad_stride_g
        if grad_bias_ptr is not None:
            grad_bias_ptr += group * d
    cols = tile.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    valid = cols < d
    if planes_ptr is not None:
        mask = valid[:, None] & (ranks < R)[None, :]
        plane = cols[:, None] * BLOCK_R + ranks[None, :]  # [BLOCK_D, BLOCK_R]
        grad = kept_scale * sum_planes(planes_ptr, first, last, tl.cast(d, tl.int64) * BLOCK_R, plane, mask)
        grad_ptrs = grad_ptr + cols[:, None] * grad_stride_d + ranks[None, :] * grad_stride_r
        tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        sums = sum_planes(sums_ptr, first, last, d, cols, valid)
        tl.store(grad_bias_ptr + cols, sums.to(grad_bias_ptr.dtype.element_ty), mask=valid)
    if dots_ptr is not None:
        dots = sum_planes(dots_ptr, first, last, d, cols, valid)
        tl.store(grad_gain_ptr + cols, dots.to(grad_gain_ptr.dtype.element_ty), mask=valid)
