"""lora_linear: y = gain * (x @ W.T + scale * dropout(x) @ A.T @ diag @ B.T) + bias."""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check as check
from .._dense import dense, is_packed
from .._leaf import Leaf, differentiable_once, needs_grad, record
from . import dropout


def autocasts(t: Tensor) -> bool:
    """Whether autocast is on where ``t`` is; the meta device has none."""
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)


_NARROW = (torch.float16, torch.bfloat16)


def autocast(like: Tensor, operands: tuple, parameters: tuple) -> tuple:
    """``operands`` as PyTorch casts those of its products: all but float64, to the dtype of autocast where ``like`` is; and of
    ``parameters``, which may be float32 beside them, those of 16 bits. What is no tensor stays."""
    dtype = torch.get_autocast_dtype(like.device.type)
    cast = lambda t, dtypes: t.to(dtype) if isinstance(t, Tensor) and t.dtype in dtypes else t  # noqa: E731
    return *(cast(t, (*_NARROW, torch.float32)) for t in operands), *(cast(t, _NARROW) for t in parameters)


def without_autocast(t: Tensor):
    """A context in which products keep their dtype on the device of ``t``."""
    return torch.autocast(t.device.type, enabled=False) if autocasts(t) else contextlib.nullcontext()


# ``||weight + lora_b @ lora_a||`` of every row; both are float32, or float64 for float64. On a GPU it is PyTorch's.
_norms = Leaf(
    "lora_linear_norms",
    "(Tensor weight, Tensor lora_a, Tensor lora_b) -> Tensor",
    lambda weight, lora_a, lora_b: lora_a.new_empty(weight.shape[0]),
    lambda backend, args: None if args[0].stride(1) == 1 else "supports rows without gaps",
)


