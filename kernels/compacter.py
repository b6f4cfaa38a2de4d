"""Triton kernels of compacter: a program keeps the ranks and the hidden layer of its rows in registers."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import PROGRAMS, Tiles, dense, row_offsets, rows_of
from ._kron import Rows, expand_tile, padded, project_chunk, stages, tile_rows
from .compacter_bwd import compacter_bwd_factors_kernel, compacter_bwd_rows_kernel, fold, hidden_layer, unfold

# Tiles of the kernels that own rows, by the bytes of an element and whether the hidden layer is wide: BLOCK_M and BLOCK_P.
# Under 64 rows, since products of TensorFloat-32 are of registers then. See WGMMA in _common.py.
_TILES = Tiles(
    {
        (2, "narrow"): ((32, 32), (16, 64)),
        (2, "wide"): ((16, 64),),
        (4, "narrow"): ((32, 32), (16, 32)),
        (4, "wide"): ((16, 16),),
    }
)
_GRADIENTS = ("x", "down_a", "down_s", "down_t", "up_a", "up_s", "up_t", "down_bias", "up_bias", "scale")
_Wanted = NamedTuple("_Wanted", [(name, bool) for name in _GRADIENTS])


@triton.jit
def compacter_fwd_kernel(
    x_ptr, x_table_ptr, x_stride_m, x_stride_d, residual_ptr, residual_table_ptr, residual_stride_m, residual_stride_d, y_ptr,
    down_a_ptr, down_s_ptr, down_t_ptr, up_a_ptr, up_s_ptr, up_t_ptr, down_bias_ptr, up_bias_ptr, scale_ptr, scale_value,
    order_ptr, starts_ptr, m, chunk, g, N: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, ACTIVATION: tl.constexpr,
    ADD_X: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows of one adapter. It walks x chunk by chunk, each through its ranks to the hidden layer, which
    stays in registers, and from there chunk by chunk to y, where x comes from the L2 cache."""
    present = tl.arange(0, BLOCK_R) < N * C
    width, limit = chunk, N * C
    group, _, rows, inside = tile_rows(order_ptr, starts_ptr, m, g, GROUPS, BLOCK_M)
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
        if up_bias_ptr is not None:
            up_bias_ptr += group * N * chunk
    x_offsets = row_offsets(rows, inside, x_table_ptr, x_stride_m)
    v = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for part in range(0, N):
        z = project_chunk(
            x_ptr, x_offsets, inside, x_stride_d, part * tl.cast(chunk, tl.int64), width, down_s_ptr, Q, Q * chunk, 1, Q, N * Q,
            BLOCK_K, BLOCK_M, BLOCK_P, PRECISION,
        )  # fmt: skip
        v = unfold(z, v, down_a_ptr, down_t_ptr, part, limit, False, N, Q, C, BLOCK_K, BLOCK_R, PRECISION)
    _, hidden, _ = hidden_layer(v, present, down_bias_ptr, limit, BLOCK_R, ACTIVATION)

    scale = scale_value
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    if residual_ptr is not None:
        residual_offsets = row_offsets(rows, inside, residual_table_ptr, residual_stride_m)
    for part in range(0, N):
        up = fold(hidden, up_a_ptr, up_s_ptr, part, limit, True, N, Q, C, BLOCK_K, BLOCK_R, BLOCK_M, PRECISION)
        for first in range(0, chunk, BLOCK_P):
            cols = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
            valid = cols < width
            mask = inside[:, None] & (cols < chunk)[None, :]
            y = expand_tile(up, up_t_ptr, cols, valid, 1, Q * chunk, chunk, Q, N * Q, BLOCK_K, PRECISION)
            cols += part * tl.cast(chunk, tl.int64)
            if up_bias_ptr is not None:
                y += tl.load(up_bias_ptr + cols, mask=valid, other=0.0).to(tl.float32)[None, :]
            y *= scale
            if GROUPS:  # adapter -1 leaves the residual as it is, an id outside the bank spoils its row
                y = tl.where(group < g, y, tl.where(group == g, 0.0, float("nan")))
            if ADD_X:
                x = tl.load(x_ptr + x_offsets[:, None] + cols[None, :] * x_stride_d, mask=mask, other=0.0)
                y = x.to(tl.float32) + y
            if residual_ptr is not None:
                residual_ptrs = residual_ptr + residual_offsets[:, None] + cols[None, :] * residual_stride_d
                y = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32) + y
            tl.store(y_ptr + (rows * N * chunk)[:, None] + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


class _Sizes(NamedTuple):
    m: int
    chunk: int
    n: int
    q: int
    c: int

    @property
    def constants(self):
        return {"N": self.n, "Q": self.q, "C": self.c, "BLOCK_K": padded(self.n * self.q), "BLOCK_R": padded(self.n * self.c)}


def _sizes(x, down_s, down_t):
    n, chunk, q = down_s.shape[-3:]
    return _Sizes(x.numel() // x.shape[-1], chunk, n, q, down_t.shape[-1])


def _row_blocks(x, sizes, precision):
    """Blocks and launch options of the kernels that own rows: the tallest tile of which there are enough."""
    constants = sizes.constants
    wide = constants["BLOCK_R"] > 64 or constants["BLOCK_K"] > 32
    block_m, block_p = _TILES.pick(
        (x.element_size(), "wide" if wide else "narrow"),
        lambda tile: tile[0] == 16 or triton.cdiv(sizes.m, tile[0]) >= PROGRAMS // 2,
    )
    return constants | {
        "BLOCK_M": block_m, "BLOCK_P": block_p, "num_warps": 8 if wide else 4, "num_stages": stages(x, wide),
        "enable_fp_fusion": True, "PRECISION": precision,
    }  # fmt: skip


def compacter_fwd(
    x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, residual, add_x, scale, scale_value, activation,
    adapter_ids,
):  # fmt: skip
    y = x.new_empty(x.shape)
    if not x.numel():
        return y
    sizes = _sizes(x, down_s, down_t)
    with torch.cuda.device_of(x):
        rows = Rows(x, sizes.m, adapter_ids, 1 if adapter_ids is None else down_a.shape[0])
        blocks = _row_blocks(x, sizes, rows.precision)
        residual_rows = (None, 0, 0) if residual is None else (*rows_of(residual), residual.stride(-1))
        compacter_fwd_kernel[(rows.grid(blocks["BLOCK_M"]),)](
            x, *rows_of(x), x.stride(-1), residual, *residual_rows, y,
            *dense(down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias), scale, scale_value, rows.order, rows.starts,
            sizes.m, sizes.chunk, rows.g, ACTIVATION=activation, ADD_X=add_x, **rows.groups, **blocks,
        )  # fmt: skip
    return y


class _Backward:
    """One call of the backward pass: what it was given, what is wanted of it, and its two steps."""

    def __init__(self, grad_y, x, parameters, add_x, scale_value, activation, adapter_ids, want):
        self.grad_y, self.x, self.want, self.scale_value = grad_y, x, want, scale_value
        self.add_x, self.activation = add_x, activation
        self.parameters = dict(zip(_GRADIENTS[1:], parameters))
        self.scale = self.parameters["scale"]
        self.sizes = _sizes(x, *parameters[1:3])
        self.rows = Rows(x, self.sizes.m, adapter_ids, 1 if adapter_ids is None else parameters[0].shape[0])
        self.x_rows, self.grad_rows = ((*rows_of(t), t.stride(-1)) for t in (x, grad_y))
        # What is wanted of the ranks of rows.
        self.of_folded_down, self.of_folded_up = want.down_a or want.down_t, want.up_a or want.up_s
        self.of_up_t = want.up_t or want.scale
        grad_v = self.of_folded_down or want.down_bias
        needed = {
            "z": self.of_folded_down, "grad_z": want.down_s, "up": self.of_up_t, "grad_up": self.of_folded_up,
            "hidden": self.of_folded_up, "grad_v": grad_v,
        }  # fmt: skip
        n, q, c = self.sizes[2:]
        columns = [need * (n * c if name in ("hidden", "grad_v") else n * n * q) for name, need in needed.items()]
        work = x.new_empty((self.sizes.m, sum(columns)), dtype=torch.float32)
        parts = work.split(columns, 1)
        self.work = {name: part if need else None for (name, need), part in zip(needed.items(), parts)}
        self.work_stride = work.shape[1]

    def of_rows(self):
        """grad_x, and the ranks of rows that ``of_weights`` needs."""
        x, want = self.x, self.want
        grad_x = x.new_empty(x.shape) if want.x else None
        if want.x or self.work_stride:
            down = want.x or self.work["grad_z"] is not None or self.work["grad_v"] is not None
            blocks = _row_blocks(x, self.sizes, self.rows.precision)
            factors = list(self.parameters.values())[:7]
            compacter_bwd_rows_kernel[(self.rows.grid(blocks["BLOCK_M"]),)](
                self.grad_y, *self.grad_rows, x, *self.x_rows, grad_x, *factors, self.scale, self.scale_value,
                *self.work.values(), self.work_stride, self.rows.order, self.rows.starts, self.sizes.m, self.sizes.chunk,
                self.rows.g, ACTIVATION=self.activation, ADD_X=self.add_x, NEED_UP=down or self.of_folded_up, NEED_DOWN=down,
                **self.rows.groups, **blocks,
            )  # fmt: skip
        return x.new_empty(0) if grad_x is None else grad_x

    def of_folded(self, left, right, scale, a, t, strides):
        """Gradients of the two factors that ``folded`` multiplies; ``strides`` are those that it takes."""
        n, q, c = self.sizes[2:]
        grads = [self.grads[name] for name in (a, t)]
        if grads == [None, None]:
            return
        ranks, units = n * n * q, n * c
        product = self.x.new_empty((self.rows.g, ranks, units), dtype=torch.float32)
        self.rows.sum(
            self.work[left], (None, self.work_stride, 1, None), 1, ranks, self.work[right], k=units, q=units, scale=scale,
            grad=product, strides=(units, 0, 1, ranks * units),
        )  # fmt: skip
        compacter_bwd_factors_kernel[(self.rows.g * n,)](
            product, self.parameters[a], self.parameters[t], *grads, *strides, N=n, Q=q, C=c,
            BLOCK_N=triton.next_power_of_2(n), BLOCK_C=triton.next_power_of_2(c),
            enable_fp_fusion=False,  # a product fused with a sum over lanes would round differently in each of them
        )  # fmt: skip

    def of_weights(self):
        """The gradients of the parameters, in their order."""
        want, x, parameters, rows, work = self.want, self.x, self.parameters, self.rows, self.work
        _, chunk, n, q, c = self.sizes
        names = _GRADIENTS[1:-1]
        self.grads = {name: torch.empty_like(parameters[name]) if getattr(want, name) else None for name in names}
        scale = self.scale, self.scale_value
        if want.down_s:
            rows.sum(
                x, (*self.x_rows, rows.order), n, chunk, work["grad_z"], n * q, k=n * q, q=q, grad=self.grads["down_s"],
                strides=(q, chunk * q, 1, n * chunk * q),
            )  # fmt: skip
        parts = None
        up_bias = parameters["up_bias"] if want.scale else None
        sums = want.up_bias or up_bias is not None
        if self.of_up_t or sums:
            parts = x.new_empty((rows.g, chunk), dtype=torch.float32) if want.scale else None
            rows.sum(
                self.grad_y, (*self.grad_rows, rows.order), n, chunk, work["up"], n * q, sums, grad=self.grads["up_t"],
                strides=(1, q * chunk, chunk, n * q * chunk), q=q, k=n * q, weight=parameters["up_t"], bias=up_bias,
                scale=scale, grad_bias=self.grads["up_bias"], grad_scale=parts,
            )  # fmt: skip
        self.of_folded("z", "grad_v", (None, 1.0), "down_a", "down_t", (n, 1, c, 1))
        self.of_folded("grad_up", "hidden", scale, "up_a", "up_s", (1, n, 1, q))
        if want.down_bias:
            tape = None, self.work_stride, 1, None
            rows.sum(work["grad_v"], tape, 1, n * c, sums=True, tile=16, grad_bias=self.grads["down_bias"], scaled_bias=False)
        grads = [x.new_empty(0) if grad is None else grad for grad in self.grads.values()]
        return [*grads, parts.sum().to(self.scale.dtype) if want.scale else x.new_empty(0)]


def compacter_bwd(
    grad_y, x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, add_x, scale, scale_value, activation, adapter_ids,
    output_mask,
):  # fmt: skip
    parameters = down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, scale
    want = _Wanted(*output_mask)
    if not x.numel():
        return tuple(t.new_zeros(t.shape) if wanted else x.new_empty(0) for t, wanted in zip((x, *parameters), want))
    with torch.cuda.device_of(x):
        call = _Backward(grad_y, x, dense(*parameters), add_x, scale_value, activation, adapter_ids, want)
        return call.of_rows(), *call.of_weights()
