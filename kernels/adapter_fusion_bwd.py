"""Triton kernel of adapter_fusion's backward pass, and the tiles and sums that both kernels are made of."""

import triton
import triton.language as tl

from ._common import row_offsets

# Strides that come in units of UNIT elements, which say what is aligned. What Triton itself would learn of them differs between
# a row alone and one among others, and so would the layout of a tile, and with it the order of a row's sums.
STRIDES = [f"{name}_stride_{dim}" for name in ("grad", "query", "keys", "values") for dim in "mg"]


@triton.jit
def load_tile(ptr, offsets, cols, stride_d, mask):
    return tl.load(ptr + offsets[:, None] + cols[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def dots(a, b, mask):
    # Masked last: a product fused with the sum over lanes would round differently in each lane of a row.
    return tl.sum(tl.where(mask, a * b, 0.0), 1)


@triton.jit
def column(tile, adapters, i):
    """Column i of a tile [BLOCK_M, BLOCK_G]."""
    return tl.sum(tl.where((adapters == i)[None, :], tile, 0.0), 1)


@triton.jit
def wide_dots(
    a_ptr, a_offsets, a_stride_d, b_ptr, b_offsets, b_stride_d, inside, d, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``dots`` of rows wider than a tile."""
    acc = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = inside[:, None] & (cols < d)[None, :]
        a = load_tile(a_ptr, a_offsets, cols, a_stride_d, mask)
        acc += dots(a, load_tile(b_ptr, b_offsets, cols, b_stride_d, mask), mask)
    return acc


@triton.jit(do_not_specialize_on_alignment=STRIDES)
def adapter_fusion_bwd_kernel(
    grad_ptr, grad_table_ptr, grad_stride_m, grad_stride_d, weights_ptr, query_ptr, query_table_ptr, query_stride_m,
    query_stride_d, keys_ptr, keys_table_ptr, keys_stride_m, keys_stride_d, keys_stride_g, values_ptr, values_table_ptr,
    values_stride_m, values_stride_d, values_stride_g, grad_query_ptr, grad_keys_ptr, grad_values_ptr, parts_ptr, scale_ptr,
    scale_value, m, d, g, WHOLE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows. With ``t`` the dot products of grad_y and the values, and ``u = w * (t - sum(w * t))`` the
    gradient of the scores, ``u @ keys`` is ``(w * t) @ keys - sum(w * t) * (w @ keys)``, for which WHOLE rows see each adapter
    once. The ``t`` are those less that of the heaviest adapter yet, or a softmax near one of them would leave nothing but
    rounding of the difference."""
    SHARED: tl.constexpr = values_ptr is None
    if SHARED:
        values_ptr, values_table_ptr, values_stride_m, values_stride_d = keys_ptr, keys_table_ptr, keys_stride_m, keys_stride_d
        values_stride_g = keys_stride_g
    NEED_SUM: tl.constexpr = grad_query_ptr is not None or parts_ptr is not None
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    adapters = tl.arange(0, BLOCK_G)
    grad_offsets = row_offsets(rows, inside, grad_table_ptr, grad_stride_m) * UNIT
    query_offsets = row_offsets(rows, inside, query_table_ptr, query_stride_m) * UNIT
    keys_offsets = row_offsets(rows, inside, keys_table_ptr, keys_stride_m) * UNIT
    values_offsets = row_offsets(rows, inside, values_table_ptr, values_stride_m) * UNIT
    scale = scale_value
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    weights_ptrs = weights_ptr + (rows * g)[:, None] + adapters[None, :]
    weights = tl.load(weights_ptrs, mask=inside[:, None] & (adapters < g)[None, :], other=0.0)

    if NEED_SUM or grad_keys_ptr is not None:
        products = tl.zeros((BLOCK_M, BLOCK_G), tl.float32)
        cols = tl.arange(0, BLOCK_D).to(tl.int64)
        mask = inside[:, None] & (cols < d)[None, :]
        if WHOLE:
            grad_y = load_tile(grad_ptr, grad_offsets, cols, grad_stride_d, mask)
            acc, summed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            heaviest, base = tl.full((BLOCK_M,), -1.0, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
            mean, total = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        for i in tl.range(0, g, num_stages=STAGES):
            here = tl.cast(i, tl.int64) * UNIT
            if WHOLE:
                values = load_tile(values_ptr + here * values_stride_g, values_offsets, cols, values_stride_d, mask)
                product = dots(grad_y, values, mask)
                if NEED_SUM:
                    keys = values
                    if not SHARED:
                        keys = load_tile(keys_ptr + here * keys_stride_g, keys_offsets, cols, keys_stride_d, mask)
                    weight = column(weights, adapters, i)
                    before = base
                    base = tl.where(weight > heaviest, product, base)
                    heaviest = tl.maximum(heaviest, weight)
                    moved, pull = before - base, weight * (product - base)
                    acc += moved[:, None] * summed + pull[:, None] * keys
                    mean += moved * total + pull
                    summed += weight[:, None] * keys
                    total += weight
            else:
                product = wide_dots(
                    grad_ptr, grad_offsets, grad_stride_d, values_ptr + here * values_stride_g, values_offsets,
                    values_stride_d, inside, d, BLOCK_M, BLOCK_D,
                )  # fmt: skip
            products = tl.where((adapters == i)[None, :], product[:, None], products)
        grad_scores = weights * (products - tl.sum(weights * products, 1)[:, None])

    part = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, 1 if WHOLE else d, BLOCK_D):
        cols = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = inside[:, None] & (cols < d)[None, :]
        if NEED_SUM:
            if WHOLE:
                grad = acc - mean[:, None] * summed
            else:
                grad = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
                for i in tl.range(0, g, num_stages=STAGES):
                    here = keys_ptr + tl.cast(i, tl.int64) * UNIT * keys_stride_g
                    grad += column(grad_scores, adapters, i)[:, None] * load_tile(here, keys_offsets, cols, keys_stride_d, mask)
            if parts_ptr is not None:
                part += dots(load_tile(query_ptr, query_offsets, cols, query_stride_d, mask), grad, mask)
            if grad_query_ptr is not None:
                grad_query_ptrs = grad_query_ptr + (rows * d)[:, None] + cols[None, :]
                tl.store(grad_query_ptrs, (scale * grad).to(grad_query_ptr.dtype.element_ty), mask=mask)
        if grad_keys_ptr is not None or grad_values_ptr is not None:
            query = load_tile(query_ptr, query_offsets, cols, query_stride_d, mask) * scale
            grad_y = load_tile(grad_ptr, grad_offsets, cols, grad_stride_d, mask)
            for i in range(0, g):
                offsets = ((tl.cast(i, tl.int64) * m + rows) * d)[:, None] + cols[None, :]
                grad_values = column(weights, adapters, i)[:, None] * grad_y
                if grad_keys_ptr is not None:
                    grad_keys = column(grad_scores, adapters, i)[:, None] * query
                    if SHARED:
                        grad_keys += grad_values
                    tl.store(grad_keys_ptr + offsets, grad_keys.to(grad_keys_ptr.dtype.element_ty), mask=mask)
                if grad_values_ptr is not None:
                    tl.store(grad_values_ptr + offsets, grad_values.to(grad_values_ptr.dtype.element_ty), mask=mask)
    if parts_ptr is not None:
        tl.store(parts_ptr + tl.program_id(0), tl.sum(part, 0))
