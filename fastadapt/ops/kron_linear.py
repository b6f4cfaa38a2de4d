"""kron_linear: y = residual + scale * (x @ sum_i kron(a[i], b[i])) + bias, the matrix never formed where that costs more."""

import math

import torch
from torch import Tensor

from .. import _check as check
from .._leaf import Leaf, differentiable_once, needs_grad, record
from .compacter import SHARED_FLOATS, kron_sum, product


def kron_linear_reference(
    x: Tensor, a: Tensor | tuple[Tensor, Tensor], b: Tensor | tuple[Tensor, Tensor], bias: Tensor | None = None, *,
    residual: Tensor | None = None, scale: float | Tensor = 1.0,
) -> Tensor:  # fmt: skip
    """The specification of :func:`kron_linear` in plain PyTorch, computed in the dtype of ``x``."""
    cast = lambda t: t.to(x.dtype)  # noqa: E731
    y = (cast(scale) if isinstance(scale, Tensor) else scale) * (x @ kron_sum(cast(product("a", a)), cast(product("b", b))))
    y = y if bias is None else y + cast(bias)
    return y if residual is None else residual + y


def cheapest_order(m: int, terms: int, a_in: int, a_out: int, b_in: int, b_out: int, q: int | None, dense: bool = True) -> str:
    """The order of contraction that takes the fewest multiplications.

    ``"factors"``: through the rank ``q`` of ``b``. ``"b first"``: ``x @ b``, then the sums with ``a``. ``"a first"``: the
    sums with ``a``, then the product with ``b``. ``"matrix"``, if ``dense`` allows it: the product with the matrix itself.
    """
    costs = {
        "b first": m * terms * a_in * b_out * (b_in + a_out),
        "a first": m * terms * a_out * b_in * (a_in + b_out),
    }
    if q is not None:
        costs["factors"] = m * terms * q * (a_in * b_in + a_in * a_out + a_out * b_out)
    if dense:
        costs["matrix"] = (terms + m) * a_in * a_out * b_in * b_out
    cheapest = "b first"
    for order in costs:  # not min with a key, which Dynamo can't trace
        cheapest = order if costs[order] < costs[cheapest] else cheapest
    return cheapest


def _order(x, a, s, t) -> str:
    """How plain PyTorch computes the call. float16 could lose the elements of the matrix, which are products of factors."""
    q, b_out = (None, s.shape[-1]) if t is None else (s.shape[-1], t.shape[-1])
    return cheapest_order(math.prod(x.shape[:-1]), *a.shape, s.shape[1], b_out, q, dense=x.dtype != torch.float16)


def _products(x, a, s, t, bias, residual, scale):
    """The call as products of plain PyTorch, in the cheapest order."""
    order, leading = _order(x, a, s, t), x.shape[:-1]
    a, s = a.to(x.dtype) if order != "matrix" else a, s.to(x.dtype) if order != "matrix" else s
    t = t if t is None or order == "matrix" else t.to(x.dtype)
    terms, a_in, a_out = a.shape
    rows = x.reshape(-1, a_in, s.shape[1])
    if order == "factors":
        z = (rows @ s.permute(1, 0, 2).flatten(1)).unflatten(-1, (terms, -1))
        y = torch.einsum("matr,tab->mbtr", z, a).flatten(2) @ t.flatten(0, 1)
    else:
        b = s if t is None else s @ t
        if order == "matrix":
            y = rows.flatten(1) @ kron_sum(a, b).to(x.dtype)
        elif order == "b first":
            products = (rows @ b.permute(1, 0, 2).flatten(1)).unflatten(-1, (terms, -1))
            y = torch.einsum("matp,tab->mbp", products, a)
        else:
            y = torch.einsum("map,tab->mbtp", rows, a).flatten(2) @ b.flatten(0, 1)
    y = scale * y.reshape(*leading, a_out * (s if t is None else t).shape[2])
    y = y if bias is None else y + bias.to(x.dtype)
    return y if residual is None else residual + y


_ARGUMENTS = "Tensor x, Tensor a, Tensor s, Tensor t, Tensor? bias, {residual}float scale"


def _fwd_fake(x, a, s, t, *args):
    return x.new_empty((*x.shape[:-1], a.shape[2] * t.shape[2]))


def _bwd_fake(grad_y, x, a, s, t, bias, scale, output_mask):
    inputs = (x, a, s, t, bias)
    return tuple(i.new_empty(i.shape) if wanted else x.new_empty(0) for i, wanted in zip(inputs, output_mask))


