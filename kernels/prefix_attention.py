"""Triton kernels of prefix_attention: a program owns rows of a key head and walks the prefix, then the own keys."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._attention import (
    LN2,
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
    tile_queries,
)  # fmt: skip
from ._common import PROGRAMS, WGMMA, Tiles, bank_rows, dense, dropout_constants, precision, shared_memory
from .prefix_attention_bwd import (
    prefix_attention_bwd_delta_kernel,
    prefix_attention_bwd_keys_kernel,
    prefix_attention_bwd_prefix_kernel,
    prefix_attention_bwd_queries_kernel,
    prefix_attention_bwd_reduce_kernel,
)  # fmt: skip

# Tiles by the bytes of an element and the width of a head: rows that a program owns, those that it walks at a time, warps, and
# whether masks, dropout or a gate fit the registers beside it. The last one of a key suits every call; all of a key walk alike,
# since how many sequences there are chooses among them, and may change no bit of one.
_ALL = 0 if WGMMA else 1
_ROW_TILES = Tiles(
    {
        (2, 64): ((128, 64, 8, True), (16, 64, 4, True))[_ALL:],
        (2, 128): ((128, 64, 8, False), (64, 64, 8, True), (16, 64, 4, True))[2 * _ALL :],
        (2, 256): ((64, 32, 8, False), (32, 32, 8, True))[_ALL:],
        (4, 64): ((32, 32, 8, True), (16, 32, 8, True)),
        (4, 128): ((16, 32, 8, True),),
        (4, 256): ((16, 16, 8, True),),
    }
)
_QUERY_TILES = Tiles(
    {
        (2, 64): ((64, 32, 4, True), (16, 32, 4, True))[_ALL:],
        (2, 128): ((64, 32, 4, True), (16, 32, 4, True))[_ALL:],
        (2, 256): ((32, 32, 8, True),),
        (4, 64): ((32, 32, 8, True),),
        (4, 128): ((16, 32, 8, True),),
        (4, 256): ((16, 16, 8, True),),
    }
)
_KEY_TILES = Tiles(
    {
        (2, 64): ((64, 32, 4, False), (32, 32, 4, True))[_ALL:],
        (2, 128): ((32, 32, 4, False), (32, 32, 8, True)),
        (2, 256): ((32, 32, 8, True),),
        (4, 64): ((32, 32, 8, True),),
        (4, 128): ((32, 16, 8, True),),
        (4, 256): ((16, 16, 8, True),),
    }
)
_Wanted = NamedTuple("_Wanted", [(name, bool) for name in ("q", "k", "v", "prefix_k", "prefix_v", "gate")])


@triton.jit
def attend(
    acc, total, top, q, start, limits, k_ptr, k_stride_t, k_stride_e, v_ptr, v_stride_t, v_stride_e, length, scale, mask_ptr,
    mask_offsets, mask_stride, rows, column, seed_ptr, threshold, MASKED: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: BLOCK_N keys from ``start``. ``column`` is that of key 0 in the matrix of dropout."""
    keys = start + tl.arange(0, BLOCK_N)
    present = None
    if MASKED:
        present = keys < length
    dtype: tl.constexpr = q[0].dtype
    k = factor_tiles(k_ptr, keys.to(tl.int64) * k_stride_t, present, k_stride_e, dtype, E, WIDTH, PRECISION)
    scores = row_products(q, k, PRECISION) * scale  # [BLOCK_M, BLOCK_N]
    if MASKED:
        scores, _ = hide(scores, keys[None, :], limits[:, None], mask_ptr, mask_offsets[:, None], mask_stride)
    highest = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # no key seen so far
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, 1)
    if seed_ptr is not None:
        weights *= kept_weights(rows, column + start, seed_ptr, threshold, 1.0, BLOCK_M, BLOCK_N)
    v = rows_tile(v_ptr, keys.to(tl.int64) * v_stride_t, present, v_stride_e, dtype, E, WIDTH)
    acc = tl.dot(weights.to(dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, total, highest


@triton.jit
def attended(acc, total, top, kept_scale):
    """The output of a softmax, 0 where it saw no key, and its natural logarithm of the sum of exponentials."""
    y = tl.where((total == 0)[:, None], 0.0, acc * (kept_scale / total)[:, None])
    return y, tl.where(total == 0, float("-inf"), (top + tl.log2(total)) * LN2)


@triton.jit
def prefix_attention_fwd_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, prefix_k_ptr, prefix_k_strides, prefix_v_ptr, prefix_v_strides,
    gate_ptr, lengths_ptr, mask_ptr, mask_strides, ids_ptr, seed_ptr, threshold, kept_scale, own_column, scale, b, h_kv, group,
    t, t_k, p, g, y_ptr, y_strides, lse_ptr, tiles, CAUSAL: tl.constexpr, ALONE: tl.constexpr, PACKED: tl.constexpr,
    TAIL: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows of a key head: the prefix first, BLOCK_P keys at a time, then own keys that all rows see,
    then those that some don't. With a gate, what the prefix gave is set aside before the own keys."""
    sequence, head, tile = head_tile(b, tiles)
    members, queries, inside = tile_queries(tile, t, group, PACKED, BLOCK_M)
    flat = flat_queries(sequence, head, members, queries, h_kv, group, t)
    q_offsets = query_offsets(sequence, head, members, queries, group, q_strides)
    q = factor_tiles(q_ptr, q_offsets, inside, q_strides[3], q_ptr.dtype.element_ty, E, WIDTH, PRECISION)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = total + float("-inf")

    owner, prefix_length, valid = prefix_of(ids_ptr, sequence, p, g, ALONE)
    prefix_k_ptr += owner * prefix_k_strides[0] + head * prefix_k_strides[1]
    prefix_v_ptr += owner * prefix_v_strides[0] + head * prefix_v_strides[1]
    prefix_limits = tl.where(inside, prefix_length, 0)
    for start in range(0, prefix_length, BLOCK_P):
        acc, total, top = attend(
            acc, total, top, q, start, prefix_limits, prefix_k_ptr, prefix_k_strides[2], prefix_k_strides[3], prefix_v_ptr,
            prefix_v_strides[2], prefix_v_strides[3], prefix_length, scale, None, flat, 0, flat, 0, seed_ptr, threshold, TAIL,
            E, WIDTH, BLOCK_M, BLOCK_P, PRECISION,
        )  # fmt: skip
    if gate_ptr is not None:
        prefix_y, prefix_lse = attended(acc, total, top, kept_scale)
        prefix_y *= gates_of(gate_ptr, head, members, inside, group)[:, None]
        acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        top = total + float("-inf")

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
        acc, total, top = attend(
            acc, total, top, q, start, limits, k_ptr, k_strides[2], k_strides[3], v_ptr, v_strides[2], v_strides[3], length,
            scale, mask_ptr, mask_offsets, mask_strides[3], flat, own_column, seed_ptr, threshold, False, E, WIDTH, BLOCK_M,
            BLOCK_N, PRECISION,
        )  # fmt: skip
    for start in range(seen_by_all, tl.max(limits, 0), BLOCK_N):
        acc, total, top = attend(
            acc, total, top, q, start, limits, k_ptr, k_strides[2], k_strides[3], v_ptr, v_strides[2], v_strides[3], length,
            scale, mask_ptr, mask_offsets, mask_strides[3], flat, own_column, seed_ptr, threshold, True, E, WIDTH, BLOCK_M,
            BLOCK_N, PRECISION,
        )  # fmt: skip

    y, lse = attended(acc, total, top, kept_scale)
    if gate_ptr is not None:
        y += prefix_y
    if ids_ptr is not None:  # an id outside the bank spoils its sequence
        y = tl.where(valid, y, float("nan"))
        lse = tl.where(valid, lse, float("nan"))
    cols = tl.arange(0, WIDTH)
    y_ptrs = y_ptr + query_offsets(sequence, head, members, queries, group, y_strides)[:, None] + (cols * y_strides[3])[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (cols < E)[None, :])
    if lse_ptr is not None:
        tl.store(lse_ptr + flat, lse, mask=inside)
        if gate_ptr is not None:
            if ids_ptr is not None:
                prefix_lse = tl.where(valid, prefix_lse, float("nan"))
            tl.store(lse_ptr + tl.cast(b, tl.int64) * h_kv * group * t + flat, prefix_lse, mask=inside)


class _Call:
    """What the kernels of one call share: its tensors as they are read, its sizes and its tiles."""

    def __init__(
        self, q, k, v, prefix_k, prefix_v, gate, is_causal, key_lengths, attn_mask, scale, dropout_p, seed, adapter_ids
    ):  # fmt: skip
        self.q = q
        self.b, h, self.t, self.e = q.shape
        self.causal = is_causal
        self.h_kv, self.t_k, self.p = k.shape[1], k.shape[2], prefix_k.shape[-2]
        self.group, self.item = h // self.h_kv, q.element_size()
        self.width = max(16, triton.next_power_of_2(self.e))
        self.key = self.item, max(64, self.width)
        self.alone = prefix_k.dim() == 4 and adapter_ids is None
        self.g = prefix_k.shape[0] if prefix_k.dim() == 4 else 1
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.view(torch.uint8)
        strided = lambda t: (t, (0, 0, 0, 0) if t is None else (0,) * (4 - t.dim()) + t.stride())  # noqa: E731
        self.queries, self.keys, self.values, self.mask = strided(q), strided(k), strided(v), strided(attn_mask)
        self.prefixes = *strided(prefix_k), *strided(prefix_v)
        self.gate, self.lengths, self.ids = dense(gate, key_lengths, adapter_ids)
        self.loaded = bool(dropout_p) or attn_mask is not None or gate is not None
        self.dropout = seed, *dropout_constants(dropout_p), (self.p + 7) // 8 * 8
        self.scale, self.grad_scale = scale * 1.4426950408889634, scale
        self.sizes = self.b, self.h_kv, self.group, self.t, self.t_k, self.p, self.g
        self.common = {"E": self.e, "WIDTH": self.width, "PRECISION": precision(q), "enable_fp_fusion": True}
        self.strided = strided

    def tiles(self, block_m):
        """Tiles of BLOCK_M rows of a key head. Heads of fewer queries share a tile."""
        packed = self.t < block_m
        return triton.cdiv(self.group * self.t, block_m) if packed else self.group * triton.cdiv(self.t, block_m), packed

    def pick(self, table, programs):
        """The first tile that the call fits and of which there are enough to fill a GPU."""
        return table.pick(self.key, lambda tile: (tile[3] or not self.loaded) and programs(tile[0]) >= PROGRAMS // 2)[:3]

    def row_tile(self, table):
        """Of rows of a key head: the keys that a program walks at a time, its warps, the tiles of a head, and its rows."""
        block_m, block_n, warps = self.pick(table, lambda block_m: self.tiles(block_m)[0] * self.b * self.h_kv)
        tiles, packed = self.tiles(block_m)
        return block_n, warps, tiles, {"BLOCK_M": block_m, "PACKED": packed}

    def prefix_tile(self, limit):
        """Keys of the prefix that are walked at a time: no more than there are. Whether the last ones are fewer."""
        block_p = min(limit, max(16, triton.next_power_of_2(self.p)))
        return {"BLOCK_P": block_p, "TAIL": self.p % block_p != 0}

    def options(self, warps, resident, streamed):
        """Launch options: up to 3 tiles of ``streamed`` rows of keys and values in flight beside those that stay."""
        shared, lanes = shared_memory(self.q)
        room = shared - resident * self.width * self.item
        in_flight = room // (streamed * self.width * max(self.item, self.prefixes[0].element_size()))
        stages = max(2 if lanes == 32 else 1, min(3, in_flight))  # with one, tiles of float32 spill on their way to products
        return {"num_warps": warps if lanes == 32 else 4, "num_stages": stages} | self.common

    def forward(self, y, lse):
        block_n, warps, tiles, rows = self.row_tile(_ROW_TILES)
        prefix_attention_fwd_kernel[(tiles * self.b * self.h_kv,)](
            *self.queries, *self.keys, *self.values, *self.prefixes, self.gate, self.lengths, *self.mask, self.ids,
            *self.dropout, self.scale, *self.sizes, y, y.stride(), lse, tiles, CAUSAL=self.causal, ALONE=self.alone,
            BLOCK_N=block_n, **rows, **self.prefix_tile(block_n), **self.options(warps, rows["BLOCK_M"], 2 * block_n),
        )  # fmt: skip


def prefix_attention_fwd(
    q, k, v, prefix_k, prefix_v, gate, is_causal, key_lengths, attn_mask, scale, dropout_p, seed, adapter_ids, keep_lse
):  # fmt: skip
    b, h, t, e = q.shape
    y = q.new_empty(b, t, h, e).transpose(1, 2)
    lse = q.new_empty((1 if gate is None else 2, b, h, t) if keep_lse else 0, dtype=torch.float32)
    if not y.numel():
        return y, lse
    with torch.cuda.device_of(q):
        call = _Call(
            q, k, v, prefix_k, prefix_v, gate, is_causal, key_lengths, attn_mask, scale, dropout_p, seed, adapter_ids
        )
        call.forward(y, lse if keep_lse else None)
    return y, lse


class _Backward(_Call):
    """One call of the backward pass: what it was given, and its steps."""

    def __init__(self, grad_y, y, lse, *arguments):
        super().__init__(*arguments)
        self.grad_y, self.y, self.lse = self.strided(grad_y), self.strided(y), lse.contiguous()
        self.delta = None

    def deltas(self):
        """Of every row the sum of weights times their gradients; with a gate, that of the prefix in a plane of its own."""
        block_n, warps, tiles, rows = self.row_tile(_QUERY_TILES)
        prefix = self.prefix_tile(block_n)
        self.delta = torch.empty_like(self.lse)
        seed, threshold, kept_scale, _ = self.dropout
        b, h_kv, group, t, _, p, g = self.sizes
        prefix_attention_bwd_delta_kernel[(tiles * self.b * self.h_kv,)](
            *self.grad_y, *self.y, *self.queries, *self.prefixes, self.gate, self.ids, seed, threshold, kept_scale, self.scale,
            b, h_kv, group, t, p, g, self.lse, self.delta, tiles, ALONE=self.alone, **rows, **prefix,
            **self.options(warps, 2 * rows["BLOCK_M"], 2 * prefix["BLOCK_P"]),
        )  # fmt: skip

    def of_queries(self, grad_q):
        block_n, warps, tiles, rows = self.row_tile(_QUERY_TILES)
        prefix_attention_bwd_queries_kernel[(tiles * self.b * self.h_kv,)](
            *self.grad_y, *self.queries, *self.keys, *self.values, *self.prefixes, self.gate, self.lengths, *self.mask,
            self.ids, *self.dropout, self.scale, self.grad_scale, *self.sizes, self.lse, self.delta, grad_q, grad_q.stride(),
            tiles, CAUSAL=self.causal, ALONE=self.alone, BLOCK_N=block_n, **rows, **self.prefix_tile(block_n),
            **self.options(warps, 2 * rows["BLOCK_M"], 2 * block_n),
        )  # fmt: skip

    def of_keys(self, grad_k, grad_v):
        b, h_kv, group, t, t_k, _, _ = self.sizes
        programs = lambda block_n: b * h_kv * triton.cdiv(t_k, block_n)  # noqa: E731
        block_n, block_m, warps = self.pick(_KEY_TILES, programs)
        prefix_attention_bwd_keys_kernel[(programs(block_n),)](
            *self.grad_y, *self.queries, *self.keys, *self.values, self.lengths, *self.mask, *self.dropout, self.scale,
            self.grad_scale, b, h_kv, group, t, t_k, self.lse, self.delta, *self.strided(grad_k), *self.strided(grad_v),
            triton.cdiv(t_k, block_n), CAUSAL=self.causal, TAIL=t % block_m != 0, BLOCK_M=block_m, BLOCK_N=block_n,
            **self.options(warps, 2 * block_n, 2 * block_m),
        )  # fmt: skip

    def of_prefix(self, grads):
        """Sums over the rows that see a prefix: its programs share them out, and their sums are added in order."""
        b, h_kv, group, t, _, p, _ = self.sizes
        block_n, block_m, warps = self.pick(_KEY_TILES, lambda block_n: PROGRAMS if p >= block_n else 0)
        block_p = self.prefix_tile(block_n)["BLOCK_P"]
        tiles, (tiles_m, packed) = triton.cdiv(p, block_p), self.tiles(block_m)
        owners, sequences = (b, 1) if self.alone else (self.g, b)
        splits = max(1, min(PROGRAMS // (owners * h_kv * tiles), sequences * tiles_m))
        order = starts = None
        if self.ids is not None:
            order, starts = bank_rows(self.ids, self.q[:, 0, 0], self.g)
        planes = grads
        if splits > 1:
            shape = splits, *self.prefixes[0].shape
            planes = [g if g is None else g.new_empty(shape, dtype=torch.float32) for g in grads]
        lse, delta = (t if t is None else t[-1] for t in (self.lse, self.delta))
        seed, threshold, kept_scale, _ = self.dropout
        prefix_attention_bwd_prefix_kernel[(splits * owners * h_kv * tiles,)](
            *self.grad_y, *self.queries, *self.prefixes, self.gate, order, starts, seed, threshold, kept_scale, self.scale,
            self.grad_scale, sequences, h_kv, group, t, p, owners, lse, delta, *planes, tiles, splits, tiles_m,
            PACKED=packed, TAIL=(group * t if packed else t) % block_m != 0, BLOCK_P=block_p, BLOCK_M=block_m,
            **self.options(warps, 2 * block_p, 2 * block_m),
        )  # fmt: skip
        for grad, plane in zip(grads, planes):
            if grad is not plane:
                n, block = grad.numel(), 256
                prefix_attention_bwd_reduce_kernel[(triton.cdiv(n, block),)](
                    plane, grad, n, splits, BLOCK_E=block, enable_fp_fusion=True
                )

    def run(self, want, grad_q, grad_k, grad_v, grad_prefix_k, grad_prefix_v, grad_gate):
        """Writes the gradients that aren't None."""
        if want.q or want.k or want.prefix_k or want.gate:
            self.deltas()
        if want.q:
            self.of_queries(grad_q)
        if (want.k or want.v) and self.t_k:
            self.of_keys(grad_k, grad_v)
        if (want.prefix_k or want.prefix_v) and self.prefixes[0].numel():
            self.of_prefix([grad_prefix_k, grad_prefix_v])
        if want.gate:
            grad_gate.copy_(self.delta[1].sum((0, 2)))


def prefix_attention_bwd(
    grad_y, y, lse, q, k, v, prefix_k, prefix_v, gate, is_causal, key_lengths, attn_mask, scale, dropout_p, seed, adapter_ids,
    output_mask,
):  # fmt: skip
    want = _Wanted(*output_mask)
    inputs = (q, k, v, prefix_k, prefix_v, gate)
    new = q.new_empty if grad_y.numel() else q.new_zeros
    by_token = lambda t: new(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2)  # noqa: E731
    grads = [by_token(t) if wanted else None for t, wanted in zip(inputs[:3], want)]
    grads += [new(t.shape, dtype=t.dtype) if wanted else None for t, wanted in zip(inputs[3:], want[3:])]
    if grad_y.numel():
        with torch.cuda.device_of(q):
            call = _Backward(
                grad_y, y, lse, q, k, v, prefix_k, prefix_v, gate, is_causal, key_lengths, attn_mask, scale, dropout_p, seed,
                adapter_ids,
            )  # fmt: skip
            call.run(want, *grads)
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)
