"""Triton kernels of prefix_attention's backward pass. Weights are computed again from the logarithms that forward saved."""

import triton
import triton.language as tl

from ._attention import (
    factor_tiles,
    flat_queries,
    gates_of,
    head_tile,
    hide,
    kept_weights,
    limits_of,
    own_length,
    prefix_of,
    query_offsets,
    row_products,
    rows_tile,
    saved_lse,
    tile_queries,
)  # fmt: skip
from ._common import sum_planes


@triton.jit
def score_gradients(
    q, grad_y, start, limits, k_ptr, k_stride_t, k_stride_e, v_ptr, v_stride_t, v_stride_e, length, scale, mask_ptr,
    mask_offsets, mask_stride, rows, column, seed_ptr, threshold, kept_scale, lse, delta, MASKED: tl.constexpr,
    E: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N keys from ``start``: the keys, and the gradients of the scores that rows give them."""
    keys = start + tl.arange(0, BLOCK_N)
    present = None
    if MASKED:
        present = keys < length
    dtype: tl.constexpr = q[0].dtype
    k = factor_tiles(k_ptr, keys.to(tl.int64) * k_stride_t, present, k_stride_e, dtype, E, WIDTH, PRECISION)
    scores = row_products(q, k, PRECISION) * scale  # [BLOCK_M, BLOCK_N]
    if MASKED:
        scores, seen = hide(scores, keys[None, :], limits[:, None], mask_ptr, mask_offsets[:, None], mask_stride)
    weights = tl.exp2(scores - lse[:, None])
    v = factor_tiles(v_ptr, keys.to(tl.int64) * v_stride_t, present, v_stride_e, dtype, E, WIDTH, PRECISION)
    grads = row_products(grad_y, v, PRECISION)
    if seed_ptr is not None:
        grads *= kept_weights(rows, column + start, seed_ptr, threshold, kept_scale, BLOCK_M, BLOCK_N)
    # A product that a compiler fuses with the first sum of two lanes has other bits in either, which both store.
    grad_scores = tl.fma(weights, grads - delta[:, None], 0.0)
    if MASKED:  # of a row that is NaN, too
        grad_scores = tl.where(seen, grad_scores, 0.0)
    return k[0], grad_scores


@triton.jit
def prefix_attention_bwd_delta_kernel(
    grad_ptr, grad_strides, y_ptr, y_strides, q_ptr, q_strides, prefix_k_ptr, prefix_k_strides, prefix_v_ptr, prefix_v_strides,
    gate_ptr, ids_ptr, seed_ptr, threshold, kept_scale, scale, b, h_kv, group, t, p, g, lse_ptr, delta_ptr, tiles,
    ALONE: tl.constexpr, PACKED: tl.constexpr, TAIL: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows of a key head: the sum over keys of each weight times its gradient, which is the product of
    a row with its gradient. With a gate also that over the prefix alone, which is taken, times the gate, from the other."""
    sequence, head, tile = head_tile(b, tiles)
    members, queries, inside = tile_queries(tile, t, group, PACKED, BLOCK_M)
    flat = flat_queries(sequence, head, members, queries, h_kv, group, t)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    grad_offsets = query_offsets(sequence, head, members, queries, group, grad_strides)
    grad_y = factor_tiles(grad_ptr, grad_offsets, inside, grad_strides[3], dtype, E, WIDTH, PRECISION)
    y_offsets = query_offsets(sequence, head, members, queries, group, y_strides)
    y = rows_tile(y_ptr, y_offsets, inside, y_strides[3], dtype, E, WIDTH)
    delta = tl.sum(tl.fma(grad_y[0].to(tl.float32), y.to(tl.float32), 0.0), 1)
    if gate_ptr is not None:
        every = tl.cast(b, tl.int64) * h_kv * group * t
        q_offsets = query_offsets(sequence, head, members, queries, group, q_strides)
        q = factor_tiles(q_ptr, q_offsets, inside, q_strides[3], dtype, E, WIDTH, PRECISION)
        lse = saved_lse(lse_ptr + every, flat, inside)
        owner, length, valid = prefix_of(ids_ptr, sequence, p, g, ALONE)
        prefix_k_ptr += owner * prefix_k_strides[0] + head * prefix_k_strides[1]
        prefix_v_ptr += owner * prefix_v_strides[0] + head * prefix_v_strides[1]
        limits = tl.where(inside, length, 0)
        prefix_delta = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, length, BLOCK_P):
            _, products = score_gradients(
                q, grad_y, start, limits, prefix_k_ptr, prefix_k_strides[2], prefix_k_strides[3], prefix_v_ptr,
                prefix_v_strides[2], prefix_v_strides[3], length, scale, None, flat, 0, flat, 0, seed_ptr, threshold,
                kept_scale, lse, tl.zeros_like(lse), TAIL, E, WIDTH, BLOCK_M, BLOCK_P, PRECISION,
            )  # fmt: skip
            prefix_delta += tl.sum(products, 1)
        delta -= gates_of(gate_ptr, head, members, inside, group) * prefix_delta
        tl.store(delta_ptr + every + flat, prefix_delta, mask=inside)
    tl.store(delta_ptr + flat, delta, mask=inside)


