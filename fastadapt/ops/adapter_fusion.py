"""adapter_fusion: y = sum_i softmax_i(scale * <query, keys[i]>) * values[i], a choice among adapters for each token."""

import torch
from torch import Tensor

from .. import _check as check
from .._leaf import Leaf, differentiable_once, needs_grad, record
from .lora_linear import autocast, autocasts


def _scores(query: Tensor, keys: Tensor, scale: float | Tensor) -> Tensor:
    scale = scale.to(query.dtype) if isinstance(scale, Tensor) else scale
    return scale * torch.einsum("...d,g...d->...g", query, keys)


def adapter_fusion_reference(query: Tensor, keys: Tensor, values: Tensor, *, scale: float | Tensor = 1.0) -> Tensor:
    """The specification of :func:`adapter_fusion` in plain PyTorch, computed in the dtype of ``query``."""
    return torch.einsum("...g,g...d->...d", _scores(query, keys, scale).softmax(-1), values)


_ARGUMENTS = "Tensor query, Tensor keys, Tensor? values, Tensor? scale, float scale_value"


def _fwd_fake(query, keys, *args):
    shape = (*query.shape[:-1], keys.shape[0])
    return query.new_empty(query.shape), query.new_empty(shape, dtype=torch.promote_types(query.dtype, torch.float32))


def _bwd_fake(grad_y, weights, query, keys, values, scale, scale_value, output_mask):
    inputs = zip((query, keys, values, scale), output_mask)
    return tuple(t.new_empty(t.shape) if wanted else query.new_empty(0) for t, wanted in inputs)


_MAX_CUDA = 3000  # adapters whose numbers fit into the shared memory of any GPU


def _unsupported(backend, args):
    query, keys = args[:2]
    if backend == "native" and query.is_cpu:
        return None
    if query.dtype == torch.float64:
        return "does not support float64"
    if backend == "native" and isinstance(keys, Tensor) and keys.dim() and len(keys) > _MAX_CUDA:
        return f"supports up to {_MAX_CUDA} adapters, got {len(keys)}"
    return None


# ``values`` is None where it is ``keys`` itself, which is then read once; the gradient of both is that of ``keys``.
# ``scale_value`` is used where ``scale`` is None. ``weights`` is ``(..., g)`` in float32 (float64 for float64): what backward
# needs beside the arguments. The gradients of ``_bwd`` come in the order of the inputs that ``output_mask`` lists; those not
# wanted have shape (0,), the others are contiguous.
_fwd = Leaf("adapter_fusion_fwd", f"({_ARGUMENTS}) -> (Tensor y, Tensor weights)", _fwd_fake, _unsupported)
_bwd = Leaf(
    "adapter_fusion_bwd",
    f"(Tensor grad_y, Tensor weights, {_ARGUMENTS}, bool[4] output_mask) -> (Tensor grad_query, Tensor grad_keys, "
    "Tensor grad_values, Tensor grad_scale)",
    _bwd_fake,
)
_fwd.launch("adapter_fusion")
_bwd.launch("adapter_fusion")


class AdapterFusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, constants, query, keys, values, scale):
        ctx.constants = backend, scale_value = constants
        y, weights = getattr(_fwd, backend)(query, keys, values, scale, scale_value)
        ctx.save_for_backward(weights, query, keys, values, scale)
        ctx.mark_non_differentiable(weights)
        return y, weights

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_y, _):
        backend, scale_value = ctx.constants
        mask = list(ctx.needs_input_grad[1:])
        grads = [None] * 4
        if any(mask):
            outputs = getattr(_bwd, backend)(grad_y, *saved, scale_value, mask)
            grads = [grad if wanted else None for grad, wanted in zip(outputs, mask)]
        return None, *grads


def _arguments(query, keys, values, scale):
    """The arguments of the forward leaf: keys once where they are the values too, one tensor or one number for the scale."""
    check.tensor("values", values)  # None among the arguments of the leaf means something else
    scale, scale_value = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    return query, keys, None if values is keys else values, scale, scale_value