_MAX_TRITON = 128  # terms * q: the ranks of a chunk must fit the registers


def _unsupported(backend, args):
    x, a, s, t = args[:4]
    if t is None:
        order = f", {_order(x, a, s, t)}" if isinstance(s, Tensor) and (a.dim(), s.dim()) == (3, 3) else ""
        return f"computes b = (s, t); a dense b takes PyTorch's own products{order}"
    if backend == "native" and x.is_cpu:
        return None
    if x.dtype == torch.float64:
        return "does not support float64"
    if not all(isinstance(factor, Tensor) and factor.dim() == 3 for factor in (a, s)):
        return None
    terms, a_in, a_out, q = *a.shape, s.shape[2]
    if backend == "triton" and terms * q > _MAX_TRITON:
        return f"supports terms * q up to {_MAX_TRITON}, got {terms * q}"
    # What the backward pass keeps of a row in shared memory: its numbers of rank space and their gradients.
    if backend == "native" and 2 * (a_in + a_out) * -(-terms * q // 4) * 4 > SHARED_FLOATS:
        return f"keeps at most {SHARED_FLOATS} numbers a row, too few for a {tuple(a.shape)} and q = {q}"
    return None


# One call computes y from ``b = s @ t``. The gradients of ``_bwd`` come in the order of ``output_mask``: x, a, s, t, bias;
# those not wanted have shape (0,).
_fwd = Leaf(
    "kron_linear_fwd",
    f"({_ARGUMENTS.format(residual='Tensor? residual, ')}) -> Tensor",
    _fwd_fake,
    _unsupported,
)
_bwd = Leaf(
    "kron_linear_bwd",
    f"(Tensor grad_y, {_ARGUMENTS.format(residual='')}, bool[5] output_mask) -> (Tensor grad_x, Tensor grad_a, Tensor grad_s, "
    "Tensor grad_t, Tensor grad_bias)",
    _bwd_fake,
)
_fwd.launch("kron_linear")
_bwd.launch("kron_linear")


class KronLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, scale, x, a, s, t, bias, residual):
        ctx.save_for_backward(x, a, s, t, bias)
        ctx.constants = backend, scale
        return getattr(_fwd, backend)(x, a, s, t, bias, residual, scale)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_y):
        backend, scale = ctx.constants
        mask = list(ctx.needs_input_grad[2:7])
        grads = getattr(_bwd, backend)(grad_y, *saved, scale, mask) if any(mask) else mask
        grads = (grad if wanted else None for grad, wanted in zip(grads, mask))
        return (None, None, *grads, grad_y if ctx.needs_input_grad[7] else None)


def _arguments(x, a, b, bias, residual, scale):
    """The arguments of the forward leaf: a scale that is a tensor goes into ``a``; ``t`` is None for a dense ``b``."""
    if not isinstance(b, Tensor) and (not isinstance(b, (tuple, list)) or len(b) != 2):
        raise TypeError(f"b must be a tensor or two factors (s, t), got {type(b).__name__}")
    a, (s, t) = product("a", a), (b, None) if isinstance(b, Tensor) else b
    if isinstance(scale, Tensor):
        if scale.dim() or scale.dtype not in (x.dtype, torch.float32):
            check.parameter("scale", scale, x, (), "0-d")
        check.activation_dtype("a", a)
        # In 16 bits the product would be rounded. All factors have one dtype.
        wide, narrow = torch.promote_types(a.dtype, torch.float32), a.dtype
        a, s, t = (f.to(wide) if isinstance(f, Tensor) and f.dtype == narrow else f for f in (a, s, t))
        a, scale = scale * a, 1.0
    return x, a, s, t, bias, residual, scale


