"""Triton kernels of adapter_fusion: a program keeps its rows of the query in registers while their keys go by once."""

import math

import torch
import triton
import triton.language as tl

from ._common import Tiles, row_offsets, rows_of, shared_memory
from .adapter_fusion_bwd import STRIDES, adapter_fusion_bwd_kernel, column, dots, load_tile, wide_dots

# BLOCK_D, up to which whole rows stay in registers. Wider ones are walked in pieces of the last, twice: the keys come from the
# L2 cache then.
_TILES = Tiles({"row": (8192, 1024)})
# Elements of the tile of a program of four warps: so few that several programs share a multiprocessor. It is the same for
# every number of rows, so that the order of a row's sums is.
_ELEMENTS = 2048


@triton.jit(do_not_specialize_on_alignment=STRIDES)
def adapter_fusion_fwd_kernel(
    query_ptr, query_table_ptr, query_stride_m, query_stride_d, keys_ptr, keys_table_ptr, keys_stride_m, keys_stride_d,
    keys_stride_g, values_ptr, values_table_ptr, values_stride_m, values_stride_d, values_stride_g, y_ptr, weights_ptr,
    scale_ptr, scale_value, m, d, g, WHOLE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows. WHOLE rows are scored and summed adapter by adapter, the sum rescaled where a score is the
    highest yet; wider ones are all scored before they are summed."""
    SHARED: tl.constexpr = values_ptr is None
    if SHARED:
        values_ptr, values_table_ptr, values_stride_m, values_stride_d = keys_ptr, keys_table_ptr, keys_stride_m, keys_stride_d
        values_stride_g = keys_stride_g
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    adapters = tl.arange(0, BLOCK_G)
    query_offsets = row_offsets(rows, inside, query_table_ptr, query_stride_m) * UNIT
    keys_offsets = row_offsets(rows, inside, keys_table_ptr, keys_stride_m) * UNIT
    values_offsets = row_offsets(rows, inside, values_table_ptr, values_stride_m) * UNIT
    scale = scale_value
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)

    scores = tl.full((BLOCK_M, BLOCK_G), -float("inf"), tl.float32)
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = inside[:, None] & (cols < d)[None, :]
    if WHOLE:
        query = load_tile(query_ptr, query_offsets, cols, query_stride_d, mask)
        top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i in tl.range(0, g, num_stages=STAGES):
        here = tl.cast(i, tl.int64) * UNIT
        if WHOLE:
            keys = load_tile(keys_ptr + here * keys_stride_g, keys_offsets, cols, keys_stride_d, mask)
            values = keys
            if not SHARED:
                values = load_tile(values_ptr + here * values_stride_g, values_offsets, cols, values_stride_d, mask)
            score = scale * dots(query, keys, mask)
            highest = tl.maximum(top, score)
            shift = tl.where(highest == -float("inf"), 0.0, highest)  # -inf less itself would be NaN
            fade, weight = tl.exp(top - shift), tl.exp(score - shift)
            top, total = highest, total * fade + weight
            y = y * fade[:, None] + weight[:, None] * values
        else:
            score = scale * wide_dots(
                query_ptr, query_offsets, query_stride_d, keys_ptr + here * keys_stride_g, keys_offsets, keys_stride_d,
                inside, d, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        scores = tl.where((adapters == i)[None, :], score[:, None], scores)

    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    weights /= tl.sum(weights, 1)[:, None]
    tl.store(weights_ptr + (rows * g)[:, None] + adapters[None, :], weights, mask=inside[:, None] & (adapters < g)[None, :])
    y_ptr += (rows * d)[:, None]
    if WHOLE:
        tl.store(y_ptr + cols[None, :], (y / total[:, None]).to(y_ptr.dtype.element_ty), mask=mask)
    else:
        for start in range(0, d, BLOCK_D):
            cols = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask = inside[:, None] & (cols < d)[None, :]
            y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for i in tl.range(0, g, num_stages=STAGES):
                here = values_ptr + tl.cast(i, tl.int64) * UNIT * values_stride_g
                y += column(weights, adapters, i)[:, None] * load_tile(here, values_offsets, cols, values_stride_d, mask)
            tl.store(y_ptr + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def _rows(t, unit):
    table, stride = rows_of(t)
    return t, table, stride // unit, t.stride(-1)


def _adapters(t, unit):
    if t is None:
        return None, None, 0, 0, 0
    _, *rows = _rows(t[0], unit)
    return t, *rows, t.stride(0) // unit


def _blocks(query, keys, values, *others):
    """Sizes, blocks and launch options of a kernel that walks the keys and the values."""
    d, g, tensors = query.shape[-1], keys.shape[0], [t for t in (keys, values) if t is not None]
    block_d = min(max(16, triton.next_power_of_2(d)), _TILES.pick("row", lambda tile: d <= tile))
    block_g = triton.next_power_of_2(g)
    block_m = max(1, _ELEMENTS // max(block_d, block_g))
    stages = shared_memory(query)[0] // 4 // (block_m * block_d * query.element_size() * len(tensors))
    unit = math.gcd(16, *(stride for t in (query, *tensors, *others) for stride in t.stride()[:-1]))
    return {
        "WHOLE": d <= block_d, "BLOCK_G": block_g, "BLOCK_M": block_m, "BLOCK_D": block_d, "STAGES": max(1, min(4, stages)),
        "UNIT": unit, "num_warps": max(4, block_d // 512), "enable_fp_fusion": True,
    }  # fmt: skip


def adapter_fusion_fwd(query, keys, values, scale, scale_value):
    y, g, d = query.new_empty(query.shape), keys.shape[0], query.shape[-1]
    weights = query.new_empty((*query.shape[:-1], g), dtype=torch.float32)
    m = weights.numel() // g
    if m:
        with torch.cuda.device_of(query):
            blocks = _blocks(query, keys, values)
            unit = blocks["UNIT"]
            adapter_fusion_fwd_kernel[(triton.cdiv(m, blocks["BLOCK_M"]),)](
                *_rows(query, unit), *_adapters(keys, unit), *_adapters(values, unit), y, weights, scale, scale_value, m, d, g,
                **blocks,
            )  # fmt: skip
    return y, weights


def adapter_fusion_bwd(grad_y, weights, query, keys, values, scale, scale_value, output_mask):
    want_query, want_keys, want_values, want_scale = output_mask
    g, d = keys.shape[0], query.shape[-1]
    m = weights.numel() // g
    grad_query = query.new_empty(query.shape) if want_query else None
    grad_keys = keys.new_empty(keys.shape) if want_keys else None
    grad_values = values.new_empty(values.shape) if want_values and values is not None else None
    grad_scale = scale.new_zeros(()) if want_scale else None
    if m:
        with torch.cuda.device_of(query):
            blocks = _blocks(query, keys, values, grad_y)
            unit = blocks["UNIT"]
            programs = triton.cdiv(m, blocks["BLOCK_M"])
            parts = query.new_empty(programs, dtype=torch.float32) if want_scale else None
            adapter_fusion_bwd_kernel[(programs,)](
                *_rows(grad_y, unit), weights.contiguous(), *_rows(query, unit), *_adapters(keys, unit),
                *_adapters(values, unit), grad_query, grad_keys, grad_values, parts, scale, scale_value, m, d, g, **blocks,
            )  # fmt: skip
            if want_scale:
                grad_scale = parts.sum().to(scale.dtype)
    return tuple(query.new_empty(0) if grad is None else grad for grad in (grad_query, grad_keys, grad_values, grad_scale))
