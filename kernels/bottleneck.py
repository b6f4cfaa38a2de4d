"""Triton kernels of bottleneck: a program keeps the hidden activations of its rows in registers."""

import re
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import Tiles, bank_rows, bank_tile, hidden_layer, moments, project, rank_vector, row_offsets, rows_of
from .bottleneck_bwd import (
    bottleneck_bwd_columns_kernel,
    bottleneck_bwd_norm_dots_kernel,
    bottleneck_bwd_reduce_kernel,
    bottleneck_bwd_rows_kernel,
)

# KiB of shared memory that a program may use, by compute capability.
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
# Programs that fill the largest chips twice. The same everywhere, so that sums are split, and round, the same everywhere.
_PROGRAMS = 264
# Before 3.7.1 Triton omits the fence between cp.async and wgmma on sm_90. Tiles under 64 rows use mma.sync, which needs none.
_WGMMA = [int(n) for n in re.findall(r"\d+", triton.__version__)[:3]] >= [3, 7, 1]
# Tiles of the kernels that own rows, by the bytes of an element and BLOCK_R: BLOCK_M, BLOCK_D, and the widest d whose rows
# stay in the L2 cache between two walks. The hidden tiles must fit the registers, of which backward holds more.
_LOW = ((64, 64, 1024), (32, 64, 1024), (16, 64, 1024), (32, 128, 4096), (16, 128, None))[0 if _WGMMA else 3 :]
_HIGH = ((32, 64, 4096), (16, 64, None))
_FLOAT32 = {(4, r): ((32, 32, None), (16, 32, None)) if r <= 64 else ((16, 16, None),) for r in (16, 32, 64, 128, 256)}
_BWD_TILES = Tiles({(2, 16): _LOW, (2, 32): _LOW, (2, 64): _HIGH, (2, 128): _HIGH, (2, 256): _HIGH, **_FLOAT32})
_FWD_TILES = Tiles({**_BWD_TILES, (2, 64): ((64, 64, 1024), *_HIGH) if _WGMMA else _HIGH})
# BLOCK_M and BLOCK_D of the kernel that owns columns: under 64 columns, for mma.sync. With wgmma Triton 3.9 gives a tile that
# is also summed one buffer too few, so that the next tile is copied over one that is being read.
_COLUMN_TILES = Tiles(
    {(2, r): ((32, 32),) for r in (16, 32, 64, 128, 256)}
    | {(4, r): ((32, 32) if r <= 32 else (16, 32) if r == 64 else (16, 16),) for r in (16, 32, 64, 128, 256)}
)
_GRADIENTS = (
    "x", "down_weight", "up_weight", "down_bias", "up_bias", "scale", "norm_weight", "norm_bias", "skip_weight",
    "hidden_skip_weight",
)  # fmt: skip
_SHARED_BY_BANK = ("scale", "norm_weight", "norm_bias", "skip_weight", "hidden_skip_weight")
_Wanted = NamedTuple("_Wanted", [(name, bool) for name in _GRADIENTS])


