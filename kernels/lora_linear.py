"""Triton kernels of lora_linear: one product ``[x | u * c] [weight | lora_b].T`` for the frozen layer and the LoRA branch."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import (
    PROGRAMS,
    WGMMA,
    Tiles,
    bank_rows,
    dense,
    dropout_constants,
    dropout_keeps,
    precision,
    project,
    row_offsets,
    rows_of,
    shared_memory,
)  # fmt: skip
from .lora_linear_bwd import lora_linear_bwd_columns_kernel, lora_linear_bwd_reduce_kernel, rank_tile

# Tiles of the kernel that owns rows, by the bytes of an element and BLOCK_R: BLOCK_M, BLOCK_D.
_LOW = ((64, 64), (32, 128), (16, 128))[0 if WGMMA else 1 :]
_ROW_TILES = Tiles(
    {(2, r): _LOW if r <= 32 else ((32, 64), (16, 64)) for r in (16, 32, 64, 128, 256)}
    | {(4, r): ((32, 32), (16, 32)) if r <= 64 else ((16, 16),) for r in (16, 32, 64, 128, 256)}
)
# Tiles of the product: BLOCK_M, BLOCK_N, BLOCK_D. The addresses of 16-bit elements that can't be loaded in wide pieces take
# registers.
_PRODUCT_TILES = Tiles(
    {
        "16-bit": ((128, 128, 64), (64, 64, 64), (32, 64, 128))[0 if WGMMA else 2 :],
        "16-bit of odd widths": ((32, 64, 32),),
        "float32": ((64, 64, 16), (32, 32, 32)),
    }
)
# BLOCK_M and BLOCK_D of the kernel that owns columns. Wide tiles of low ranks let it multiply by lora_b too: see over_grad_y.
_COLUMN_TILES = Tiles(
    {(2, r): ((32, (128 if r == 16 else 64) if WGMMA else 32),) for r in (16, 32, 64, 128, 256)}
    | {(4, r): ((32, 64 if r == 16 else 32) if r <= 32 else (16, 32) if r == 64 else (16, 16),) for r in (16, 32, 64, 128, 256)}
)
_Wanted = NamedTuple("_Wanted", [(name, bool) for name in ("x", "weight", "bias", "lora_a", "lora_b", "diagonal", "gain")])


@triton.jit
def tile_of_bank(rows, inside, ids_ptr, rows_per_id, order_ptr, g):
    """The rows of a tile of a bank's call, in the order of adapters if there is one, the id of each, and the first adapter
    that the tile has rows of and the one after the last."""
    if order_ptr is not None:
        rows = tl.load(order_ptr + rows, mask=inside, other=0)
    ids = tl.load(ids_ptr + rows // rows_per_id, mask=inside, other=0).to(tl.int64)
    here = inside & (ids >= 0) & (ids < g)
    return rows, ids, tl.min(tl.where(here, ids, g), 0).to(tl.int32), tl.max(tl.where(here, ids + 1, 0), 0).to(tl.int32)


@triton.jit
def lora_linear_rank_kernel(
    left_ptr, left_table_ptr, left_stride_m, left_stride_d, gain_ptr, weight_ptr, weight_stride_d, weight_stride_r,
    weight_stride_g, seed_ptr, threshold, kept_scale, out_ptr, ids_ptr, rows_per_id, order_ptr, m, d, g, R: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows of ``out = dropout(left * gain) @ weight``, (m, R), and walks d once. In a bank it walks d
    once for BLOCK_R of the ranks of all adapters, those that it has no rows of at either end left out, and a row stores those
    of its own."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    inside = rows < m
    first, last = 0, 1
    if ids_ptr is not None:
        rows, ids, low, high = tile_of_bank(rows, inside, ids_ptr, rows_per_id, order_ptr, g)
        first, last = low * R, high * R
    offsets = row_offsets(rows, inside, left_table_ptr, left_stride_m)
    for begin in range(first, last, BLOCK_R):
        out = project(
            left_ptr, offsets, inside, left_stride_d, weight_ptr, weight_stride_d, weight_stride_r, d, None, None, None, None,
            gain_ptr, R, BLOCK_R, BLOCK_M, BLOCK_D, PRECISION, rows, seed_ptr, threshold, weight_stride_g, begin, last,
        )  # fmt: skip
        if seed_ptr is not None:
            out *= kept_scale
        if ids_ptr is None:
            tl.store(out_ptr + rows[:, None] * R + ranks[None, :], out, mask=inside[:, None] & (ranks < R)[None, :])
        else:
            own = inside[:, None] & (ids[:, None] == ((begin + ranks) // R)[None, :])
            tl.store(out_ptr + rows[:, None] * R + ((begin + ranks) % R)[None, :], out, mask=own)
    if ids_ptr is not None:
        none = inside[:, None] & ((ids < 0) | (ids >= g))[:, None] & (ranks < R)[None, :]
        tl.store(out_ptr + rows[:, None] * R + ranks[None, :], tl.zeros((BLOCK_M, BLOCK_R), tl.float32), mask=none)


@triton.jit
def lora_linear_product_kernel(
    left_ptr, left_table_ptr, left_stride_m, left_stride_d, left_gain_ptr, weight_ptr, weight_stride_d, weight_stride_n,
    rank_ptr, side_ptr, side_stride_r, side_stride_n, side_stride_g, diagonal_ptr, scale_value, seed_ptr, threshold,
    kept_scale, gain_ptr, bias_ptr, z_ptr, out_ptr, ids_ptr, rows_per_id, order_ptr, m, n, d, g, tiles_m,
    R: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of ``out = gain * ((left * left_gain) @ weight + dropout((rank * c) @ side)) + bias``: first the
    product over the ranks, in steps of BLOCK_R, then that over d. In a bank the steps are those of the adapters from the first
    to the last that it has rows of, and a row adds those of its own alone, so that nothing of another adapter can reach it.
    ``z`` gets ``out`` before gain and bias, for backward. Eight tiles of rows take turns on each tile of columns, so that both
    operands come from the L2 cache."""
    dtype: tl.constexpr = left_ptr.dtype.element_ty
    tiles_n = tl.cdiv(n, BLOCK_N)
    group = tl.program_id(0) // (8 * tiles_n)
    height = tl.minimum(tiles_m - group * 8, 8)
    place = tl.program_id(0) % (8 * tiles_n)
    rows = (group * 8 + place % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = (place // height).to(tl.int64) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    inside, valid = rows < m, cols < n

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ids_ptr is None:
        for first in tl.static_range(0, R, BLOCK_R):
            ranks = first + tl.arange(0, BLOCK_R)
            low = rank_tile(rank_ptr, rows, inside, ranks, diagonal_ptr, scale_value, R).to(dtype)  # [BLOCK_M, BLOCK_R]
            side_ptrs = side_ptr + ranks.to(tl.int64)[:, None] * side_stride_r + cols[None, :] * side_stride_n
            side = tl.load(side_ptrs, mask=(ranks < R)[:, None] & valid[None, :], other=0.0).to(dtype)  # [BLOCK_R, BLOCK_N]
            acc = tl.dot(low, side, acc, input_precision=PRECISION)
    else:
        STEPS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
        rows, ids, lowest, highest = tile_of_bank(rows, inside, ids_ptr, rows_per_id, order_ptr, g)
        for step in range(lowest * STEPS, highest * STEPS):
            adapter = (step // STEPS).to(tl.int64)
            ranks = step % STEPS * BLOCK_R + tl.arange(0, BLOCK_R)
            own, c_ptr = inside & (ids == adapter), diagonal_ptr
            if diagonal_ptr is not None:
                c_ptr = diagonal_ptr + adapter * R
            low = rank_tile(rank_ptr, rows, own, ranks, c_ptr, scale_value, R).to(dtype)
            side_ptrs = side_ptr + adapter * side_stride_g + ranks.to(tl.int64)[:, None] * side_stride_r
            side_ptrs += cols[None, :] * side_stride_n
            side = tl.load(side_ptrs, mask=(ranks < R)[:, None] & valid[None, :], other=0.0).to(dtype)
            acc = tl.where(own[:, None], tl.dot(low, side, acc, input_precision=PRECISION), acc)
    if seed_ptr is not None:
        acc = tl.where(dropout_keeps(rows, first_col, seed_ptr, threshold, BLOCK_M, BLOCK_N), acc * kept_scale, 0.0)
    if ids_ptr is not None:  # an id outside the bank spoils its row
        acc = tl.where(((ids >= -1) & (ids < g))[:, None], acc, float("nan"))

    inner = tl.arange(0, BLOCK_D).to(tl.int64)
    left_ptrs = left_ptr + row_offsets(rows, inside, left_table_ptr, left_stride_m)[:, None] + inner[None, :] * left_stride_d
    weight_ptrs = weight_ptr + inner[:, None] * weight_stride_d + cols[None, :] * weight_stride_n
    for start in range(0, d, BLOCK_D):
        begin = tl.cast(start, tl.int64)
        deep = inner < d - begin
        left = tl.load(left_ptrs + begin * left_stride_d, mask=inside[:, None] & deep[None, :], other=0.0)
        if left_gain_ptr is not None:
            left_gain = tl.load(left_gain_ptr + begin + inner, mask=deep, other=0.0).to(tl.float32)
            left = (left.to(tl.float32) * left_gain[None, :]).to(dtype)  # [BLOCK_M, BLOCK_D]
        weight = tl.load(weight_ptrs + begin * weight_stride_d, mask=deep[:, None] & valid[None, :], other=0.0)
        acc = tl.dot(left, weight, acc, input_precision=PRECISION)
    places, within = rows[:, None] * n + cols[None, :], inside[:, None] & valid[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + places, acc.to(dtype), mask=within)
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + places, acc.to(dtype), mask=within)


def _options(x, warps, tile_bytes, together):
    """Launch options: up to 4 tiles of ``tile_bytes`` in flight, as many as leave room for ``together`` programs."""
    shared, lanes = shared_memory(x)
    stages = max(1, min(4, max(shared // together // tile_bytes, min(2, shared // tile_bytes))))
    return {"num_warps": warps if lanes == 32 else 4, "num_stages": stages, "enable_fp_fusion": True}


_KEEP_ALL = (None, 0, 1.0)
# Ranks of all adapters of a bank together, above which its rows are sorted by adapter; below it the tiles of unsorted rows,
# which go over the adapters between their lowest and highest, cost less than the sort.
_UNSORTED = 256


def _strides(t, transposed=False):
    """Strides of a matrix, or of the matrices of a bank, and from one to the next."""
    strides = t.stride()[-2:]
    return *(strides[::-1] if transposed else strides), t.stride(0) if t.dim() == 3 else None


class _Call:
    """What the kernels of one call share: the LoRA branch, and the products that both directions are made of."""

    def __init__(self, x, lora_a, lora_b, diagonal, gain, scale, dropout_p, seed, adapter_ids):
        self.x, self.lora_a, self.lora_b, self.diagonal, self.gain, self.scale = x, lora_a, lora_b, diagonal, gain, scale
        self.m, self.r, self.item = x.shape[:-1].numel(), lora_a.shape[-2], x.element_size()
        self.block_r = self.rank_block = max(16, triton.next_power_of_2(self.r))
        self.adapter_ids, self.g, self.bank, self.step, self._sorted = adapter_ids, 1, (None, None, None), 32, None
        if adapter_ids is not None:
            self.g, ids = lora_a.shape[0], adapter_ids.reshape(-1).contiguous()
            all_ranks = self.g * self.r
            # Several adapters of low rank at a time; on a GPU float32 is multiplied without matrix units.
            self.rank_block = max(self.block_r, min(triton.next_power_of_2(all_ranks), 128 // self.item))
            order = self.sorted()[0] if all_ranks > _UNSORTED else None
            self.bank = ids, max(1, self.m // max(1, ids.numel())), order
            self.step = 16  # of the product over the ranks; what its rows have so far takes registers too
        self.odd = (x.shape[-1] | lora_b.shape[0]) % 8 != 0  # by shapes: strides of grad_y may change no bit
        self.dropout = (seed, *dropout_constants(dropout_p))
        self.x_rows = (x, *rows_of(x), x.stride(-1))

    def sorted(self):
        """``(order, starts)`` of ``bank_rows``."""
        if self._sorted is None:
            self._sorted = bank_rows(self.adapter_ids, self.x, self.g)
        return self._sorted

    def ranks(self, rows, d, gain, weight, weight_strides, dropout):
        """``dropout(rows * gain) @ weight``: float32, (m, r); zero in the rows without an adapter."""
        out, block_r = self.x.new_empty((self.m, self.r), dtype=torch.float32), self.rank_block
        block_m, block_d = _ROW_TILES.pick(
            (self.item, block_r), lambda tile: tile[0] == 16 or triton.cdiv(self.m, tile[0]) >= PROGRAMS // 2
        )
        tile_bytes = block_d * (block_m * self.item + block_r * weight.element_size())
        lora_linear_rank_kernel[(triton.cdiv(self.m, block_m),)](
            *rows, gain, weight, *weight_strides, *dropout, out, *self.bank, self.m, d, self.g, R=self.r,
            PRECISION=precision(self.x), BLOCK_R=block_r, BLOCK_M=block_m, BLOCK_D=block_d,
            **_options(self.x, 4 if block_r <= 64 else 8, tile_bytes, 2),
        )  # fmt: skip
        return out

    def product(self, rows, d, left_gain, weight, weight_strides, ranks, side, side_strides, dropout, gain, bias, z, out):
        """``out = gain * z + bias`` where ``z = rows * left_gain @ weight + dropout(ranks * c @ side)``, kept if not None."""
        if not out.numel():
            return out
        n, (shared, _) = out.shape[-1], shared_memory(self.x)

        def suits(tile):
            block_m, block_n, block_d = tile
            programs = triton.cdiv(self.m, block_m) * triton.cdiv(n, block_n)
            return programs >= PROGRAMS // 2 and 2 * (block_m + block_n) * block_d * self.item <= shared

        kind = "float32" if self.item == 4 else "16-bit of odd widths" if self.odd else "16-bit"
        block_m, block_n, block_d = _PRODUCT_TILES.pick(kind, suits)
        tiles_m = triton.cdiv(self.m, block_m)
        lora_linear_product_kernel[(tiles_m * triton.cdiv(n, block_n),)](
            *rows, left_gain, weight, *weight_strides, ranks, side, *side_strides, self.diagonal, self.scale, *dropout, gain,
            bias, z, out, *self.bank, self.m, n, d, self.g, tiles_m, R=self.r, PRECISION=precision(self.x),
            BLOCK_R=min(self.block_r, block_d, self.step), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
            **_options(self.x, 8 if block_m * block_n >= 2**14 else 4, (block_m + block_n) * block_d * self.item, 1),
        )  # fmt: skip
        return out


def lora_linear_fwd(x, weight, bias, lora_a, lora_b, diagonal, gain, scale, dropout_p, seed, adapter_ids, keep_z):
    n, k = weight.shape
    y = x.new_empty((*x.shape[:-1], n))
    z = x.new_empty(y.shape if keep_z else 0)
    bias, diagonal, gain = dense(bias, diagonal, gain)
    with torch.cuda.device_of(x):
        call = _Call(x, lora_a, lora_b, diagonal, gain, scale, dropout_p, seed, adapter_ids)
        if not call.m:
            return y, x.new_empty((0, call.r), dtype=torch.float32), z
        u = call.ranks(call.x_rows, k, None, lora_a, _strides(lora_a, True), call.dropout)
        side = lora_b, _strides(lora_b, True)
        strides = weight.stride()[::-1]
        call.product(call.x_rows, k, None, weight, strides, u, *side, _KEEP_ALL, gain, bias, z if keep_z else None, y)
        return y, u, z


class _Backward(_Call):
    """One call of the backward pass: ``t = (gain * grad_y) @ lora_b`` and what it is needed for, and the sums over rows."""

    def __init__(self, grad_y, u, z, weight, want, *lora):
        super().__init__(*lora)
        self.grad_y, self.u, self.z, self.weight, self.want = grad_y, u, z, weight, want
        self.n, self.k = weight.shape
        self.grad_rows = (grad_y, *rows_of(grad_y), grad_y.stride(-1))
        self.block_m, self.block_d = _COLUMN_TILES.pick(
            (self.item, max(self.block_r, 32) if self.odd else self.block_r), lambda tile: True
        )

    def columns(
        self, rows, d, gain, ranks, dropout, grad, grad_strides, t_planes=None, grad_bias=None, grad_gain=None, by_adapter=True
    ):  # fmt: skip
        """Writes ``grad = dropout(rows * gain).T @ (ranks * c)`` and the sums over rows that are asked for; a plane of
        ``t_planes``, which no bank has, gets the product of BLOCK_D columns with lora_b. In a bank the rows are those of an
        adapter each time, unless ``by_adapter`` is False."""
        if not d or (grad is None and t_planes is None and grad_bias is None and grad_gain is None):
            return
        x, (seed, threshold, kept_scale) = self.x, dropout
        tiles = triton.cdiv(d, self.block_d)
        chunk = triton.cdiv(triton.cdiv(self.m, max(1, PROGRAMS // tiles)), self.block_m) * self.block_m
        chunks, order, starts, g, groups = triton.cdiv(self.m, chunk), None, None, 1, 0
        if self.adapter_ids is not None and by_adapter:
            order, starts = self.sorted()
            chunks, g, groups = chunks + self.g, self.g, triton.next_power_of_2(self.g + 2)
        new = lambda wanted, *shape: x.new_empty((chunks, d, *shape), dtype=torch.float32) if wanted else None  # noqa: E731
        planes = new(grad is not None, self.block_r)
        sums, dots = new(grad_bias is not None), new(grad_gain is not None)
        tile_bytes = self.block_m * (self.block_d * self.item + self.block_r * 4)
        lora_linear_bwd_columns_kernel[(tiles * chunks,)](
            *rows, gain, None if dots is None else self.z, ranks if planes is not None else None, self.diagonal,
            self.scale, seed, threshold, None if t_planes is None else self.lora_b, *self.lora_b.stride()[-2:], planes, sums,
            dots, t_planes, order, starts, self.m, d, g, chunk, R=self.r, GROUPS=groups, PRECISION=precision(x),
            BLOCK_R=self.block_r, BLOCK_M=self.block_m, BLOCK_D=self.block_d,
            **_options(x, 4 if self.block_r <= 64 else 8, tile_bytes, 2),
        )  # fmt: skip
        if planes is None and sums is None and dots is None:
            return
        block_d = 32 if self.block_r <= 64 else 16
        lora_linear_bwd_reduce_kernel[(triton.cdiv(d, block_d) * g,)](
            planes, sums, dots, kept_scale, grad, *grad_strides, grad_bias, grad_gain, starts, chunks, d, g, chunk,
            R=self.r, GROUPS=groups, BLOCK_R=self.block_r, BLOCK_D=block_d, enable_fp_fusion=True,
        )  # fmt: skip

    def over_grad_y(self, grad_bias, grad_lora_b, grad_gain):
        """Writes these gradients and returns t, in one pass over grad_y where planes of t cost less than another one."""
        t = t_planes = None
        want_t = self.want.x or self.want.lora_a or self.want.diagonal
        if want_t and self.adapter_ids is None and 8 * self.block_r < self.block_d * self.item:
            t_planes = self.x.new_empty((triton.cdiv(self.n, self.block_d), self.m, self.r), dtype=torch.float32)
        elif want_t:
            t = self.ranks(self.grad_rows, self.n, self.gain, self.lora_b, _strides(self.lora_b), _KEEP_ALL)
        strides = (0, 0, None) if grad_lora_b is None else _strides(grad_lora_b)
        if self.adapter_ids is not None:  # the bias is that of all rows, also of those without an adapter
            self.columns(self.grad_rows, self.n, None, None, _KEEP_ALL, None, (0, 0, None), None, grad_bias, by_adapter=False)
            grad_bias = None
        self.columns(self.grad_rows, self.n, self.gain, self.u, _KEEP_ALL, grad_lora_b, strides, t_planes, grad_bias, grad_gain)
        return t if t_planes is None else t_planes.sum(0)

    def frozen(self, grad_weight):
        """The gradient of the frozen layer's weight is a plain product."""
        grad_y = self.grad_y
        if self.gain is not None:
            grad_y = torch.mul(grad_y, self.gain, out=grad_y.new_empty(grad_y.shape))
        return torch.mm(grad_y.reshape(self.m, self.n).T, self.x.reshape(self.m, self.k), out=grad_weight)

    def run(self, grad_x, grad_weight, grad_bias, grad_lora_a, grad_lora_b, grad_diagonal, grad_gain):
        """Writes the gradients that aren't None."""
        t = self.over_grad_y(grad_bias, grad_lora_b, grad_gain)
        if grad_x is not None:
            self.product(
                self.grad_rows, self.n, self.gain, self.weight, self.weight.stride(), t, self.lora_a, _strides(self.lora_a),
                self.dropout, None, None, None, grad_x,
            )  # fmt: skip
        if grad_lora_a is not None:
            self.columns(self.x_rows, self.k, None, t, self.dropout, grad_lora_a, _strides(grad_lora_a, True))
        if grad_weight is not None:
            self.frozen(grad_weight)
        if grad_diagonal is not None:
            products = t * self.u
            sums = products.sum(0)
            if self.adapter_ids is not None:
                sums = sums.new_empty((self.g, self.r))
                rows = products, None, self.r, 1
                self.columns(rows, self.r, None, None, _KEEP_ALL, None, (0, 0, None), grad_bias=sums)
            torch.mul(sums, self.scale, out=grad_diagonal)


def lora_linear_bwd(
    grad_y, x, u, z, weight, bias, lora_a, lora_b, diagonal, gain, scale, dropout_p, seed, adapter_ids, output_mask
):  # fmt: skip
    want = _Wanted(*output_mask)
    inputs = (x, weight, bias, lora_a, lora_b, diagonal, gain)
    if not grad_y.numel():
        return tuple(t.new_zeros(t.shape) if wanted else x.new_empty(0) for t, wanted in zip(inputs, want))
    grads = [t.new_empty(t.shape) if wanted else None for t, wanted in zip(inputs, want)]
    diagonal, gain = dense(diagonal, gain)
    with torch.cuda.device_of(x):
        lora = x, lora_a, lora_b, diagonal, gain, scale, dropout_p, seed, adapter_ids
        _Backward(grad_y, u, z, weight, want, *lora).run(*grads)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)