def _check(x, a, s, t, bias, residual, scale):
    check.activation_dtype("x", x)
    if x.dim() == 0:
        raise ValueError("x must be (..., a_in * b_in), got a 0-d tensor")
    factors = {"a": a, "b": s} if t is None else {"a": a, "s": s, "t": t}
    shapes = {"a": "(terms, a_in, a_out)", "b": "(terms, b_in, b_out)", "s": "(terms, b_in, q)", "t": "(terms, q, b_out)"}
    for name, factor in factors.items():
        check.tensor(name, factor)
        if factor.dim() != 3 or 0 in factor.shape:
            raise ValueError(f"{name} must be {shapes[name]} with no size zero, got {tuple(factor.shape)}")
    (terms, a_in, a_out), q, k = a.shape, s.shape[2], x.shape[-1]
    if k % a_in:
        raise ValueError(f"a must be (terms, a_in, a_out) with an a_in that divides the width {k} of x, got {tuple(a.shape)}")
    inner = k // a_in
    check.parameter("a", a, x, a.shape, "(terms, a_in, a_out)")
    if t is None:
        check.parameter("b", s, x, (terms, inner, q), "(terms, b_in, b_out) with a_in * b_in the width of x")
        b_out = q
    else:
        b_out = t.shape[2]
        check.parameter("s", s, x, (terms, inner, q), "(terms, b_in, q) with a_in * b_in the width of x")
        check.parameter("t", t, x, (terms, q, b_out), "(terms, q, b_out)")
    for name, factor in factors.items():
        if factor.dtype != a.dtype:
            raise TypeError(f"{name} must be {a.dtype} like a, got {factor.dtype}")
    n = a_out * b_out
    check.parameter("bias", bias, x, (n,), "(a_out * b_out,)")
    check.residual(residual, x, (*x.shape[:-1], n), "the output")
    if not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a number or a 0-d tensor, got {type(scale).__name__}")


def kron_linear(
    x: Tensor, a: Tensor | tuple[Tensor, Tensor], b: Tensor | tuple[Tensor, Tensor], bias: Tensor | None = None, *,
    residual: Tensor | None = None, scale: float | Tensor = 1.0, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """A linear map whose matrix is a sum of Kronecker products: ``y = residual + scale * (x @ matrix) + bias`` with
    ``matrix = sum_i kron(a[i], b[i])``.

    With ``b`` as two factors of a low rank ``q`` the matrix is never formed, nor is ``b``: a row passes through
    ``terms * q * (a_in + a_out)`` numbers, and nothing but ``y`` reaches memory. A dense ``b`` takes PyTorch's own products,
    in the order that :func:`fastadapt.explain` names: with ``a`` or with ``b`` first, or with the matrix, whichever costs
    least (of a sum of many terms, as in a full PHM layer, the matrix itself). Sources: Zhang et al. 2021 (PHM), Edalati et
    al. 2022 (KronA), Yeh et al. 2024 (LoKr).

    Args:
        x: ``(..., a_in * b_in)``, any strides; float16, bfloat16, float32, or float64 on the CPU.
        a: ``(terms, a_in, a_out)``, or a pair of factors ``(terms, a_in, p)`` and ``(terms, p, a_out)`` of it. Like every
            parameter below: dtype of ``x``, or float32 under a 16-bit ``x``; the same for all factors.
        b: factors ``(s, t)``, ``(terms, b_in, q)`` and ``(terms, q, b_out)``, so that ``b[i] = s[i] @ t[i]``; or dense,
            ``(terms, b_in, b_out)``.
        bias: ``(a_out * b_out,)`` or None.
        residual: ``(..., a_out * b_out)`` in the dtype of ``x``, the output of a frozen layer for example; or None.
        scale: a number or a 0-d tensor.
        backend: ``"native"``, ``"triton"`` or ``"reference"`` (PyTorch's own products); None takes the first of triton,
            native, reference on CUDA and of native, reference elsewhere that supports the call.

    Returns:
        ``(..., a_out * b_out)``, contiguous, dtype of ``x``.

    Rounding of the kernels: with a 16-bit ``x`` the output and the gradients are rounded once, at their end; all between is
    float32 (float64 for float64). The rows of ``y`` don't depend on each other.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        RuntimeError: the backend asked for is missing or doesn't support the call, or the result is differentiated twice.
    """
    if not isinstance(x, Tensor):
        check.tensor("x", x)
    if isinstance(scale, (int, float)) and scale != 1 and torch.compiler.is_compiling():
        # A tensor, since a number would be compiled in: one graph a value.
        scale = scale * torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    args = _arguments(x, a, b, bias, residual, scale)
    name = _fwd.choose(backend, "cpu" if x.is_cpu else x.device.type, args)
    if name != "native" or torch.compiler.is_compiling():
        _check(*args)
    if name == "reference":
        return _products(*args)
    try:
        if needs_grad(*args[:6]):
            return record(KronLinear, name, args[6], *args[:6])
        return getattr(_fwd, name)(*args)
    except Exception:
        # The kernel has refused the call. Checking only now keeps small calls fast; if an argument is to blame, say which.
        try:
            _check(*args)
        except (TypeError, ValueError) as error:
            raise error from None
        raise


kron_linear.leaf, kron_linear.arguments = _fwd, _arguments