@triton.jit
def prefix_attention_bwd_queries_kernel(
    grad_ptr, grad_strides, q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, prefix_k_ptr, prefix_k_strides, prefix_v_ptr,
    prefix_v_strides, gate_ptr, lengths_ptr, mask_ptr, mask_strides, ids_ptr, seed_ptr, threshold, kept_scale, own_column,
    scale, grad_scale, b, h_kv, group, t, t_k, p, g, lse_ptr, delta_ptr, grad_q_ptr, grad_q_strides, tiles,
    CAUSAL: tl.constexpr, ALONE: tl.constexpr, PACKED: tl.constexpr, TAIL: tl.constexpr, E: tl.constexpr,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows of a key head and walks the keys as forward does: the gradient of the queries."""
    sequence, head, tile = head_tile(b, tiles)
    members, queries, inside = tile_queries(tile, t, group, PACKED, BLOCK_M)
    flat = flat_queries(sequence, head, members, queries, h_kv, group, t)
    every = tl.cast(b, tl.int64) * h_kv * group * t
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    q_offsets = query_offsets(sequence, head, members, queries, group, q_strides)
    q = factor_tiles(q_ptr, q_offsets, inside, q_strides[3], dtype, E, WIDTH, PRECISION)
    grad_offsets = query_offsets(sequence, head, members, queries, group, grad_strides)
    grad_y = factor_tiles(grad_ptr, grad_offsets, inside, grad_strides[3], dtype, E, WIDTH, PRECISION)
    lse = saved_lse(lse_ptr, flat, inside)
    delta = tl.load(delta_ptr + flat, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)

    prefix_lse, prefix_delta = lse, delta
    if gate_ptr is not None:
        prefix_lse = saved_lse(lse_ptr + every, flat, inside)
        prefix_delta = tl.load(delta_ptr + every + flat, mask=inside, other=0.0)
    owner, prefix_length, _ = prefix_of(ids_ptr, sequence, p, g, ALONE)
    prefix_k_ptr += owner * prefix_k_strides[0] + head * prefix_k_strides[1]
    prefix_v_ptr += owner * prefix_v_strides[0] + head * prefix_v_strides[1]
    prefix_limits = tl.where(inside, prefix_length, 0)
    for start in range(0, prefix_length, BLOCK_P):
        k, grad_scores = score_gradients(
            q, grad_y, start, prefix_limits, prefix_k_ptr, prefix_k_strides[2], prefix_k_strides[3], prefix_v_ptr,
            prefix_v_strides[2], prefix_v_strides[3], prefix_length, scale, None, flat, 0, flat, 0, seed_ptr, threshold,
            kept_scale, prefix_lse, prefix_delta, TAIL, E, WIDTH, BLOCK_M, BLOCK_P, PRECISION,
        )  # fmt: skip
        acc = tl.dot(grad_scores.to(dtype), k, acc, input_precision=PRECISION)
    if gate_ptr is not None:
        acc *= gates_of(gate_ptr, head, members, inside, group)[:, None]

    k_ptr += sequence * k_strides[0] + head * k_strides[1]
    v_ptr += sequence * v_strides[0] + head * v_strides[1]
    length = own_length(lengths_ptr, sequence, t_k)
    limits = limits_of(queries, inside, length, t, t_k, CAUSAL)
    seen_by_all = tl.min(tl.where(inside, limits, length), 0) // BLOCK_N * BLOCK_N
    mask_offsets = flat
    if mask_ptr is not None:
        seen_by_all = 0
        mask_offsets = query_offsets(sequence, head, members, queries, group, mask_strides)
    for start in range(0, seen_by_all, BLOCK_N):
        k, grad_scores = score_gradients(
            q, grad_y, start, limits, k_ptr, k_strides[2], k_strides[3], v_ptr, v_strides[2], v_strides[3], length, scale,
            mask_ptr, mask_offsets, mask_strides[3], flat, own_column, seed_ptr, threshold, kept_scale, lse, delta, False, E,
            WIDTH, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        acc = tl.dot(grad_scores.to(dtype), k, acc, input_precision=PRECISION)
    for start in range(seen_by_all, tl.max(limits, 0), BLOCK_N):
        k, grad_scores = score_gradients(
            q, grad_y, start, limits, k_ptr, k_strides[2], k_strides[3], v_ptr, v_strides[2], v_strides[3], length, scale,
            mask_ptr, mask_offsets, mask_strides[3], flat, own_column, seed_ptr, threshold, kept_scale, lse, delta, True, E,
            WIDTH, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        acc = tl.dot(grad_scores.to(dtype), k, acc, input_precision=PRECISION)

    cols = tl.arange(0, WIDTH)
    grad_q_offsets = query_offsets(sequence, head, members, queries, group, grad_q_strides)
    grad_q_ptrs = grad_q_ptr + grad_q_offsets[:, None] + (cols * grad_q_strides[3])[None, :]
    tl.store(grad_q_ptrs, (acc * grad_scale).to(dtype), mask=inside[:, None] & (cols < E)[None, :])


@triton.jit
def add_rows(
    grad_k, grad_v, k, v, keys, limits, flat, inside, q_ptr, q_offsets, q_stride_e, grad_ptr, grad_offsets, grad_stride_e,
    lse_ptr, delta_ptr, gates, scale, mask_ptr, mask_offsets, mask_stride, column, seed_ptr, threshold, kept_scale,
    MASKED: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What BLOCK_M rows add to the gradients of BLOCK_N keys and values; scores and weights are [BLOCK_N, BLOCK_M] here.
    ``column`` is that of the first key in the matrix of dropout."""
    dtype: tl.constexpr = k[0].dtype
    q = factor_tiles(q_ptr, q_offsets, inside, q_stride_e, dtype, E, WIDTH, PRECISION)
    grad_y = factor_tiles(grad_ptr, grad_offsets, inside, grad_stride_e, dtype, E, WIDTH, PRECISION)
    scores = row_products(k, q, PRECISION) * scale
    if MASKED:
        scores, seen = hide(scores, keys[:, None], limits[None, :], mask_ptr, mask_offsets[None, :], mask_stride)
    weights = tl.exp2(scores - saved_lse(lse_ptr, flat, inside)[None, :])
    if gates is not None:
        weights *= gates[None, :]
    kept = weights
    if seed_ptr is not None:
        stays = tl.trans(kept_weights(flat, column, seed_ptr, threshold, kept_scale, BLOCK_M, BLOCK_N))
        kept = weights * stays
    if NEED_V:
        grad_v = tl.dot(kept.to(dtype), grad_y[0], grad_v, input_precision=PRECISION)
    if NEED_K:
        grads = row_products(v, grad_y, PRECISION)
        if seed_ptr is not None:
            grads *= stays
        delta = tl.load(delta_ptr + flat, mask=inside, other=0.0)
        grad_scores = weights * (grads - delta[None, :])
        if MASKED:  # of a row that is NaN, too
            grad_scores = tl.where(seen, grad_scores, 0.0)
        grad_k = tl.dot(grad_scores.to(dtype), q[0], grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def prefix_attention_bwd_keys_kernel(
    grad_ptr, grad_strides, q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, lengths_ptr, mask_ptr, mask_strides, seed_ptr,
    threshold, kept_scale, own_column, scale, grad_scale, b, h_kv, group, t, t_k, lse_ptr, delta_ptr, grad_k_ptr,
    grad_k_strides, grad_v_ptr, grad_v_strides, tiles, CAUSAL: tl.constexpr, TAIL: tl.constexpr, E: tl.constexpr,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N own keys of a sequence and key head, and walks the queries of each of the head's query heads:
    first the tiles of which some see only some of the keys, then the others."""
    sequence, head, tile = head_tile(b, tiles)
    first = tile * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    length = own_length(lengths_ptr, sequence, t_k)
    present = keys < length
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    k_ptr += sequence * k_strides[0] + head * k_strides[1]
    v_ptr += sequence * v_strides[0] + head * v_strides[1]
    k = factor_tiles(k_ptr, keys.to(tl.int64) * k_strides[2], present, k_strides[3], dtype, E, WIDTH, PRECISION)
    v = factor_tiles(v_ptr, keys.to(tl.int64) * v_strides[2], present, v_strides[3], dtype, E, WIDTH, PRECISION)
    grad_k = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    grad_v = tl.zeros((BLOCK_N, WIDTH), tl.float32)

    begin, seen_by_all = tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    if CAUSAL:  # query i sees the keys up to i + t_k - t
        begin = tl.maximum(first - (t_k - t), 0) // BLOCK_M * BLOCK_M
        seen_by_all = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - (t_k - t), 0), BLOCK_M) * BLOCK_M
    if mask_ptr is not None:
        seen_by_all = tl.cast(t, tl.int32)
    end = tl.where(first < length, tl.cast(t, tl.int32), 0)
    for member in range(0, group):
        if CAUSAL or mask_ptr is not None:
            for start in range(begin, tl.minimum(seen_by_all, end), BLOCK_M):
                queries = start + tl.arange(0, BLOCK_M)
                inside = queries < t
                mask_offsets = queries.to(tl.int64)
                if mask_ptr is not None:
                    mask_offsets = query_offsets(sequence, head, member, queries, group, mask_strides)
                grad_k, grad_v = add_rows(
                    grad_k, grad_v, k, v, keys, limits_of(queries, inside, length, t, t_k, CAUSAL),
                    flat_queries(sequence, head, member, queries, h_kv, group, t), inside, q_ptr,
                    query_offsets(sequence, head, member, queries, group, q_strides), q_strides[3], grad_ptr,
                    query_offsets(sequence, head, member, queries, group, grad_strides), grad_strides[3], lse_ptr, delta_ptr,
                    None, scale, mask_ptr, mask_offsets, mask_strides[3], own_column + first, seed_ptr, threshold, kept_scale,
                    True, grad_k_ptr is not None, grad_v_ptr is not None, E, WIDTH, BLOCK_M, BLOCK_N, PRECISION,
                )  # fmt: skip
        for start in range(seen_by_all, end, BLOCK_M):
            queries = start + tl.arange(0, BLOCK_M)
            inside = queries < t
            grad_k, grad_v = add_rows(
                grad_k, grad_v, k, v, keys, limits_of(queries, inside, length, t, t_k, CAUSAL),
                flat_queries(sequence, head, member, queries, h_kv, group, t), inside, q_ptr,
                query_offsets(sequence, head, member, queries, group, q_strides), q_strides[3], grad_ptr,
                query_offsets(sequence, head, member, queries, group, grad_strides), grad_strides[3], lse_ptr, delta_ptr, None,
                scale, None, queries, 0, own_column + first, seed_ptr, threshold, kept_scale, TAIL, grad_k_ptr is not None,
                grad_v_ptr is not None, E, WIDTH, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip

    cols = tl.arange(0, WIDTH)
    mask = (keys < t_k)[:, None] & (cols < E)[None, :]
    if grad_k_ptr is not None:
        grad_k_ptr += sequence * grad_k_strides[0] + head * grad_k_strides[1]
        grad_k_ptrs = grad_k_ptr + (keys.to(tl.int64) * grad_k_strides[2])[:, None] + (cols * grad_k_strides[3])[None, :]
        tl.store(grad_k_ptrs, tl.where(present[:, None], grad_k * grad_scale, 0.0).to(dtype), mask=mask)
    if grad_v_ptr is not None:
        grad_v_ptr += sequence * grad_v_strides[0] + head * grad_v_strides[1]
        grad_v_ptrs = grad_v_ptr + (keys.to(tl.int64) * grad_v_strides[2])[:, None] + (cols * grad_v_strides[3])[None, :]
        tl.store(grad_v_ptrs, tl.where(present[:, None], grad_v, 0.0).to(dtype), mask=mask)


@triton.jit
def prefix_attention_bwd_prefix_kernel(
    grad_ptr, grad_strides, q_ptr, q_strides, prefix_k_ptr, prefix_k_strides, prefix_v_ptr, prefix_v_strides, gate_ptr,
    order_ptr, starts_ptr, seed_ptr, threshold, kept_scale, scale, grad_scale, each, h_kv, group, t, p, g, lse_ptr, delta_ptr,
    grad_k_ptr, grad_v_ptr, tiles, splits, tiles_m, PACKED: tl.constexpr, TAIL: tl.constexpr, E: tl.constexpr,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_P keys of one of ``g`` prefixes and a share of the rows that see them, and walks these sequence by
    sequence. Its sums go to the plane of that share."""
    tile, index = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, index = (index % h_kv).to(tl.int64), index // h_kv
    owner, split = (index % g).to(tl.int64), index // g
    keys = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    present = keys < p
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    prefix_k_ptr += owner * prefix_k_strides[0] + head * prefix_k_strides[1]
    prefix_v_ptr += owner * prefix_v_strides[0] + head * prefix_v_strides[1]
    k_offsets = keys.to(tl.int64) * prefix_k_strides[2]
    k = factor_tiles(prefix_k_ptr, k_offsets, present, prefix_k_strides[3], dtype, E, WIDTH, PRECISION)
    v_offsets = keys.to(tl.int64) * prefix_v_strides[2]
    v = factor_tiles(prefix_v_ptr, v_offsets, present, prefix_v_strides[3], dtype, E, WIDTH, PRECISION)
    grad_k = tl.zeros((BLOCK_P, WIDTH), tl.float32)
    grad_v = tl.zeros((BLOCK_P, WIDTH), tl.float32)

    first, sequences = owner * each, each
    if starts_ptr is not None:
        first = tl.load(starts_ptr + owner).to(tl.int64)
        sequences = (tl.load(starts_ptr + owner + 1) - first).to(tl.int32)
    share = tl.cdiv(sequences * tiles_m, splits)
    for item in range(split * share, tl.minimum((split + 1) * share, sequences * tiles_m)):
        sequence = first + item // tiles_m
        if order_ptr is not None:
            sequence = tl.load(order_ptr + sequence).to(tl.int64)
        members, queries, inside = tile_queries(item % tiles_m, t, group, PACKED, BLOCK_M)
        gates = None
        if gate_ptr is not None:
            gates = gates_of(gate_ptr, head, members, inside, group)
        grad_k, grad_v = add_rows(
            grad_k, grad_v, k, v, keys, tl.where(inside, p, 0),
            flat_queries(sequence, head, members, queries, h_kv, group, t), inside, q_ptr,
            query_offsets(sequence, head, members, queries, group, q_strides), q_strides[3], grad_ptr,
            query_offsets(sequence, head, members, queries, group, grad_strides), grad_strides[3], lse_ptr, delta_ptr, gates,
            scale, None, queries, 0, tile * BLOCK_P, seed_ptr, threshold, kept_scale, TAIL, grad_k_ptr is not None,
            grad_v_ptr is not None, E, WIDTH, BLOCK_M, BLOCK_P, PRECISION,
        )  # fmt: skip

    cols = tl.arange(0, WIDTH)
    places = (((split * tl.cast(g, tl.int64) + owner) * h_kv + head) * p + keys)[:, None] * E + cols[None, :]
    mask = present[:, None] & (cols < E)[None, :]
    if grad_k_ptr is not None:
        tl.store(grad_k_ptr + places, (grad_k * grad_scale).to(grad_k_ptr.dtype.element_ty), mask=mask)
    if grad_v_ptr is not None:
        tl.store(grad_v_ptr + places, grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def prefix_attention_bwd_reduce_kernel(planes_ptr, grad_ptr, n, splits, BLOCK_E: tl.constexpr):
    """A program owns BLOCK_E elements of a gradient and adds the planes in order."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    grad = sum_planes(planes_ptr, 0, splits, n, elements, elements < n)
    tl.store(grad_ptr + elements, grad.to(grad_ptr.dtype.element_ty), mask=elements < n)