def row_norms(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float | Tensor = 1.0, diagonal: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """``||weight + scale * lora_b @ diag(diagonal) @ lora_a||`` of every row, without gradient.

    A block of rows at a time. To expand the square instead would be as many multiplications, but cancel: where the rows of
    ``lora_a`` are alike, or the update takes most of a row away, norms would err by up to thousands of units in the last
    place. Source: Liu et al. 2024, "DoRA".
    """
    with torch.no_grad(), without_autocast(weight):
        wide = torch.promote_types(weight.dtype, torch.float32)
        # In 16 bits a norm would err as much as the adapter changes it in a step.
        a, b = lora_a.to(wide), lora_b.to(wide)
        b = scale * (b if diagonal is None else b * diagonal)
        if _norms.choose(backend, weight.device.type, (weight, a, b)) == "native":
            return _norms.native(weight, a, b.contiguous())
        # 4 MiB of float32 on a CPU, as much as its second-level caches hold; on a GPU 16 MiB: each block is a few launches.
        rows = max(1, (2**20 if weight.is_cpu else 2**22) // max(1, weight.shape[1]))
        sums = (torch.addmm(block.to(wide), update, a) for block, update in zip(weight.split(rows), b.split(rows)))
        return torch.cat([torch.linalg.vector_norm(block, dim=1) for block in sums]).detach()  # no_grad lets tangents pass


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, *, scale: float | Tensor = 1.0,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None, magnitude: Tensor | None = None,
    lora_bias: Tensor | None = None, diagonal: Tensor | None = None, adapter_ids: Tensor | None = None,
) -> Tensor:
    """The specification of :func:`lora_linear` in plain PyTorch, computed in the dtype of ``x``."""
    cast = lambda t: t.to(x.dtype) if isinstance(t, Tensor) else t  # noqa: E731
    dropped = x
    if dropout_p:
        stays = dropout.kept(dropout_seed, math.prod(x.shape[:-1]), x.shape[-1], dropout_p).view(x.shape)
        dropped = torch.where(stays, x * dropout.kept_scale(dropout_p), 0.0)

    def branch(dropped, lora_a, lora_b, scale, lora_bias, diagonal):
        u = F.linear(dropped, cast(lora_a))
        u = u if diagonal is None else u * cast(diagonal)
        return cast(scale) * F.linear(u, cast(lora_b), cast(lora_bias))

    y, bank = F.linear(x, weight), (lora_a, lora_b, scale, lora_bias, diagonal)
    if adapter_ids is None:
        y = y + branch(dropped, *bank)
    else:
        ids = adapter_ids.reshape(adapter_ids.shape + (1,) * (x.dim() - 1 - adapter_ids.dim())).expand(x.shape[:-1])
        ids, shape = ids.reshape(-1), y.shape
        y, dropped = y.reshape(ids.shape[0], len(weight)), dropped.reshape(ids.shape[0], x.shape[-1])
        for i in range(len(lora_a)):
            rows = (ids == i).nonzero(as_tuple=True)
            mine = (t[i] if isinstance(t, Tensor) and t.dim() else t for t in bank)
            y = y.index_put(rows, y[rows] + branch(dropped[rows], *mine))
        y = y.view(shape)
    if magnitude is not None:
        y = y * cast(magnitude / row_norms(weight, lora_a, lora_b, scale, diagonal, "reference"))
    return y if bias is None else y + cast(bias)


_PARAMETERS = "Tensor lora_a, Tensor lora_b, Tensor? diagonal, Tensor? gain, float scale, float dropout_p, "
_PARAMETERS += "Tensor? seed, Tensor? adapter_ids"


def _saved_shape(x, lora_a):
    return math.prod(x.shape[:-1]), lora_a.shape[-2]  # numel() would make dynamic sizes numbers


def _fwd_fake(x, weight, bias, lora_a, *args):
    keep_z = args[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = *x.shape[:-1], weight.shape[0]
    return x.new_empty(shape), x.new_empty(_saved_shape(x, lora_a), dtype=wide), x.new_empty(shape if keep_z else 0)


def _bwd_fake(
    grad_y, x, u, z, weight, bias, lora_a, lora_b, diagonal, gain, scale, dropout_p, seed, adapter_ids, output_mask
):  # fmt: skip
    inputs = (x, weight, bias, lora_a, lora_b, diagonal, gain)
    return tuple(t.new_empty(t.shape) if wanted else x.new_empty(0) for t, wanted in zip(inputs, output_mask))


_MAX_RANK = 256  # on a GPU, of each adapter: the rank-r tiles must fit the registers


def _unsupported(backend, args):
    x, lora_a = args[0], args[3]
    if backend == "native" and x.is_cpu:
        return None
    if x.dtype == torch.float64:
        return "does not support float64"
    r = lora_a.shape[-2] if isinstance(lora_a, Tensor) and lora_a.dim() > 1 else 0
    return f"supports r up to {_MAX_RANK}, got {r}" if r > _MAX_RANK else None


# ``u = dropout(x) @ lora_a.T`` is float32 (float64 for float64), one row for each row of ``x``; it is what backward needs
# beside the arguments, and for the gradient of ``gain`` ``z``: ``y`` before ``gain`` and ``bias``, of shape (0,) without
# ``keep_z``. To take it from ``y`` would divide the rounding of ``bias`` by ``gain``. With ``adapter_ids`` ``lora_a``,
# ``lora_b`` and ``diagonal`` are banks, and a row of ``u`` is that of the row's own adapter, zero where it has none. The
# gradients of ``_bwd`` come in the order of ``output_mask``: x, weight, bias, lora_a, lora_b, diagonal, gain; those not wanted
# have shape (0,).
_fwd = Leaf(
    "lora_linear_fwd",
    f"(Tensor x, Tensor weight, Tensor? bias, {_PARAMETERS}, bool keep_z) -> (Tensor y, Tensor u, Tensor z)",
    _fwd_fake,
    _unsupported,
)
_bwd = Leaf(
    "lora_linear_bwd",
    f"(Tensor grad_y, Tensor x, Tensor u, Tensor? z, Tensor weight, Tensor? bias, {_PARAMETERS}, bool[7] output_mask) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_lora_a, Tensor grad_lora_b, Tensor grad_diagonal, "
    "Tensor grad_gain)",
    _bwd_fake,
)
_fwd.launch("lora_linear")
_bwd.launch("lora_linear")


class LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, constants, x, weight, bias, lora_a, lora_b, diagonal, gain, seed, adapter_ids):
        ctx.constants = backend, scale, dropout_p, packed = constants
        keep_z, shared = ctx.needs_input_grad[7], (scale, dropout_p, seed, adapter_ids)
        y, u, z = getattr(_fwd, backend)(x, weight, bias, lora_a, lora_b, diagonal, gain, *shared, keep_z)
        kept = weight if packed is None else None  # a quantised weight stays quantised until backward
        ctx.save_for_backward(x, u, z if keep_z else None, kept, bias, lora_a, lora_b, diagonal, gain, seed, adapter_ids)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_y):
        x, u, z, weight, *inputs, seed, adapter_ids = saved
        backend, scale, dropout_p, packed = ctx.constants
        mask = list(ctx.needs_input_grad[1:8])
        weight = weight if packed is None else dense(packed, x.dtype)
        shared = scale, dropout_p, seed, adapter_ids
        outputs = getattr(_bwd, backend)(grad_y, x, u, z, weight, *inputs, *shared, mask) if any(mask) else ()
        return (None, *(g if wanted else None for g, wanted in zip(outputs or mask, mask)), None, None)


