"""Triton kernels of compacter's backward pass: what rows need, and the gradients of what the middle of the adapter folds."""

import triton
import triton.language as tl

from ._common import activation, rank_vector, row_offsets
from ._kron import expand_tile, project_chunk, tile_rows


@triton.jit
def folded(
    a_ptr, t_ptr, outer, ks, limit, UP: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Weights between the ranks ``ks`` = (i, k) of one chunk ``outer`` and the hidden units (inner, j): ``a[i, outer, inner] *
    t[i, k, j]``, or with UP, of a chunk of y, ``a[i, inner, outer] * t[i, j, k]``."""
    stride_outer: tl.constexpr = 1 if UP else N
    stride_inner: tl.constexpr = N if UP else 1
    stride_k: tl.constexpr = 1 if UP else C
    stride_j: tl.constexpr = Q if UP else 1
    units = tl.arange(0, BLOCK_R)
    mask = (ks < N * Q)[:, None] & (units < limit)[None, :]
    a_ptrs = a_ptr + outer * stride_outer + (ks // Q * (N * N))[:, None] + (units // C * stride_inner)[None, :]
    t_ptrs = t_ptr + (ks // Q * (Q * C) + ks % Q * stride_k)[:, None] + (units % C * stride_j)[None, :]
    return tl.load(a_ptrs, mask=mask, other=0.0).to(tl.float32) * tl.load(t_ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def unfold(
    ranks, acc, a_ptr, t_ptr, outer, limit, UP: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the ranks of a chunk, [BLOCK_M, BLOCK_K], times their folded weights: [BLOCK_M, BLOCK_R]."""
    weight = folded(a_ptr, t_ptr, outer, tl.arange(0, BLOCK_K), limit, UP, N, Q, C, BLOCK_R)
    # The parts of a wide tile that three products multiply don't fit the registers.
    return tl.dot(ranks, weight, acc, input_precision=PRECISION if BLOCK_R <= 64 else "ieee")


@triton.jit
def fold(
    units, a_ptr, t_ptr, outer, limit, UP: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Hidden units, [BLOCK_M, BLOCK_R], times the folded weights of a chunk: its ranks, [BLOCK_M, BLOCK_K]."""
    ks = tl.arange(0, BLOCK_K)
    if BLOCK_R <= 64:
        weight = tl.trans(folded(a_ptr, t_ptr, outer, ks, limit, UP, N, Q, C, BLOCK_R))
        ranks = tl.dot(units, weight, input_precision=PRECISION)
        if N * Q != BLOCK_K:  # the padding of an infinite row is 0 * inf
            ranks = tl.where((ks < N * Q)[None, :], ranks, 0.0)
    else:  # rank by rank, since the operands of so deep a product don't fit either
        ranks = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for k in range(0, N * Q):
            weight = folded(a_ptr, t_ptr, outer, k + tl.arange(0, 1), limit, UP, N, Q, C, BLOCK_R)
            ranks = tl.where((ks == k)[None, :], tl.sum(units * weight, 1)[:, None], ranks)
    return ranks


@triton.jit
def hidden_layer(v, present, bias_ptr, limit, BLOCK_R: tl.constexpr, ACTIVATION: tl.constexpr):
    """Of the products ``v`` of rows and folded weights: the hidden layer before and behind its activation, and the slope."""
    v = tl.where(present[None, :], v, 0.0)  # the padding of an infinite row is 0 * inf
    if bias_ptr is not None:
        v += rank_vector(bias_ptr, limit, BLOCK_R)
    value, slope = activation(v, ACTIVATION)
    return v, value, slope


@triton.jit
def compacter_bwd_rows_kernel(
    grad_ptr, grad_table_ptr, grad_stride_m, grad_stride_d, x_ptr, x_table_ptr, x_stride_m, x_stride_d, grad_x_ptr, down_a_ptr,
    down_s_ptr, down_t_ptr, up_a_ptr, up_s_ptr, up_t_ptr, down_bias_ptr, scale_ptr, scale_value, z_ptr, grad_z_ptr, up_ptr,
    grad_up_ptr, hidden_ptr, grad_v_ptr, work_stride, order_ptr, starts_ptr, m, chunk, g, N: tl.constexpr, Q: tl.constexpr,
    C: tl.constexpr, ACTIVATION: tl.constexpr, ADD_X: tl.constexpr, NEED_UP: tl.constexpr, NEED_DOWN: tl.constexpr,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows of one adapter. It recomputes the hidden layer, walks grad_y for its gradient, and d once
    more for grad_x. Of the ranks it leaves in memory those that the gradients of factors need: of x (z) and of y (up), and
    their gradients, those of y (grad_up) without the scale."""
    ks, ranks = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    kept, present = ks < N * Q, ranks < N * C
    width, limit = chunk, N * C
    group, positions, rows, inside = tile_rows(order_ptr, starts_ptr, m, g, GROUPS, BLOCK_M)
    if GROUPS:
        width, limit = tl.where(group < g, chunk, 0), tl.where(group < g, N * C, 0)
        down_a_ptr += group * N * N * N
        down_s_ptr += group * N * Q * chunk
        down_t_ptr += group * N * Q * C
        up_a_ptr += group * N * N * N
        up_s_ptr += group * N * Q * C
        up_t_ptr += group * N * Q * chunk
        if down_bias_ptr is not None:
            down_bias_ptr += group * N * C
    x_offsets = row_offsets(rows, inside, x_table_ptr, x_stride_m)
    grad_offsets = row_offsets(rows, inside, grad_table_ptr, grad_stride_m)
    work = positions[:, None] * work_stride
    work_k, mask_k = work + ks[None, :], inside[:, None] & kept[None, :]
    work_r, mask_r = work + ranks[None, :], inside[:, None] & present[None, :]

    v = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for part in range(0, N):
        z = project_chunk(
            x_ptr, x_offsets, inside, x_stride_d, part * tl.cast(chunk, tl.int64), width, down_s_ptr, Q, Q * chunk, 1, Q, N * Q,
            BLOCK_K, BLOCK_M, BLOCK_P, PRECISION,
        )  # fmt: skip
        if z_ptr is not None:
            tl.store(z_ptr + work_k + part * (N * Q), z, mask=mask_k)
        v = unfold(z, v, down_a_ptr, down_t_ptr, part, limit, False, N, Q, C, BLOCK_K, BLOCK_R, PRECISION)
    v, hidden, slope = hidden_layer(v, present, down_bias_ptr, limit, BLOCK_R, ACTIVATION)
    if hidden_ptr is not None:
        tl.store(hidden_ptr + work_r, hidden, mask=mask_r)

    if up_ptr is not None:
        for part in range(0, N):
            up = fold(hidden, up_a_ptr, up_s_ptr, part, limit, True, N, Q, C, BLOCK_K, BLOCK_R, BLOCK_M, PRECISION)
            tl.store(up_ptr + work_k + part * (N * Q), up, mask=mask_k)

    grad_v = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if NEED_UP:
        for part in range(0, N):
            grad_up = project_chunk(
                grad_ptr, grad_offsets, inside, grad_stride_d, part * tl.cast(chunk, tl.int64), width, up_t_ptr, 1, Q * chunk,
                chunk, Q, N * Q, BLOCK_K, BLOCK_M, BLOCK_P, PRECISION,
            )  # fmt: skip
            if grad_up_ptr is not None:
                tl.store(grad_up_ptr + work_k + part * (N * Q), grad_up, mask=mask_k)
            if NEED_DOWN:
                grad_v = unfold(grad_up, grad_v, up_a_ptr, up_s_ptr, part, limit, True, N, Q, C, BLOCK_K, BLOCK_R, PRECISION)

    if NEED_DOWN:
        scale = scale_value
        if scale_ptr is not None:
            scale = tl.load(scale_ptr).to(tl.float32)
        grad_v = tl.where(present[None, :], grad_v * scale, 0.0)
        # relu selects: where it is 0, NaN and infinity end, as in PyTorch
        grad_v = tl.where(v <= 0, 0.0, grad_v) if ACTIVATION == 0 else grad_v * slope
        if grad_v_ptr is not None:
            tl.store(grad_v_ptr + work_r, grad_v, mask=mask_r)
        if grad_z_ptr is not None or grad_x_ptr is not None:
            for part in range(0, N):
                grad_z = fold(
                    grad_v, down_a_ptr, down_t_ptr, part, limit, False, N, Q, C, BLOCK_K, BLOCK_R, BLOCK_M, PRECISION
                )
                if grad_z_ptr is not None:
                    tl.store(grad_z_ptr + work_k + part * (N * Q), grad_z, mask=mask_k)
                if grad_x_ptr is not None:
                    for first in range(0, chunk, BLOCK_P):
                        cols = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
                        mask = inside[:, None] & (cols < chunk)[None, :]
                        grad_x = expand_tile(
                            grad_z, down_s_ptr, cols, cols < width, Q, Q * chunk, 1, Q, N * Q, BLOCK_K, PRECISION
                        )
                        cols += part * tl.cast(chunk, tl.int64)
                        if GROUPS:
                            grad_x = tl.where(group < g, grad_x, tl.where(group == g, 0.0, float("nan")))
                        if ADD_X:
                            # Masked, or the compiler starts the sum of the product with grad_y, whose size each step rounds to.
                            grad_x = tl.where(mask, grad_x, 0.0)
                            grad_ptrs = grad_ptr + grad_offsets[:, None] + cols[None, :] * grad_stride_d
                            grad_x = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32) + grad_x
                        grad_x_ptrs = grad_x_ptr + (rows * N * chunk)[:, None] + cols[None, :]
                        tl.store(grad_x_ptrs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def compacter_bwd_factors_kernel(
    product_ptr, a_ptr, t_ptr, grad_a_ptr, grad_t_ptr, stride_outer, stride_inner, stride_k, stride_j, N: tl.constexpr,
    Q: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program owns one term of one adapter. ``product`` holds the gradient of what ``folded`` gives, ranks (outer, i, k) by
    hidden units (inner, j); from it come the gradients of ``a`` and of ``t``."""
    group, i = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    inner, units = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    mask = (inner < N)[:, None] & (units < C)[None, :]
    product_ptr += group * (N * N * Q * N * C) + (inner * C)[:, None] + units[None, :]
    a_offsets = group * (N * N * N) + i * (N * N) + inner * stride_inner
    t_offsets = group * (N * Q * C) + i * (Q * C) + units * stride_j
    if grad_a_ptr is not None:
        for outer in range(0, N):
            acc = tl.zeros((BLOCK_N,), tl.float32)
            for k in range(0, Q):
                product = tl.load(product_ptr + ((outer * N + i) * Q + k) * (N * C), mask=mask, other=0.0)
                t = tl.load(t_ptr + t_offsets + k * stride_k, mask=units < C, other=0.0).to(tl.float32)
                acc += tl.sum(product * t[None, :], 1)
            tl.store(grad_a_ptr + a_offsets + outer * stride_outer, acc.to(grad_a_ptr.dtype.element_ty), mask=inner < N)
    if grad_t_ptr is not None:
        for k in range(0, Q):
            acc = tl.zeros((BLOCK_C,), tl.float32)
            for outer in range(0, N):
                product = tl.load(product_ptr + ((outer * N + i) * Q + k) * (N * C), mask=mask, other=0.0)
                a = tl.load(a_ptr + a_offsets + outer * stride_outer, mask=inner < N, other=0.0).to(tl.float32)
                acc += tl.sum(product * a[:, None], 0)
            tl.store(grad_t_ptr + t_offsets + k * stride_k, acc.to(grad_t_ptr.dtype.element_ty), mask=units < C)
