"""What the kernels of prefix_attention share: the rows of a key head, what they see, and their scores.

The rows of a key head are the queries of all query heads that share it, its ``group``. Scores are by base 2, and so are their
logarithms here.
"""

import triton
import triton.language as tl

from ._common import dropout_keeps

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32


@triton.jit
def head_tile(b, tiles):
    """Of this program: its sequence, its key head and its tile. Programs of a key head run together, so that its prefix stays
    in the L2 cache, and the last rows, which see the most keys, run first."""
    index = tl.program_id(0) // tiles
    return (index % b).to(tl.int64), (index // b).to(tl.int64), tiles - 1 - tl.program_id(0) % tiles


@triton.jit
def tile_queries(tile, t, group, PACKED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of the rows of a tile of a key head: which of its query heads and which queries they are, and which of them exist.
    ``PACKED``: a tile holds several short heads; else it is of one, which spares each row a division."""
    steps = tl.arange(0, BLOCK_M)
    if PACKED:
        rows = tile * BLOCK_M + steps
        members, queries, inside = rows // t, rows % t, rows < group * t
    else:
        tiles = tl.cdiv(t, BLOCK_M)
        queries = tile % tiles * BLOCK_M + steps
        members, inside = tile // tiles + 0 * steps, queries < t
    return members, queries, inside


@triton.jit
def query_offsets(sequence, head, members, queries, group, strides):
    """Where queries begin in a tensor ``(b, h, t, ...)``."""
    return sequence * strides[0] + (head * group + members) * strides[1] + queries.to(tl.int64) * strides[2]


@triton.jit
def flat_queries(sequence, head, members, queries, h_kv, group, t):
    """Numbers of queries among all ``b * h * t``."""
    return ((sequence * h_kv + head) * group + members) * t + queries


@triton.jit
def rows_tile(
    ptr, offsets, inside, stride, dtype: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr = 0
):  # fmt: skip
    """WIDTH columns from FIRST of the rows that begin at ``offsets``, filled up with zeros. ``inside`` None: all rows exist."""
    cols = FIRST + tl.arange(0, WIDTH).to(tl.int64)
    mask = (cols < E)[None, :]
    if inside is not None:
        mask = mask & inside[:, None]
    return tl.load(ptr + offsets[:, None] + (cols * stride)[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def factor_tiles(
    ptr, offsets, inside, stride, dtype: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The same rows as factors of :func:`row_products`: their tile and, of a wide head in float32, its halves. A product of
    tiles is one chain of sums there, which errs twice as much as PyTorch's over 256 columns. A tile that nobody reads isn't
    loaded."""
    tiles = (rows_tile(ptr, offsets, inside, stride, dtype, E, WIDTH),)
    if PRECISION == "ieee" and dtype == tl.float32 and WIDTH > 128:
        HALF: tl.constexpr = WIDTH // 2
        left = rows_tile(ptr, offsets, inside, stride, dtype, E, HALF)
        tiles = tiles[0], left, rows_tile(ptr, offsets, inside, stride, dtype, E, HALF, HALF)
    return tiles


@triton.jit
def row_products(these, others, PRECISION: tl.constexpr):
    """The products of rows with rows, both from :func:`factor_tiles`: [these, others]."""
    if len(these) == 1:
        products = tl.dot(these[0], tl.trans(others[0]), input_precision=PRECISION)
    else:  # a plain sum of both would be compiled to one chain again
        left = tl.dot(these[1], tl.trans(others[1]), input_precision=PRECISION)
        products = tl.fma(tl.dot(these[2], tl.trans(others[2]), input_precision=PRECISION), 1.0, left)
    return products


@triton.jit
def prefix_of(ids_ptr, sequence, p, g, ALONE: tl.constexpr):
    """Which prefix a sequence has, how long it is for it, and whether its id is one of the bank, or -1."""
    owner, length, valid = sequence * 0, tl.cast(p, tl.int32), sequence >= 0
    if ids_ptr is not None:
        owner = tl.load(ids_ptr + sequence).to(tl.int64)
        valid = (owner >= -1) & (owner < g)
        length = tl.where(valid & (owner >= 0), length, 0)
        owner = tl.where(length > 0, owner, 0)
    elif ALONE:
        owner = sequence
    return owner, length, valid


@triton.jit
def own_length(lengths_ptr, sequence, t_k):
    """How many own keys of a sequence are no padding."""
    length = tl.cast(t_k, tl.int32)
    if lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + sequence).to(tl.int64), 0), length).to(tl.int32)
    return length


@triton.jit
def limits_of(queries, inside, length, t, t_k, CAUSAL: tl.constexpr):
    """How many of the first own keys each query sees, if no mask hides more."""
    limits = tl.where(inside, length, 0)
    if CAUSAL:
        limits = tl.maximum(tl.minimum(limits, queries + (t_k - t) + 1), 0)
    return limits


@triton.jit
def hide(scores, keys, limits, mask_ptr, mask_offsets, mask_stride):
    """``scores`` where keys are below the limits of rows and not masked, -inf elsewhere, and where they are seen; a floating
    mask is added, and hides where it is -inf. ``keys``, ``limits`` and ``mask_offsets``, where the rows of the mask begin,
    broadcast to the scores."""
    seen = keys < limits
    if mask_ptr is not None:
        mask_ptrs = mask_ptr + mask_offsets + keys.to(tl.int64) * mask_stride
        if mask_ptr.dtype.element_ty == tl.uint8:
            seen = seen & (tl.load(mask_ptrs, mask=seen, other=0) != 0)
        else:
            bias = tl.load(mask_ptrs, mask=seen, other=0.0).to(tl.float32)
            added = bias * LOG2E
            added = tl.where(added < LOWEST, LOWEST, added)  # a finite mask hides nothing
            scores = tl.where(bias < LOWEST, float("-inf"), scores + added)
            # `bias != -inf` alone says the same, and takes registers that some chips don't have.
            seen = seen & ((scores != float("-inf")) | (bias >= LOWEST))
    return tl.where(seen, scores, float("-inf")), seen


@triton.jit
def kept_weights(rows, column, seed_ptr, threshold, kept_scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What dropout multiplies the weights of BLOCK_N columns by; a NaN stays one, as in PyTorch."""
    return tl.where(dropout_keeps(rows, column, seed_ptr, threshold, BLOCK_M, BLOCK_N), kept_scale, 0.0)


@triton.jit
def saved_lse(lse_ptr, rows, inside):
    """By base 2, and so that the weights of a row that sees no key are 0, as are those of rows that don't exist."""
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("-inf")) * LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def gates_of(gate_ptr, head, members, inside, group):
    return tl.load(gate_ptr + head * group + members, mask=inside, other=0.0).to(tl.float32)