def _arguments(
    x, weight, bias, lora_a, lora_b, scale, dropout_p, dropout_seed, magnitude, lora_bias, diagonal, adapter_ids, check_ids
):  # fmt: skip
    """The arguments of the forward leaf but ``keep_z``: DoRA as a gain of the output, a scale that is a tensor as a diagonal,
    and one bias, which that of a bank has no part in."""
    gain = None if magnitude is None else magnitude / row_norms(dense(weight, x.dtype), lora_a, lora_b, scale, diagonal)
    if lora_bias is not None and adapter_ids is None:
        added = scale * lora_bias.to(torch.promote_types(x.dtype, torch.float32))
        added = added if gain is None else gain * added
        bias = added if bias is None else bias + added
    if isinstance(scale, Tensor):
        scale = scale[:, None] if scale.dim() else scale
        wide = torch.promote_types(x.dtype, torch.float32)
        diagonal = scale.expand(lora_a.shape[:-1]) if diagonal is None else scale * diagonal.to(wide)
        scale = 1.0
    seed = dropout_seed if dropout_p else None
    return x, weight, bias, lora_a, lora_b, diagonal, gain, scale, dropout_p, seed, adapter_ids


def _add_lora_bias(y, lora_bias, scale, adapter_ids):
    """``y`` plus ``scale * lora_bias`` of each row's own adapter. A look-up, since its gradient is summed in a fixed order; in
    float64, since that sum is one chain as long as the batch."""
    table = lora_bias.double()
    table = F.pad((scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale) * table, (0, 0, 0, 1))
    ids = adapter_ids.long()
    rows = F.embedding(torch.where(ids < 0, len(lora_bias), ids.clamp(max=len(lora_bias))), table)
    rows = rows.to(torch.promote_types(y.dtype, torch.float32))
    return (y + rows.view(ids.shape + (1,) * (y.dim() - 1 - ids.dim()) + rows.shape[-1:])).to(y.dtype)


def check_adapter(like, name, n, k, lora_a, lora_b, scale, magnitude, diagonal, bank=False):
    """Refuse what can't be an adapter of an ``(n, k)`` weight, or a bank of them; dtype and device must go with ``like``,
    called ``name``."""
    check.tensor("lora_a", lora_a)
    if lora_a.dim() != 2 + bank or 0 in lora_a.shape[:-1]:
        expected = "(g, r, k) with g and r" if bank else "(r, k) with r"
        raise ValueError(f"lora_a must be {expected} at least 1, got {tuple(lora_a.shape)}")
    *g, r, _ = lora_a.shape
    lead = "g, " if bank else ""
    check.parameter("lora_a", lora_a, like, (*g, r, k), f"({lead}r, k)", name)
    check.tensor("lora_b", lora_b)
    check.parameter("lora_b", lora_b, like, (*g, n, r), f"({lead}n, r)", name)
    if lora_b.dtype != lora_a.dtype:
        raise TypeError(f"lora_b must be {lora_a.dtype} like lora_a, got {lora_b.dtype}")
    if isinstance(scale, Tensor):
        check.parameter("scale", scale, like, g if scale.dim() else (), "0-d or (g,)" if bank else "0-d", name)
    elif not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a number or a 0-d tensor, got {type(scale).__name__}")
    elif isinstance(scale, (int, float)) and not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    check.parameter("magnitude", magnitude, like, (n,), "(n,)", name)
    check.parameter("diagonal", diagonal, like, (*g, r), "(g, r)" if bank else "(r,)", name)


