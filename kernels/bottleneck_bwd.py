"""Triton kernels of bottleneck's backward: rows, then columns in planes, then an ordered sum of the planes."""

import triton
import triton.language as tl

from ._common import bank_tile, bank_tiles, hidden_layer, moments, project, rank_vector, row_offsets, standardised, sum_planes


@triton.jit
def bottleneck_bwd_norm_dots_kernel(down_ptr, norm_weight_ptr, norm_bias_ptr, dots_ptr, d, x_ptr, BLOCK_D: tl.constexpr):
    """A program owns one row of down_weight: its products with norm_weight and with norm_bias."""
    row = tl.program_id(0).to(tl.int64)
    acc_weight = tl.zeros((BLOCK_D,), tl.float32)
    acc_bias = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        down = tl.load(down_ptr + row * d + cols, mask=cols < d, other=0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
        acc_weight += down * tl.load(norm_weight_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)
        if norm_bias_ptr is not None:
            acc_bias += down * tl.load(norm_bias_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)
    tl.store(dots_ptr + 2 * row, tl.sum(acc_weight, 0))
    tl.store(dots_ptr + 2 * row + 1, tl.sum(acc_bias, 0))


@triton.jit
def bottleneck_bwd_rows_kernel(
    grad_ptr, grad_table_ptr, grad_stride_m, grad_stride_d, x_ptr, x_table_ptr, x_stride_m, x_stride_d, grad_x_ptr, down_ptr,
    up_ptr, down_bias_ptr, scale_ptr, channel_scale_ptr, scale_value, norm_weight_ptr, norm_bias_ptr, norm_eps, norm_dots_ptr,
    skip_ptr, hidden_skip_ptr, grad_z_ptr, grad_skip_ptr, hidden_ptr, work_stride, stats_ptr, order_ptr, starts_ptr, m, d, g,
    R: tl.constexpr, ACTIVATION: tl.constexpr, ADD_X: tl.constexpr, NEED_GRAD_Z: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows of one adapter. It recomputes z, forms grad_z, leaves in memory only the tiles of the hidden
    layer that the weight gradients need, and walks d once more for grad_x."""
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    start, end, width, rank = tl.program_id(0).to(tl.int64) * BLOCK_M, m, d, R
    if GROUPS:
        group, start, end = bank_tile(starts_ptr, tl.program_id(0).to(tl.int64), g + 2, BLOCK_M, GROUPS)
        width = tl.where(group < g, d, 0)
        rank = tl.where(group < g, R, 0)
        down_ptr += group * R * d
        up_ptr += group * d * R
        if down_bias_ptr is not None:
            down_bias_ptr += group * R
        if norm_dots_ptr is not None:
            norm_dots_ptr += group * R * 2
    positions = start + tl.arange(0, BLOCK_M)
    inside = positions < end
    rows = positions
    if GROUPS:
        rows = tl.load(order_ptr + positions, mask=inside, other=0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_offsets = row_offsets(rows, inside, x_table_ptr, x_stride_m)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    rstd = mean
    if norm_weight_ptr is not None:
        mean, rstd = moments(x_ptr, x_offsets, inside, x_stride_d, width, d, norm_eps, BLOCK_M, BLOCK_D)
        if stats_ptr is not None:
            tl.store(stats_ptr + 2 * positions, mean, mask=inside)
            tl.store(stats_ptr + 2 * positions + 1, rstd, mask=inside)
    projection = project(
        x_ptr, x_offsets, inside, x_stride_d, down_ptr, 1, d, width, mean, rstd, norm_weight_ptr, norm_bias_ptr, None, R,
        BLOCK_R, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    z = projection
    if down_bias_ptr is not None:
        z += rank_vector(down_bias_ptr, rank, BLOCK_R)
    value, slope = hidden_layer(z, hidden_skip_ptr, R, BLOCK_R, ACTIVATION)
    work = positions[:, None] * work_stride + ranks[None, :]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + work, value.to(dtype), mask=inside[:, None])
    if NEED_GRAD_Z:
        grad_offsets = row_offsets(rows, inside, grad_table_ptr, grad_stride_m)
        grad_hidden = project(
            grad_ptr, grad_offsets, inside, grad_stride_d, up_ptr, R, 1, width, mean, rstd, None, None, channel_scale_ptr, R,
            BLOCK_R, BLOCK_M, BLOCK_D, PRECISION,
        )  # fmt: skip
        if scale_ptr is not None:
            grad_hidden *= tl.load(scale_ptr).to(tl.float32)
        elif channel_scale_ptr is None:
            grad_hidden *= scale_value
        grad_z = grad_hidden * slope
        if ACTIVATION == 0 and hidden_skip_ptr is None:  # relu selects: where it is 0, NaN and infinity end, as in PyTorch
            grad_z = tl.where(z <= 0, 0.0, grad_hidden)
        grad_z = grad_z.to(dtype)  # [BLOCK_M, BLOCK_R]
        if grad_z_ptr is not None:
            tl.store(grad_z_ptr + work, grad_z, mask=inside[:, None])
        if grad_skip_ptr is not None:
            tl.store(grad_skip_ptr + work, (grad_hidden * z).to(dtype), mask=inside[:, None])
    if grad_x_ptr is not None:
        mean_weight = tl.zeros((BLOCK_M,), tl.float32)
        mean_x = mean_weight
        if norm_weight_ptr is not None:  # the two means of LayerNorm's backward, as sums over the rank
            dots_weight = tl.load(norm_dots_ptr + 2 * ranks, mask=ranks < rank, other=0.0)[None, :]
            mean_weight = tl.sum(grad_z.to(tl.float32) * dots_weight, 1) / d
            if norm_bias_ptr is not None:
                projection -= tl.load(norm_dots_ptr + 2 * ranks + 1, mask=ranks < rank, other=0.0)[None, :]
            mean_x = tl.sum(grad_z.to(tl.float32) * projection, 1) / d
        for first in range(0, d, BLOCK_D):
            cols = (first + tl.arange(0, BLOCK_D)).to(tl.int64)
            valid = cols < width
            mask = inside[:, None] & (cols < d)[None, :]
            down_ptrs = down_ptr + ranks[:, None] * d + cols[None, :]
            down = tl.load(down_ptrs, mask=(ranks < R)[:, None] & valid[None, :], other=0.0).to(dtype)  # [BLOCK_R, BLOCK_D]
            grad_x = tl.dot(grad_z, down, input_precision=PRECISION)
            if norm_weight_ptr is not None:
                x = tl.load(x_ptr + x_offsets[:, None] + cols[None, :] * x_stride_d, mask=mask, other=0.0)
                grad_x *= tl.load(norm_weight_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]
                grad_x -= mean_weight[:, None] + standardised(x, mean, rstd) * mean_x[:, None]
                grad_x *= rstd[:, None]
            base = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            if ADD_X or skip_ptr is not None:
                grad = tl.load(grad_ptr + grad_offsets[:, None] + cols[None, :] * grad_stride_d, mask=mask, other=0.0)
                grad = grad.to(tl.float32)
                if skip_ptr is not None:
                    grad_x += tl.load(skip_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :] * grad
                if ADD_X:
                    base = grad
                    if dtype == tl.float32:  # else the compiler starts the sum of the product with base, whose size each step
                        grad_x = tl.where(mask, grad_x, 0.0)  # then rounds to
            if GROUPS:
                grad_x = tl.where(group < g, grad_x, tl.where(group == g, 0.0, float("nan")))
            tl.store(grad_x_ptr + (rows * d)[:, None] + cols[None, :], (base + grad_x).to(dtype), mask=mask)


@triton.jit
def bottleneck_bwd_columns_kernel(
    left_ptr, left_table_ptr, left_stride_m, left_stride_d, stats_ptr, right_ptr, right_stride, other_ptr, other_table_ptr,
    other_stride_m, other_stride_d, planes_ptr, sums_ptr, dots_ptr, order_ptr, starts_ptr, m, d, g, chunk, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_D columns of ``left`` over one chunk of the rows of one adapter: their product with ``right``, their
    sums, their dot products with ``other``. Each is written to the plane of that chunk."""
    tiles_d = tl.cdiv(d, BLOCK_D)
    index = (tl.program_id(0) // tiles_d).to(tl.int64)
    start, end = index * chunk, tl.minimum((index + 1) * chunk, m)
    if GROUPS:
        _, start, end = bank_tile(starts_ptr, index, g, chunk, GROUPS)
        end = tl.minimum(start + chunk, end)
    cols = ((tl.program_id(0) % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    valid = cols < d
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dots = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, (end - start).to(tl.int32), BLOCK_M):
        positions = start + first + tl.arange(0, BLOCK_M)
        inside = positions < end
        rows = positions
        if order_ptr is not None:
            rows = tl.load(order_ptr + positions, mask=inside, other=0)
        mask = inside[:, None] & valid[None, :]
        left_offsets = row_offsets(rows, inside, left_table_ptr, left_stride_m)
        left = tl.load(left_ptr + left_offsets[:, None] + cols[None, :] * left_stride_d, mask=mask, other=0.0)
        if sums_ptr is not None:
            sums += left.to(tl.float32)
        if dots_ptr is not None:
            other_offsets = row_offsets(rows, inside, other_table_ptr, other_stride_m)
            other = tl.load(other_ptr + other_offsets[:, None] + cols[None, :] * other_stride_d, mask=mask, other=0.0)
            dots += left.to(tl.float32) * other.to(tl.float32)
        if planes_ptr is not None:
            if stats_ptr is not None:
                mean = tl.load(stats_ptr + 2 * positions, mask=inside, other=0.0)
                rstd = tl.load(stats_ptr + 2 * positions + 1, mask=inside, other=0.0)
                left = standardised(left, mean, rstd).to(left.dtype)
            right_ptrs = right_ptr + positions[:, None] * right_stride + ranks[None, :]
            right = tl.load(right_ptrs, mask=inside[:, None], other=0.0)  # [BLOCK_M, BLOCK_R]
            acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
    columns = index * d + cols
    if planes_ptr is not None:
        tl.store(planes_ptr + columns[:, None] * BLOCK_R + ranks[None, :], acc, mask=valid[:, None])
    if sums_ptr is not None:
        tl.store(sums_ptr + columns, tl.sum(sums, 0), mask=valid)
    if dots_ptr is not None:
        tl.store(dots_ptr + columns, tl.sum(dots, 0), mask=valid)


@triton.jit
def bottleneck_bwd_reduce_kernel(
    up_planes_ptr, down_planes_ptr, sums_ptr, dots_ptr, grad_z_sums_ptr, grad_skip_sums_ptr, down_ptr, up_ptr,
    up_bias_ptr, scale_ptr, channel_scale_ptr, scale_value, norm_weight_ptr, norm_bias_ptr, grad_down_ptr, grad_up_ptr,
    grad_down_bias_ptr, grad_up_bias_ptr, grad_scale_ptr, grad_norm_weight_ptr, grad_norm_bias_ptr, grad_skip_ptr,
    grad_hidden_skip_ptr, starts_ptr, m, d, g, chunk, R: tl.constexpr, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_D columns of one adapter: it adds the planes of the adapter's chunks in order and turns the sums
    into gradients. What a bank shares comes out once an adapter."""
    tiles_d = tl.cdiv(d, BLOCK_D)
    group = (tl.program_id(0) // tiles_d).to(tl.int64)
    tile = tl.program_id(0) % tiles_d
    first, last = 0, tl.cdiv(m, chunk)
    if GROUPS:
        first64, last64 = bank_tiles(starts_ptr, group, g, chunk, GROUPS)
        first, last = first64.to(tl.int32), last64.to(tl.int32)
    cols = (tile * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    valid = cols < d
    mask = valid[:, None] & (ranks < R)[None, :]
    rank_mask = ranks < tl.where(tile == 0, R, 0)
    plane = cols[:, None] * BLOCK_R + ranks[None, :]  # [BLOCK_D, BLOCK_R]
    down_offsets = group * R * d + ranks[None, :] * d + cols[:, None]
    up_offsets = group * d * R + cols[:, None] * R + ranks[None, :]
    columns = group * d + cols

    scale = tl.zeros((BLOCK_D,), tl.float32) + scale_value
    if scale_ptr is not None:
        scale = tl.zeros((BLOCK_D,), tl.float32) + tl.load(scale_ptr).to(tl.float32)
    if channel_scale_ptr is not None:
        scale = tl.load(channel_scale_ptr + cols, mask=valid, other=0.0).to(tl.float32)
    grad_scale = tl.zeros((BLOCK_D,), tl.float32)
    if sums_ptr is not None:
        sums = sum_planes(sums_ptr, first, last, d, cols, valid)
        if grad_up_bias_ptr is not None:
            tl.store(grad_up_bias_ptr + columns, (scale * sums).to(grad_up_bias_ptr.dtype.element_ty), mask=valid)
        if up_bias_ptr is not None:
            grad_scale += sums * tl.load(up_bias_ptr + columns, mask=valid, other=0.0).to(tl.float32)
    if up_planes_ptr is not None:
        product = sum_planes(up_planes_ptr, first, last, d * BLOCK_R, plane, mask)
        if grad_up_ptr is not None:
            tl.store(grad_up_ptr + up_offsets, (scale[:, None] * product).to(grad_up_ptr.dtype.element_ty), mask=mask)
        if grad_scale_ptr is not None:
            up = tl.load(up_ptr + up_offsets, mask=mask, other=0.0).to(tl.float32)
            grad_scale += tl.sum(product * up, 1)
            tl.store(grad_scale_ptr + columns, grad_scale.to(grad_scale_ptr.dtype.element_ty), mask=valid)
    if grad_z_sums_ptr is not None:
        grad_z_sums = sum_planes(grad_z_sums_ptr, first, last, R, ranks, ranks < R)
        if grad_down_bias_ptr is not None:
            out = grad_z_sums.to(grad_down_bias_ptr.dtype.element_ty)
            tl.store(grad_down_bias_ptr + group * R + ranks, out, mask=rank_mask)
    if grad_norm_weight_ptr is not None or grad_norm_bias_ptr is not None:
        down = tl.load(down_ptr + down_offsets, mask=mask, other=0.0).to(tl.float32)
        if grad_norm_bias_ptr is not None:
            out = tl.sum(down * grad_z_sums[None, :], 1)
            tl.store(grad_norm_bias_ptr + columns, out.to(grad_norm_bias_ptr.dtype.element_ty), mask=valid)
    if down_planes_ptr is not None:
        product = sum_planes(down_planes_ptr, first, last, d * BLOCK_R, plane, mask)
        if grad_norm_weight_ptr is not None:
            out = tl.sum(down * product, 1)
            tl.store(grad_norm_weight_ptr + columns, out.to(grad_norm_weight_ptr.dtype.element_ty), mask=valid)
        if grad_down_ptr is not None:
            if norm_weight_ptr is not None:
                product *= tl.load(norm_weight_ptr + cols, mask=valid, other=0.0).to(tl.float32)[:, None]
                if norm_bias_ptr is not None:
                    bias = tl.load(norm_bias_ptr + cols, mask=valid, other=0.0).to(tl.float32)
                    product += bias[:, None] * grad_z_sums[None, :]
            tl.store(grad_down_ptr + down_offsets, product.to(grad_down_ptr.dtype.element_ty), mask=mask)
    if dots_ptr is not None:
        out = sum_planes(dots_ptr, first, last, d, cols, valid)
        tl.store(grad_skip_ptr + columns, out.to(grad_skip_ptr.dtype.element_ty), mask=valid)
    if grad_skip_sums_ptr is not None:
        out = sum_planes(grad_skip_sums_ptr, first, last, R, ranks, ranks < R)
        tl.store(grad_hidden_skip_ptr + group * R + ranks, out.to(grad_hidden_skip_ptr.dtype.element_ty), mask=rank_mask)
