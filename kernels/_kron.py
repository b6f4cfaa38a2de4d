"""What the Triton kernels of compacter and kron_linear share: rows that pass through the ranks of Kronecker products, and the
sums over rows that the gradients of factors are made of.

Ranks are float32, and so are all products of them. Tensor cores multiply 16-bit rows, which TensorFloat-32 holds exactly, by
the three parts of a float32 factor, and ranks by factors in three products out of four.
"""

import torch
import triton
import triton.language as tl

from ._common import PROGRAMS, bank_rows, bank_tile, bank_tiles, precision, row_offsets, shared_memory, sum_planes


@triton.jit
def tile_rows(order_ptr, starts_ptr, m, g, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The adapter of the tile of rows that this program owns, its positions, the rows there, and which of them exist."""
    index = tl.program_id(0).to(tl.int64)
    group, start, end = index * 0, index * BLOCK_M, m
    if GROUPS:
        group, start, end = bank_tile(starts_ptr, index, g + 2, BLOCK_M, GROUPS)
    positions = start + tl.arange(0, BLOCK_M)
    inside = positions < end
    rows = positions
    if GROUPS:
        rows = tl.load(order_ptr + positions, mask=inside, other=0)
    return group, positions, rows, inside


@triton.jit
def factor_offsets(ks, stride_i, stride_k, Q: tl.constexpr):
    """Where the columns ``ks`` of the factors of all terms begin, side by side: column k is the (k % Q)-th of term k // Q."""
    return ks // Q * stride_i + ks % Q * stride_k


@triton.jit
def tf32_part(values):
    """``values`` cut to the bits that TensorFloat-32 holds."""
    return (values.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def rows_dot(rows, factor, acc, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """``acc`` plus rows times a factor. ``EXACT``: the rows are 16 bits wide."""
    exact: tl.constexpr = EXACT and PRECISION == "tf32x3"
    factor32 = factor.to(tl.float32)
    if not exact:
        acc = tl.dot(rows.to(tl.float32), factor32, acc, input_precision=PRECISION)
    else:
        if factor.dtype == tl.float32:
            high = tf32_part(factor32)
            rest = tl.where(high == factor32, 0.0, factor32 - high)  # of an infinity too
            middle = tf32_part(rest)
            acc = tl.dot(rows.to(tl.float32), rest - middle, acc, input_precision="tf32")
            acc = tl.dot(rows.to(tl.float32), middle, acc, input_precision="tf32")
            factor32 = high
        acc = tl.dot(rows.to(tl.float32), factor32, acc, input_precision="tf32")
    return acc


@triton.jit
def project_chunk(
    ptr, offsets, inside, stride_d, first, width, weight_ptr, stride_p, stride_i, stride_k, Q: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``width`` columns of rows, from column ``first``, times the (width, K) factors: [BLOCK_M, BLOCK_K]."""
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    present, weight_offsets = ks < K, factor_offsets(ks, stride_i, stride_k, Q)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, width, BLOCK_P):
        cols = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        valid = cols < width
        tile_ptrs = ptr + offsets[:, None] + (first + cols)[None, :] * stride_d
        tile = tl.load(tile_ptrs, mask=inside[:, None] & valid[None, :], other=0.0)
        weight_ptrs = weight_ptr + cols[:, None] * stride_p + weight_offsets[None, :]
        weight = tl.load(weight_ptrs, mask=valid[:, None] & present[None, :], other=0.0)  # [BLOCK_P, BLOCK_K]
        acc = rows_dot(tile, weight, acc, ptr.dtype.element_ty != tl.float32, PRECISION)
    if K != BLOCK_K:  # the padding of an infinite row is 0 * inf
        acc = tl.where(present[None, :], acc, 0.0)
    return acc


@triton.jit
def expand_tile(
    rank, weight_ptr, cols, valid, stride_p, stride_i, stride_k, Q: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_K] times the columns ``cols`` of the (K, width) factors."""
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    weight_ptrs = weight_ptr + factor_offsets(ks, stride_i, stride_k, Q)[:, None] + cols[None, :] * stride_p
    weight = tl.load(weight_ptrs, mask=(ks < K)[:, None] & valid[None, :], other=0.0).to(tl.float32)  # [BLOCK_K, BLOCK_P]
    return tl.dot(rank, weight, input_precision=PRECISION)


@triton.jit
def kron_bwd_columns_kernel(
    left_ptr, left_table_ptr, left_stride_m, left_stride_d, right_ptr, right_stride_m, right_stride_part, planes_ptr, sums_ptr,
    order_ptr, starts_ptr, m, parts, width, g, chunk, K: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_P columns of one of the ``parts`` of ``left``, each ``width`` wide, over one chunk of the rows of
    one adapter: their product with the K columns of ``right`` of that part, and their sums, go to the plane of that chunk."""
    tiles = tl.cdiv(width, BLOCK_P)
    place, index = tl.program_id(0) % (parts * tiles), (tl.program_id(0) // (parts * tiles)).to(tl.int64)
    part = (place // tiles).to(tl.int64)
    start, end = index * chunk, tl.minimum((index + 1) * chunk, m)
    if GROUPS:
        _, start, end = bank_tile(starts_ptr, index, g, chunk, GROUPS)
        end = tl.minimum(start + chunk, end)
    cols = (place % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = cols < width
    cols = part * width + cols
    ks = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    sums = tl.zeros((BLOCK_P,), tl.float32)
    for first in range(0, (end - start).to(tl.int32), BLOCK_M):
        positions = start + first + tl.arange(0, BLOCK_M)
        inside = positions < end
        rows = positions
        if order_ptr is not None:
            rows = tl.load(order_ptr + positions, mask=inside, other=0)
        offsets = row_offsets(rows, inside, left_table_ptr, left_stride_m)
        left_ptrs = left_ptr + offsets[:, None] + cols[None, :] * left_stride_d
        left = tl.load(left_ptrs, mask=inside[:, None] & valid[None, :], other=0.0)
        if sums_ptr is not None:
            sums += tl.sum(left.to(tl.float32), 0)
        if planes_ptr is not None:
            right_ptrs = right_ptr + positions[:, None] * right_stride_m + part * right_stride_part + ks[None, :]
            right = tl.load(right_ptrs, mask=inside[:, None] & (ks < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
            acc = rows_dot(tl.trans(left), right, acc, left_ptr.dtype.element_ty != tl.float32, PRECISION)
    columns = index * parts * width + cols
    if planes_ptr is not None:
        tl.store(planes_ptr + columns[:, None] * K + ks[None, :], acc, mask=valid[:, None] & (ks < K)[None, :])
    if sums_ptr is not None:
        tl.store(sums_ptr + columns, sums, mask=valid)


@triton.jit
def kron_bwd_reduce_kernel(
    planes_ptr, sums_ptr, weight_ptr, bias_ptr, scale_ptr, scale_value, grad_ptr, stride_p, stride_i, stride_k, stride_g,
    grad_bias_ptr, grad_scale_ptr, starts_ptr, chunks, parts, width, g, chunk, Q: tl.constexpr, K: tl.constexpr,
    SCALED_BIAS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_P of the ``width`` columns of every part, in a bank of those of one adapter: it adds their planes in
    order, first over chunks, then over parts, and turns the sums into gradients of the factors, of the bias, of the scale."""
    tiles = tl.cdiv(width, BLOCK_P)
    tile, group = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    first, last = 0, chunks
    if GROUPS:
        first64, last64 = bank_tiles(starts_ptr, group, g, chunk, GROUPS)
        first, last = first64.to(tl.int32), last64.to(tl.int32)
    cols = tile.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    valid = cols < width
    mask = valid[:, None] & (ks < K)[None, :]
    d = tl.cast(parts, tl.int64) * width
    scale = scale_value
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    product = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    grad_scale = tl.zeros((BLOCK_P,), tl.float32)
    for part in range(0, parts):
        columns = part * tl.cast(width, tl.int64) + cols
        if planes_ptr is not None:
            product += sum_planes(planes_ptr, first, last, d * K, columns[:, None] * K + ks[None, :], mask)
        if sums_ptr is not None:
            sums = sum_planes(sums_ptr, first, last, d, columns, valid)
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + group * d + columns, mask=valid, other=0.0).to(tl.float32)
                grad_scale += sums * bias
            if grad_bias_ptr is not None:
                if SCALED_BIAS:
                    sums *= scale
                tl.store(grad_bias_ptr + group * d + columns, sums.to(grad_bias_ptr.dtype.element_ty), mask=valid)
    if planes_ptr is not None:
        offsets = group * stride_g + cols[:, None] * stride_p + factor_offsets(ks, stride_i, stride_k, Q)[None, :]
        if grad_ptr is not None:
            tl.store(grad_ptr + offsets, (scale * product).to(grad_ptr.dtype.element_ty), mask=mask)
        if grad_scale_ptr is not None:
            weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            grad_scale += tl.sum(product * weight, 1)
            tl.store(grad_scale_ptr + group * width + cols, grad_scale, mask=valid)


def rank_precision(x: torch.Tensor) -> str:
    """How float32 ranks are multiplied. Where rows are 16 bits wide, the tensor cores of NVIDIA are precise enough."""
    return precision(x) if x.element_size() == 4 or shared_memory(x)[1] == 64 else "tf32x3"


def padded(k: int) -> int:
    """The least size of a block that holds k ranks."""
    return max(16, triton.next_power_of_2(k))


def stages(x: torch.Tensor, wide: bool) -> int:
    """Tiles in flight in the kernels that own rows: more where tiles are small and shared memory is large."""
    return 4 if shared_memory(x)[0] >= 160 * 1024 and not wide else 2


class Rows:
    """The rows of a call, in a bank sorted by adapter, and sums over them: in planes first, then in order."""

    def __init__(self, x, m, adapter_ids=None, g=1):
        self.x, self.m, self.g, self.groups = x, m, g, {"GROUPS": 0}
        self.order = self.starts = None
        self.precision = rank_precision(x)
        if adapter_ids is not None:
            self.order, self.starts = bank_rows(adapter_ids, x, g)
            self.groups = {"GROUPS": triton.next_power_of_2(g + 2)}

    def grid(self, block_m):
        return triton.cdiv(self.m, block_m) + (self.g + 2 if self.groups["GROUPS"] else 0)

    def chunks(self, tiles, block_m):
        """The rows of a chunk, and how many chunks there are, where each goes to ``tiles`` programs."""
        chunk = triton.cdiv(triton.cdiv(self.m, max(1, PROGRAMS // tiles)), block_m) * block_m
        return chunk, triton.cdiv(self.m, chunk) + (self.g if self.groups["GROUPS"] else 0)

    def planes(self, *shape):
        return self.x.new_empty(shape, dtype=torch.float32)

    def sum(self, left, rows, parts, width, right=None, right_stride=0, sums=False, *, k=1, tile=32, **options):
        """Write the gradients that are made of the products of ``left``, of ``parts`` times ``width`` columns, with the ``k``
        columns of ``right`` for each part, and of the sums of ``left``.

        ``rows`` is ``(table, stride of rows, stride of columns, order)`` of ``left``; ``options`` are those of ``reduce``.
        """
        block_k = padded(k)
        block_m, block_p, warps = (tile, tile, 4) if block_k <= 64 else (16, 16, 8)
        tiles = parts * triton.cdiv(width, block_p)
        chunk, chunks = self.chunks(tiles, block_m)
        planes = None if right is None else self.planes(chunks, parts * width, k)
        sums = self.planes(chunks, parts * width) if sums else None
        table, stride_m, stride_d, order = rows
        kron_bwd_columns_kernel[(tiles * chunks,)](
            left, table, stride_m, stride_d, right, 0 if right is None else right.stride(0), right_stride, planes, sums, order,
            self.starts, self.m, parts, width, self.g, chunk, K=k, PRECISION=self.precision, BLOCK_K=block_k,
            BLOCK_M=block_m, BLOCK_P=block_p, num_warps=warps, num_stages=2, enable_fp_fusion=True, **self.groups,
        )  # fmt: skip
        self.reduce(chunk, chunks, parts, width, planes, sums, k=k, **options)

    def reduce(
        self, chunk, chunks, parts, width, planes=None, sums=None, *, grad=None, strides=(0, 0, 0, 0), q=1, k=1, weight=None,
        bias=None, scale=(None, 1.0), grad_bias=None, grad_scale=None, scaled_bias=True,
    ):  # fmt: skip
        """Add planes: ``scale * products`` to ``grad``, ``scale * sums``, or ``sums`` unless ``scaled_bias``, to ``grad_bias``,
        and to ``grad_scale`` in parts what is made of ``weight`` and ``bias``. ``strides`` of ``grad`` and ``weight`` go by
        column of ``left``, term, column of a term and adapter."""
        block_k = padded(k)
        block_p = 32 if block_k <= 64 else 16
        kron_bwd_reduce_kernel[(triton.cdiv(width, block_p) * self.g,)](
            planes, sums, weight, bias, *scale, grad, *strides, grad_bias, grad_scale, self.starts, chunks, parts, width,
            self.g, chunk, Q=q, K=k, SCALED_BIAS=scaled_bias, BLOCK_K=block_k, BLOCK_P=block_p, enable_fp_fusion=True,
            **self.groups,
        )  # fmt: skip