def _check(
    x, weight, bias, lora_a, lora_b, scale, dropout_p, dropout_seed, magnitude, lora_bias, diagonal, adapter_ids, check_ids,
    reads_ids=True,
):  # fmt: skip
    check.activation_dtype("x", x)
    if x.dim() == 0:
        raise ValueError("x must be (..., k), got a 0-d tensor")
    k = x.shape[-1]
    check.tensor("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != k:
        raise ValueError(f"weight must be (n, k) = (n, {k}) to match x, got {tuple(weight.shape)}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must be {x.dtype} like x, got {weight.dtype}")
    check.same_device("weight", weight, x)
    n = weight.shape[0]
    check.parameter("bias", bias, x, (n,), "(n,)")
    check.tensor("lora_a", lora_a)
    bank = adapter_ids is not None
    if not bank and lora_a.dim() == 3:
        raise ValueError(f"adapter_ids is needed when lora_a is a bank, got None with {tuple(lora_a.shape)}")
    if bank and lora_a.dim() != 3:
        raise ValueError(f"lora_a must be a bank (g, r, k) when adapter_ids is given, got {tuple(lora_a.shape)}")
    if bank and magnitude is not None:
        raise ValueError("magnitude must be None with adapter_ids, got a tensor: there are no banks of DoRA")
    check_adapter(x, "x", n, k, lora_a, lora_b, scale, magnitude, diagonal, bank)
    dropout.check(dropout_p, dropout_seed, x)
    g = lora_a.shape[:1] if bank else ()
    check.parameter("lora_bias", lora_bias, x, (*g, n), "(g, n)" if bank else "(n,)")
    if bank:
        check.adapter_ids(adapter_ids, x, *g, check_ids, reads_ids)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, *, scale: float | Tensor = 1.0,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None, magnitude: Tensor | None = None,
    lora_bias: Tensor | None = None, diagonal: Tensor | None = None, adapter_ids: Tensor | None = None,
    check_ids: bool = False, backend: str | None = None,
) -> Tensor:
    """A linear layer with LoRA:
    ``y = gain * (x @ weight.T + scale * (dropout(x) @ lora_a.T * diagonal @ lora_b.T + lora_bias)) + bias``.

    ``gain`` is 1, or with ``magnitude`` that of DoRA: ``magnitude / ||weight + scale * lora_b @ diag(diagonal) @ lora_a||``,
    each row's norm, which is not differentiated. Backward saves ``x``, ``dropout(x) @ lora_a.T`` (float32, r numbers a row) and
    the seed of dropout; for the gradient of ``magnitude`` also ``y`` before ``gain`` and ``bias``. Frozen arguments cost no
    gradient. Under autocast ``x``, ``weight`` and ``bias`` are cast, as for a linear layer, and other parameters of 16 bits.
    Sources: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA: a scale of alpha / sqrt(r)), Zhang et al. 2023 (AdaLoRA:
    ``diagonal``), Liu et al. 2024 (DoRA).

    Args:
        x: ``(..., k)``, any strides; float16, bfloat16, float32, or float64 on the CPU.
        weight: ``(n, k)``, dtype of ``x``; a transposed view serves a layer that keeps ``(k, n)``. Or a frozen, quantised
            weight: an object with a ``dequantize()`` of its own, as torchao's where they leave the input as it is, or a 4-bit
            one of bitsandbytes. It is made dense for this call and once more in backward, so that nothing dense is kept
            between them.
        bias: ``(n,)`` or None. Like every parameter below: dtype of ``x``, or float32 under a 16-bit ``x``.
        lora_a, lora_b: ``(r, k)`` and ``(n, r)``, or banks ``(g, r, k)`` and ``(g, n, r)`` with ``adapter_ids``. Adapters of
            lower rank are filled up with zeros, which is exact and stays so in training.
        scale: a number or a 0-d tensor; with a bank also ``(g,)``, one for each adapter.
        dropout_p: probability in [0, 1) that an element of ``x`` is dropped for the LoRA branch, in steps of 1 / 65536; the
            others grow by the inverse of the probability to stay. The layer in front of ``lora_a`` alone sees it.
        dropout_seed: 0-d int64 tensor that fixes the dropped elements; None draws one from torch's generator.
        magnitude: ``(n,)`` of DoRA, not with a bank.
        lora_bias: ``(n,)``, added to the LoRA branch before ``scale``. That of a bank is ``(g, n)`` and costs a pass over the
            output, which it is added to after that is rounded.
        diagonal: ``(r,)``, between ``lora_a`` and ``lora_b``; that of a bank ``(g, r)``.
        adapter_ids: integers, one for each entry of the leading dim of ``x`` (a sequence) or of all its leading dims (a
            token): the adapter of a bank that its rows go through. Those of -1 get the frozen layer's output alone. Other ids
            outside the bank raise on the CPU; on a GPU, where reading them would stall the stream, their rows become NaN.
        check_ids: read ``adapter_ids`` on a GPU all the same, and raise there too; ``torch.compile`` breaks its graph for that.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the first of triton, native, reference on CUDA
            and of native, reference elsewhere that supports the call (see :func:`fastadapt.explain`).

    Returns:
        ``(..., n)``, contiguous, dtype of ``x``; products accumulate in float32 (float64 for float64).

    Rounding, with a 16-bit ``x``: the output and the gradients once, at their end; that of ``magnitude`` comes from
    ``y`` before ``gain`` and ``bias``, which is rounded as well. Matrix units (every GPU backend) also round what they multiply
    to the dtype of ``x``: float32 parameters, ``scale * diagonal * u``; in backward ``gain * grad_y``, and the gradient of
    ``u``. On a CPU PyTorch's own product of ``x`` and ``weight`` (which copies rows that form no matrix) is
    added to the LoRA branch after that is rounded, and in backward to the branch's gradient of ``x``. The rows of ``y`` don't
    depend on each other; but in CUDA C++ a bank's adapter with weights that aren't finite may spoil rows of other adapters.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        RuntimeError: the backend asked for is missing or doesn't support the call, or the result is differentiated twice.
    """
    packed = weight if is_packed(weight) else None
    if isinstance(x, Tensor):
        weight = weight if packed is None else dense(packed, x.dtype)
        if autocasts(x):
            x, weight, bias, lora_a, lora_b, scale, magnitude, lora_bias, diagonal = autocast(
                x, (x, weight, bias), (lora_a, lora_b, scale, magnitude, lora_bias, diagonal)
            )
    given = (
        x, weight, bias, lora_a, lora_b, scale, dropout_p, dropout_seed, magnitude, lora_bias, diagonal, adapter_ids, check_ids
    )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    # The CPU kernel checks what it gets, and only if it refuses is looked for the argument to blame: small calls feel that.
    checked = compiling or not isinstance(x, Tensor) or not x.is_cpu or backend not in (None, "native")
    checked = checked or isinstance(scale, Tensor) or magnitude is not None or lora_bias is not None
    if checked:
        _check(*given, reads_ids=backend not in (None, "native"))
    if compiling or isinstance(scale, Tensor):
        # A number would be compiled in: one graph a value. The gradient of a tensor in 16 bits would round each of its terms.
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = scale.to(wide) if isinstance(scale, Tensor) else scale * torch.ones((), dtype=wide, device=x.device)
        given = *given[:5], scale, *given[6:]
    if dropout_p and dropout_seed is None:
        given = *given[:7], dropout.draw_seed(x.device), *given[8:]
    args = _arguments(*given)
    name = _fwd.choose(backend, "cpu" if x.is_cpu else x.device.type, args)
    if name == "reference":
        _check(*given)
        x, weight, bias, lora_a, lora_b, scale, dropout_p, *_ = given
        return lora_linear_reference(
            x, weight, bias, lora_a, lora_b, scale=scale, dropout_p=dropout_p, dropout_seed=args[-2], magnitude=magnitude,
            lora_bias=lora_bias, diagonal=diagonal, adapter_ids=adapter_ids,
        )  # fmt: skip
    *tensors, scale_value, dropout_p, seed, _ = args
    try:
        if needs_grad(*tensors):
            y = record(LoRALinear, (name, scale_value, dropout_p, packed), *tensors, seed, adapter_ids)
        else:
            y = getattr(_fwd, name)(*args, False)[0]
        return y if lora_bias is None or adapter_ids is None else _add_lora_bias(y, lora_bias, given[5], adapter_ids)
    except Exception:
        if checked and adapter_ids is None:
            raise
        try:
            _check(*given)
        except (TypeError, ValueError) as error:
            raise error from None
        raise


lora_linear.leaf, lora_linear.arguments = _fwd, _arguments
