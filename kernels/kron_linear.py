"""Triton kernels of kron_linear: a program keeps the ranks of its rows in registers and mixes them there."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import PROGRAMS, Tiles, dense, row_offsets, rows_of
from ._kron import Rows, expand_tile, padded, project_chunk, stages

# Tiles of the kernel that owns rows, by the bytes of an element and whether the ranks are many: BLOCK_M and BLOCK_P. Under 64
# rows, since products of TensorFloat-32 are of registers then. See WGMMA in _common.py.
_TILES = Tiles(
    {
        (2, "few"): ((32, 32), (16, 64)),
        (2, "many"): ((16, 32),),
        (4, "few"): ((32, 16), (16, 32)),
        (4, "many"): ((16, 16),),
    }
)
_MIXED = 256  # ranks that a program mixes at a time for each row; more chunks of y go to other programs
_GRADIENTS = ("x", "a", "s", "t", "bias")
_Wanted = NamedTuple("_Wanted", [(name, bool) for name in _GRADIENTS])


@triton.jit
def kron_linear_rows_kernel(
    x_ptr, x_table_ptr, x_stride_m, x_stride_d, residual_ptr, residual_table_ptr, residual_stride_m, residual_stride_d, y_ptr,
    a_ptr, a_stride_i, a_stride_in, a_stride_out, s_ptr, s_stride_p, s_stride_i, s_stride_k, t_ptr, t_stride_p, t_stride_i,
    t_stride_k, bias_ptr, scale_value, z_ptr, mixed_ptr, work_stride, m, a_in, a_out, b_in, b_out, Q: tl.constexpr,
    K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_A of the chunks of BLOCK_M rows of y. It walks x chunk by chunk to its ranks z, adds them, scaled,
    to those of the chunks of y, and goes from there to y. The ranks of x (z) and of y (mixed) are left in memory where they are
    wanted. With the factors transposed it turns grad_y into grad_x."""
    blocks = tl.cdiv(a_out, BLOCK_A)
    block = tl.program_id(0) % blocks
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    kept, places = ks < K, tl.arange(0, BLOCK_A)
    outs = block * BLOCK_A + places
    a_ptrs = a_ptr + outs.to(tl.int64)[:, None] * a_stride_out + (ks // Q * a_stride_i)[None, :]
    a_mask = (outs < a_out)[:, None] & kept[None, :]
    x_offsets = row_offsets(rows, inside, x_table_ptr, x_stride_m)
    work = rows[:, None] * work_stride + ks[None, :]
    work_mask = inside[:, None] & kept[None, :]

    ranks = tl.zeros((BLOCK_M, BLOCK_A, BLOCK_K), tl.float32)
    for part in range(0, a_in):
        z = project_chunk(
            x_ptr, x_offsets, inside, x_stride_d, part * tl.cast(b_in, tl.int64), b_in, s_ptr, s_stride_p, s_stride_i,
            s_stride_k, Q, K, BLOCK_K, BLOCK_M, BLOCK_P, PRECISION,
        )  # fmt: skip
        if z_ptr is not None:
            tl.store(z_ptr + work + part * K, z, mask=work_mask & (block == 0))
        a = tl.load(a_ptrs + part * tl.cast(a_stride_in, tl.int64), mask=a_mask, other=0.0).to(tl.float32)
        ranks += z[:, None, :] * (scale_value * a)[None, :, :]

    if residual_ptr is not None:
        residual_offsets = row_offsets(rows, inside, residual_table_ptr, residual_stride_m)
    for place in range(0, tl.minimum(BLOCK_A, a_out - block * BLOCK_A)):
        part = block * BLOCK_A + place
        mixed = tl.sum(tl.where((places == place)[None, :, None], ranks, 0.0), 1)  # [BLOCK_M, BLOCK_K]
        if mixed_ptr is not None:
            tl.store(mixed_ptr + work + part * K, mixed, mask=work_mask)
        if y_ptr is not None:
            for first in range(0, b_out, BLOCK_P):
                cols = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
                valid = cols < b_out
                mask = inside[:, None] & valid[None, :]
                y = expand_tile(mixed, t_ptr, cols, valid, t_stride_p, t_stride_i, t_stride_k, Q, K, BLOCK_K, PRECISION)
                cols += part * tl.cast(b_out, tl.int64)
                if bias_ptr is not None:
                    y += tl.load(bias_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]
                if residual_ptr is not None:
                    residual_ptrs = residual_ptr + residual_offsets[:, None] + cols[None, :] * residual_stride_d
                    y = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32) + y
                tl.store(y_ptr + (rows * a_out * b_out)[:, None] + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def kron_linear_bwd_mix_kernel(
    z_ptr, grad_ptr, work_stride, planes_ptr, m, a_in, a_out, chunk, Q: tl.constexpr, K: tl.constexpr, TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program owns one chunk of x and BLOCK_A chunks of y over one chunk of rows: for each term the dot products of the ranks
    of the former with the gradients of those of the latter."""
    blocks = tl.cdiv(a_out, BLOCK_A)
    place, index = tl.program_id(0) % (a_in * blocks), (tl.program_id(0) // (a_in * blocks)).to(tl.int64)
    part, outs = place // blocks, place % blocks * BLOCK_A + tl.arange(0, BLOCK_A)
    start, end = index * chunk, tl.minimum((index + 1) * chunk, m)
    ks = tl.arange(0, BLOCK_K)
    kept, valid = ks < K, outs < a_out
    acc = tl.zeros((BLOCK_M, BLOCK_A, BLOCK_K), tl.float32)
    for first in range(0, (end - start).to(tl.int32), BLOCK_M):
        rows = start + first + tl.arange(0, BLOCK_M)
        inside = rows < end
        z_ptrs = z_ptr + rows[:, None] * work_stride + part * K + ks[None, :]
        z = tl.load(z_ptrs, mask=inside[:, None] & kept[None, :], other=0.0)
        grad_ptrs = grad_ptr + (rows * work_stride)[:, None, None] + (outs * K)[None, :, None] + ks[None, None, :]
        grad = tl.load(grad_ptrs, mask=inside[:, None, None] & valid[None, :, None] & kept[None, None, :], other=0.0)
        acc += z[:, None, :] * grad
    sums = tl.sum(acc, 0)  # [BLOCK_A, BLOCK_K]
    for term in range(0, TERMS):
        dots = tl.sum(tl.where((ks // Q == term)[None, :], sums, 0.0), 1)
        tl.store(planes_ptr + ((index * TERMS + term) * a_in + part) * a_out + outs, dots, mask=valid)


class _Map(NamedTuple):
    """``x @ sum_i kron(a[i], s[i] @ t[i])``. Each factor comes with its strides: those of ``a`` by term, chunk of x and
    chunk of y, those of ``s`` and ``t`` by column, term and rank."""

    a: torch.Tensor
    a_strides: tuple
    s: torch.Tensor
    s_strides: tuple
    t: torch.Tensor
    t_strides: tuple
    a_in: int
    a_out: int
    b_in: int
    b_out: int
    terms: int
    q: int

    @classmethod
    def of(cls, a, s, t):
        (terms, a_in, a_out), (_, b_in, q), (_, _, b_out) = a.shape, s.shape, t.shape
        strides = (a_in * a_out, a_out, 1), (q, b_in * q, 1), (1, q * b_out, b_out)
        return cls(a, strides[0], s, strides[1], t, strides[2], a_in, a_out, b_in, b_out, terms, q)

    @property
    def transposed(self):
        term, chunk_in, chunk_out = self.a_strides
        return self._replace(
            a_strides=(term, chunk_out, chunk_in), s=self.t, s_strides=self.t_strides, t=self.s, t_strides=self.s_strides,
            a_in=self.a_out, a_out=self.a_in, b_in=self.b_out, b_out=self.b_in,
        )  # fmt: skip

    @property
    def k(self):
        return self.terms * self.q

    @property
    def blocks(self):
        """The ranks of a chunk, and how many chunks of y a program mixes."""
        block_k = padded(self.k)
        return {"BLOCK_K": block_k, "BLOCK_A": min(triton.next_power_of_2(self.a_out), max(1, _MIXED // block_k))}


def _apply(x, rows, kron, y, scale, bias=None, residual=None, z=None, mixed=None, work_stride=0):
    """``y``, and the ranks ``z`` and ``mixed`` where there is room for them, in the tallest tiles of which there are enough."""
    blocks = kron.blocks
    many = blocks["BLOCK_K"] > 32
    block_m, block_p = _TILES.pick(
        (x.element_size(), "many" if many else "few"),
        lambda tile: tile[0] == 16 or triton.cdiv(rows.m, tile[0]) >= PROGRAMS // 2,
    )
    residual_rows = (None, 0, 0) if residual is None else (*rows_of(residual), residual.stride(-1))
    kron_linear_rows_kernel[(triton.cdiv(rows.m, block_m) * triton.cdiv(kron.a_out, blocks["BLOCK_A"]),)](
        x, *rows_of(x), x.stride(-1), residual, *residual_rows, y, kron.a, *kron.a_strides, kron.s, *kron.s_strides, kron.t,
        *kron.t_strides, bias, scale, z, mixed, work_stride, rows.m, kron.a_in, kron.a_out, kron.b_in, kron.b_out, Q=kron.q,
        K=kron.k, PRECISION=rows.precision, BLOCK_M=block_m, BLOCK_P=block_p, num_warps=8 if many else 4,
        num_stages=stages(x, many), enable_fp_fusion=True, **blocks,
    )  # fmt: skip


def kron_linear_fwd(x, a, s, t, bias, residual, scale):
    y = x.new_empty((*x.shape[:-1], a.shape[2] * t.shape[2]))
    if not y.numel():
        return y
    a, s, t, bias = dense(a, s, t, bias)
    with torch.cuda.device_of(x):
        _apply(x, Rows(x, x.numel() // x.shape[-1]), _Map.of(a, s, t), y, scale, bias, residual)
    return y


def _grad_a(rows, kron, z, grad, work_stride, scale, grad_a):
    blocks, block_m = kron.blocks, 8
    tiles = kron.a_in * triton.cdiv(kron.a_out, blocks["BLOCK_A"])
    chunk, chunks = rows.chunks(tiles, block_m)
    planes = rows.planes(chunks, grad_a.numel())
    kron_linear_bwd_mix_kernel[(tiles * chunks,)](
        z, grad, work_stride, planes, rows.m, kron.a_in, kron.a_out, chunk, Q=kron.q, K=kron.k, TERMS=kron.terms,
        BLOCK_M=block_m, enable_fp_fusion=True, **blocks,
    )  # fmt: skip
    rows.reduce(chunk, chunks, 1, grad_a.numel(), sums=planes, scale=(None, scale), grad_bias=grad_a)


def kron_linear_bwd(grad_y, x, a, s, t, bias, scale, output_mask):
    want = _Wanted(*output_mask)
    if not x.numel():
        tensors = zip((x, a, s, t, bias), want)
        return tuple(t.new_zeros(t.shape) if wanted else x.new_empty(0) for t, wanted in tensors)
    a, s, t, bias = dense(a, s, t, bias)
    kron = _Map.of(a, s, t)
    inputs = {"x": x, "a": a, "s": s, "t": t, "bias": bias}
    sizes = {name: inputs[name].shape if wanted else (0,) for name, wanted in want._asdict().items()}
    grads = {name: (inputs[name] if getattr(want, name) else x).new_empty(size) for name, size in sizes.items()}
    with torch.cuda.device_of(x):
        rows = Rows(x, x.numel() // x.shape[-1])
        # Ranks of rows that the gradients of factors are made of: those of x and of y without the scale, the gradients of those
        # of y without it, and of those of x with it.
        columns_in, columns_out = kron.a_in * kron.k, kron.a_out * kron.k
        columns = [want.a * columns_in, want.t * columns_out, want.a * columns_out, want.s * columns_in]
        work = x.new_empty((rows.m, sum(columns)), dtype=torch.float32)
        parts = zip(work.split(columns, 1), columns)
        z, mixed, grad_mixed, grad_z = (part if width else None for part, width in parts)
        if want.a or want.t:
            _apply(x, rows, kron, None, 1.0, z=z, mixed=mixed, work_stride=work.stride(0))
        if want.x or want.a or want.s:
            grad_x = grads["x"] if want.x else None
            _apply(grad_y, rows, kron.transposed, grad_x, scale, z=grad_mixed, mixed=grad_z, work_stride=work.stride(0))
        if want.a:
            _grad_a(rows, kron, z, grad_mixed, work.stride(0), scale, grads["a"])
        if want.s:
            rows.sum(
                x, (*rows_of(x), x.stride(-1), None), kron.a_in, kron.b_in, grad_z, kron.k, grad=grads["s"],
                strides=(*kron.s_strides, 0), q=kron.q, k=kron.k,
            )  # fmt: skip
        if want.t or want.bias:
            rows.sum(
                grad_y, (*rows_of(grad_y), grad_y.stride(-1), None), kron.a_out, kron.b_out, mixed, kron.k,
                want.bias, grad=grads["t"] if want.t else None, strides=(*kron.t_strides, 0), q=kron.q, k=kron.k,
                scale=(None, scale), grad_bias=grads["bias"] if want.bias else None, scaled_bias=False,
            )  # fmt: skip
    return tuple(grads.values())