@triton.jit
def bottleneck_fwd_kernel(
    x_ptr, x_table_ptr, x_stride_m, x_stride_d, residual_ptr, residual_table_ptr, residual_stride_m, residual_stride_d, y_ptr,
    down_ptr, up_ptr, down_bias_ptr, up_bias_ptr, scale_ptr, channel_scale_ptr, scale_value, norm_weight_ptr, norm_bias_ptr,
    norm_eps, skip_ptr, hidden_skip_ptr, order_ptr, starts_ptr, m, d, g, R: tl.constexpr, ACTIVATION: tl.constexpr,
    ADD_X: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows of one adapter. It walks d twice: down to the hidden tile, which stays in registers, and up
    to y, where x comes from the L2 cache."""
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
        if up_bias_ptr is not None:
            up_bias_ptr += group * d
    positions = start + tl.arange(0, BLOCK_M)
    inside = positions < end
    rows = positions
    if GROUPS:
        rows = tl.load(order_ptr + positions, mask=inside, other=0)
    x_offsets = row_offsets(rows, inside, x_table_ptr, x_stride_m)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    rstd = mean
    if norm_weight_ptr is not None:
        mean, rstd = moments(x_ptr, x_offsets, inside, x_stride_d, width, d, norm_eps, BLOCK_M, BLOCK_D)
    z = project(
        x_ptr, x_offsets, inside, x_stride_d, down_ptr, 1, d, width, mean, rstd, norm_weight_ptr, norm_bias_ptr, None, R,
        BLOCK_R, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    if down_bias_ptr is not None:
        z += rank_vector(down_bias_ptr, rank, BLOCK_R)
    value, _ = hidden_layer(z, hidden_skip_ptr, R, BLOCK_R, ACTIVATION)
    hidden = value.to(x_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_R]

    scale = tl.zeros((1, 1), tl.float32) + scale_value
    if scale_ptr is not None:
        scale = tl.zeros((1, 1), tl.float32) + tl.load(scale_ptr).to(tl.float32)
    if residual_ptr is not None:
        residual_offsets = row_offsets(rows, inside, residual_table_ptr, residual_stride_m)
    for first in range(0, d, BLOCK_D):
        cols = (first + tl.arange(0, BLOCK_D)).to(tl.int64)
        valid = cols < width
        mask = inside[:, None] & (cols < d)[None, :]
        up_ptrs = up_ptr + ranks[:, None] + cols[None, :] * R
        up = tl.load(up_ptrs, mask=(ranks < R)[:, None] & valid[None, :], other=0.0).to(hidden.dtype)  # [BLOCK_R, BLOCK_D]
        y = tl.dot(hidden, up, input_precision=PRECISION)
        if up_bias_ptr is not None:
            y += tl.load(up_bias_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]
        if channel_scale_ptr is not None:
            y *= tl.load(channel_scale_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]
        else:
            y *= scale
        base = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if ADD_X or skip_ptr is not None:
            x = tl.load(x_ptr + x_offsets[:, None] + cols[None, :] * x_stride_d, mask=mask, other=0.0).to(tl.float32)
            if skip_ptr is not None:
                y += tl.load(skip_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :] * x
            if ADD_X:
                base = x
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + residual_offsets[:, None] + cols[None, :] * residual_stride_d
            base = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        if GROUPS:  # adapter -1 leaves the residual as it is, an id outside the bank spoils its row
            y = tl.where(group < g, y, tl.where(group == g, 0.0, float("nan")))
        tl.store(y_ptr + (rows * d)[:, None] + cols[None, :], (base + y).to(y_ptr.dtype.element_ty), mask=mask)


def _chip(x):
    """Compute capability, or the name of an AMD chip, and the lanes of a warp."""
    if x.device.type == "cpu":
        return 90, 32
    target = triton.runtime.driver.active.get_current_target()
    return target.arch, target.warp_size


def _blocks(x, block_r, block_m, block_d, tile_bytes):
    """Blocks and launch options. As many tiles of ``tile_bytes`` are in flight as leave room for a second program, up to 4."""
    arch, lanes = _chip(x)
    shared = (_SHARED.get(arch, 64) - 16) * 1024  # the compiler moves hidden tiles through shared memory too
    return {
        "BLOCK_R": block_r, "BLOCK_M": block_m, "BLOCK_D": block_d, "num_warps": 4 if block_r <= 64 or lanes == 64 else 8,
        "num_stages": max(1, min(4, max(shared // 2 // tile_bytes, min(2, shared // tile_bytes)))), "enable_fp_fusion": True,
    }  # fmt: skip


def _row_blocks(x, weight, m, d, r, tiles):
    """Blocks and launch options of the kernels that own rows: the tallest tile of which there are enough."""
    block_r = max(16, triton.next_power_of_2(r))
    block_m, block_d, _ = tiles.pick(
        (x.element_size(), block_r),
        lambda tile: d <= (tile[2] or d) and (tile[0] == 16 or triton.cdiv(m, tile[0]) >= _PROGRAMS // 2),
    )
    return _blocks(x, block_r, block_m, block_d, block_d * (block_m * x.element_size() + block_r * weight.element_size()))


def _column_blocks(x, block_r):
    """Blocks and launch options of the kernel that owns columns."""
    block_m, block_d = _COLUMN_TILES.pick((x.element_size(), block_r), lambda tile: True)
    blocks = _blocks(x, block_r, block_m, block_d, block_m * (block_d + block_r) * x.element_size())
    if block_r == 256 and blocks["num_stages"] == 3:  # a ring of three such tiles doesn't fit the registers of sm_80
        blocks["num_stages"] = 2
    return blocks


def _dense(*tensors):
    """Parameters as the kernels read them; only a strided one is copied."""
    return [None if t is None else t.contiguous() for t in tensors]


def _bank(adapter_ids, x, down_weight):
    """``(order, starts, g, constexprs)`` of a call; without a bank everything belongs to adapter 0."""
    if adapter_ids is None:
        return None, None, 1, {"GROUPS": 0}
    g = down_weight.shape[0]
    return *bank_rows(adapter_ids, x, g), g, {"GROUPS": triton.next_power_of_2(g + 2)}


def _precision(x):
    """float32 products are exact unless the user let PyTorch's own be rounded to TensorFloat-32."""
    return "tf32" if x.device.type != "cpu" and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def bottleneck_fwd(
    x, down_weight, up_weight, down_bias, up_bias, residual, add_x, scale, scale_value, activation, norm_weight, norm_bias,
    norm_eps, skip_weight, hidden_skip_weight, adapter_ids,
):  # fmt: skip
    y = x.new_empty(x.shape)
    if not x.numel():
        return y
    d, r = x.shape[-1], down_weight.shape[-2]
    m = x.numel() // d
    down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight, hidden_skip_weight = _dense(
        down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight, hidden_skip_weight
    )
    scalar, channels = (None, scale) if scale is not None and scale.dim() else (scale, None)
    with torch.cuda.device_of(x):
        blocks = _row_blocks(x, down_weight, m, d, r, _FWD_TILES)
        order, starts, g, groups = _bank(adapter_ids, x, down_weight)
        x_table, x_stride = rows_of(x)
        residual_table, residual_stride = (None, 0) if residual is None else rows_of(residual)
        grid = (triton.cdiv(m, blocks["BLOCK_M"]) + (g + 2 if groups["GROUPS"] else 0),)
        bottleneck_fwd_kernel[grid](
            x, x_table, x_stride, x.stride(-1), residual, residual_table, residual_stride,
            0 if residual is None else residual.stride(-1), y, down_weight, up_weight, down_bias, up_bias, scalar, channels,
            scale_value, norm_weight, norm_bias, norm_eps, skip_weight, hidden_skip_weight, order, starts, m, d, g, R=r,
            ACTIVATION=activation, ADD_X=add_x, PRECISION=_precision(x), **groups, **blocks,
        )  # fmt: skip
    return y


class _Backward:
    """One call of the backward pass: what it was given, what is wanted of it, and its three steps."""

    def __init__(self, grad_y, x, parameters, add_x, scale_value, activation, norm_eps, adapter_ids, want):
        self.grad_y, self.x, self.add_x, self.scale_value, self.activation = grad_y, x, add_x, scale_value, activation
        self.parameters = dict(zip(_GRADIENTS[1:], parameters))
        (
            self.down_weight, self.up_weight, self.down_bias, self.up_bias, scale, self.norm_weight, self.norm_bias,
            self.skip_weight, self.hidden_skip_weight,
        ) = parameters  # fmt: skip
        self.scalar, self.channels = (None, scale) if scale is not None and scale.dim() else (scale, None)
        self.norm_eps, self.want = norm_eps, want
        self.d, self.r = x.shape[-1], self.down_weight.shape[-2]
        self.m = x.numel() // self.d
        self.order, self.starts, self.g, self.groups = _bank(adapter_ids, x, self.down_weight)
        self.grad_rows, self.x_rows = (*rows_of(grad_y), grad_y.stride(-1)), (*rows_of(x), x.stride(-1))
        self.row_blocks = _row_blocks(x, self.down_weight, self.m, self.d, self.r, _BWD_TILES)
        self.column_blocks = _column_blocks(x, self.row_blocks["BLOCK_R"])
        rows, splits = self.column_blocks["BLOCK_M"], _PROGRAMS // triton.cdiv(self.d, self.column_blocks["BLOCK_D"])
        self.chunk = triton.cdiv(triton.cdiv(self.m, max(1, splits)), rows) * rows
        self.chunks = triton.cdiv(self.m, self.chunk) + (self.g if self.groups["GROUPS"] else 0)
        # Which products and sums the wanted gradients are made of.
        self.up_product = want.up_weight or want.scale
        self.down_product = want.down_weight or want.norm_weight
        self.grad_y_sums = want.up_bias or (want.scale and self.up_bias is not None)
        self.grad_z_sums = want.down_bias or want.norm_bias or (want.down_weight and self.norm_bias is not None)

    def rows(self):
        """grad_x, and the tiles of the hidden layer that ``columns`` needs: ``grad_z``, ``grad_skip``, ``hidden``."""
        x, want, block_r = self.x, self.want, self.row_blocks["BLOCK_R"]
        needed = (self.down_product or self.grad_z_sums, want.hidden_skip_weight, self.up_product)
        work = x.new_empty((self.m, sum(needed) * block_r))
        slots = iter(work.split(block_r, 1) if any(needed) else ())
        self.grad_z, self.grad_skip, self.hidden = (next(slots) if need else None for need in needed)
        normed = self.norm_weight is not None
        self.stats = x.new_empty((self.m, 2), dtype=torch.float32) if normed and self.down_product else None
        grad_x = x.new_empty(x.shape) if want.x else None
        if not (want.x or any(needed)):
            return x.new_empty(0)
        dots = None
        if normed and want.x:
            dots = x.new_empty((self.g, self.r, 2), dtype=torch.float32)
            bottleneck_bwd_norm_dots_kernel[(self.g * self.r,)](
                self.down_weight, self.norm_weight, self.norm_bias, dots, self.d, x, BLOCK_D=256, enable_fp_fusion=True
            )
        grid = (triton.cdiv(self.m, self.row_blocks["BLOCK_M"]) + (self.g + 2 if self.groups["GROUPS"] else 0),)
        bottleneck_bwd_rows_kernel[grid](
            self.grad_y, *self.grad_rows, x, *self.x_rows, grad_x, self.down_weight, self.up_weight, self.down_bias,
            self.scalar, self.channels, self.scale_value, self.norm_weight, self.norm_bias, self.norm_eps, dots,
            self.skip_weight, self.hidden_skip_weight, self.grad_z, self.grad_skip, self.hidden, work.shape[1], self.stats,
            self.order, self.starts, self.m, self.d, self.g, R=self.r, ACTIVATION=self.activation, ADD_X=self.add_x,
            NEED_GRAD_Z=want.x or any(needed[:2]), PRECISION=_precision(x), **self.groups, **self.row_blocks,
        )  # fmt: skip
        return x.new_empty(0) if grad_x is None else grad_x

    def columns(self, left, rows, d, order, right=None, stats=None, sums=False, other=None):
        """Planes of ``left.T @ right``, of the sums of ``left`` and of its dot products with ``other``, one a chunk of rows."""
        new, block_r = left.new_empty, self.row_blocks["BLOCK_R"]
        planes = None if right is None else new((self.chunks, d, block_r), dtype=torch.float32)
        sums = new((self.chunks, d), dtype=torch.float32) if sums else None
        dots = None if other is None else new((self.chunks, d), dtype=torch.float32)
        if planes is None and sums is None and dots is None:
            return None, None, None
        bottleneck_bwd_columns_kernel[(triton.cdiv(d, self.column_blocks["BLOCK_D"]) * self.chunks,)](
            left, *rows, stats, right, 0 if right is None else right.stride(0), other,
            *((None, 0, 0) if other is None else self.x_rows), planes, sums, dots, order, self.starts, self.m, d, self.g,
            self.chunk, PRECISION=_precision(left), **self.groups, **self.column_blocks,
        )  # fmt: skip
        return planes, sums, dots

    def weights(self):
        """The gradients of the parameters, in their order."""
        want, x, parameters = self.want, self.x, self.parameters
        if not any(want[1:]):
            return [x.new_empty(0) for _ in parameters]
        other = x if want.skip_weight else None
        up_planes, sums, dots = self.columns(
            self.grad_y, self.grad_rows, self.d, self.order, self.hidden, None, self.grad_y_sums, other
        )
        right = self.grad_z if self.down_product else None
        down_planes, _, _ = self.columns(x, self.x_rows, self.d, self.order, right, self.stats)
        grad_z_sums = grad_skip_sums = None
        if self.grad_z_sums:
            _, grad_z_sums, _ = self.columns(self.grad_z, (None, *self.grad_z.stride()), self.r, None, sums=True)
        if want.hidden_skip_weight:
            _, grad_skip_sums, _ = self.columns(self.grad_skip, (None, *self.grad_skip.stride()), self.r, None, sums=True)
        # What a bank shares, and a 0-d scale, comes out in parts: one a adapter, and a channel.
        parts = {
            name: x.new_empty((self.g, self.r if name == "hidden_skip_weight" else self.d), dtype=torch.float32)
            for name, t in parameters.items()
            if getattr(want, name) and (self.groups["GROUPS"] and name in _SHARED_BY_BANK or t.dim() == 0)
        }
        grads = {name: t.new_empty(t.shape) if getattr(want, name) else None for name, t in parameters.items()}
        grads |= parts
        block_r = self.row_blocks["BLOCK_R"]
        block_d = 32 if block_r <= 64 else 16
        bottleneck_bwd_reduce_kernel[(triton.cdiv(self.d, block_d) * self.g,)](
            up_planes, down_planes, sums, dots, grad_z_sums, grad_skip_sums, self.down_weight, self.up_weight,
            self.up_bias if want.scale else None, self.scalar, self.channels, self.scale_value, self.norm_weight,
            self.norm_bias, *grads.values(), self.starts, self.m, self.d, self.g, self.chunk, R=self.r, BLOCK_R=block_r,
            BLOCK_D=block_d, **self.groups, enable_fp_fusion=True,
        )  # fmt: skip
        for name, part in parts.items():
            grads[name] = (part.sum() if parameters[name].dim() == 0 else part.sum(0)).to(parameters[name].dtype)
        return [x.new_empty(0) if grad is None else grad for grad in grads.values()]


def bottleneck_bwd(
    grad_y, x, down_weight, up_weight, down_bias, up_bias, add_x, scale, scale_value, activation, norm_weight, norm_bias,
    norm_eps, skip_weight, hidden_skip_weight, adapter_ids, output_mask,
):  # fmt: skip
    parameters = (
        down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight, hidden_skip_weight,
    )  # fmt: skip
    want = _Wanted(*output_mask)
    if not x.numel():
        return tuple(t.new_zeros(t.shape) if wanted else x.new_empty(0) for t, wanted in zip((x, *parameters), want))
    with torch.cuda.device_of(x):
        call = _Backward(grad_y, x, _dense(*parameters), add_x, scale_value, activation, norm_eps, adapter_ids, want)
        return call.rows(), *call.weights()