def _check(query, keys, values, scale, scale_value):
    check.activation_dtype("query", query)
    if query.dim() == 0 or query.shape[-1] == 0:
        raise ValueError(f"query must be (..., d) with d above zero, got {tuple(query.shape)}")
    check.tensor("keys", keys)
    if keys.dim() != query.dim() + 1 or keys.shape[1:] != query.shape or keys.shape[0] == 0:
        expected = ", ".join(map(str, ("g", *query.shape)))
        raise ValueError(f"keys must be (g, ..., d) = ({expected}) with g above zero to match query, got {tuple(keys.shape)}")
    for name, value in (("keys", keys), ("values", values)):
        if value is None:
            continue
        check.tensor(name, value)
        if value.shape != keys.shape:
            raise ValueError(f"{name} must be {tuple(keys.shape)} like keys, got {tuple(value.shape)}")
        if value.dtype != query.dtype:
            raise TypeError(f"{name} must be {query.dtype} like query, got {value.dtype}")
        check.same_device(name, value, query, "query")
    if scale is not None:
        check.parameter("scale", scale, query, (), "0-d", "query")
    elif not isinstance(scale_value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a number or a 0-d tensor, got {type(scale_value).__name__}")


def adapter_fusion(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float | Tensor = 1.0, return_weights: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """AdapterFusion's choice among ``g`` adapters, by token: ``y = sum_i softmax_i(scale * <query, keys[i]>) * values[i]``.

    Scores, softmax and sum are one pass over ``keys`` and ``values``, and one over both where they are the same tensor.
    Backward saves the arguments and ``g`` float32 numbers a row. Frozen arguments cost no gradient. Under autocast ``query``,
    ``keys`` and ``values`` are cast, as for PyTorch's attention, and a ``scale`` of 16 bits. A projection of the keys belongs
    into the query and one of the values behind the sum, so that neither is done ``g`` times: see
    :class:`fastadapt.nn.AdapterFusion`. Source: Pfeiffer et al. 2021 (AdapterFusion).

    Args:
        query: ``(..., d)``, any strides, so that ``expand`` gives a query that all rows share; float16, bfloat16, float32, or
            float64 on the CPU.
        keys: ``(g, ..., d)``, any strides, dtype of ``query``: what each adapter gives for each row.
        values: like ``keys``; passing ``keys`` itself reads it once.
        scale: a number or a 0-d tensor that multiplies the scores: one over the softmax's temperature.
        return_weights: also return the softmax, which has no gradient.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the first of triton, native, reference on CUDA
            and of native, reference elsewhere that supports the call (see :func:`fastadapt.explain`).

    Returns:
        ``y`` ``(..., d)``, contiguous, dtype of ``query``; with ``return_weights`` also the weights ``(..., g)``, float32
        (float64 for float64).

    Rounding: with a 16-bit ``query`` the output and the gradients are rounded once, at their end; all between is float32
    (float64 for float64). The rows of ``y`` don't depend on each other.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        RuntimeError: the backend asked for is missing or doesn't support the call, or the result is differentiated twice.
    """
    if not isinstance(query, Tensor):
        check.tensor("query", query)
    if autocasts(query):
        shared = values is keys
        query, keys, values, scale = autocast(query, (query, keys, None if shared else values), (scale,))
        values = keys if shared else values
    if isinstance(scale, (int, float)) and torch.compiler.is_compiling():
        # A tensor, since a number would be compiled in: one graph a value.
        scale = scale * torch.ones((), dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    args = _arguments(query, keys, values, scale)
    name = _fwd.choose(backend, "cpu" if query.is_cpu else query.device.type, args)
    if name != "native" or torch.compiler.is_compiling():
        _check(*args)
    if name == "reference":
        y = adapter_fusion_reference(query, keys, values, scale=scale)
        if not return_weights:
            return y
        precise = torch.promote_types(query.dtype, torch.float32)
        return y, _scores(query.detach(), keys.detach(), scale).detach().to(precise).softmax(-1)
    query, keys, values, scale, scale_value = args
    try:
        if needs_grad(query, keys, values, scale):
            y, weights = record(AdapterFusion, (name, scale_value), query, keys, values, scale)
        else:
            y, weights = getattr(_fwd, name)(*args)
    except Exception:
        # The kernel has refused the call. Checking only now keeps small calls fast; if an argument is to blame, say which.
        try:
            _check(*args)
        except (TypeError, ValueError) as error:
            raise error from None
        raise
    return (y, weights) if return_weights else y


adapter_fusion.leaf, adapter_fusion.arguments = _fwd, _arguments
