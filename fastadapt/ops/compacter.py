"""compacter: y = residual + scale * (act(x @ Hd + bd) @ Hu + bu), H a sum of Kronecker products of low rank."""

import torch
from torch import Tensor

from .. import _check as check
from .._leaf import Leaf, differentiable_once, needs_grad, record
from .bottleneck import _CODES, ACTIVATIONS

SHARED_FLOATS = 24 * 1024  # in the shared memory of the smallest GPUs
Factors = tuple[Tensor | tuple[Tensor, Tensor], Tensor, Tensor]


def kron_sum(a: Tensor, b: Tensor) -> Tensor:
    """``sum_i kron(a[i], b[i])``: ``(terms, a_in, a_out)`` and ``(terms, b_in, b_out)`` give ``(a_in b_in, a_out b_out)``."""
    products = a[:, :, None, :, None] * b[:, None, :, None, :]
    return products.sum(0).reshape(a.shape[1] * b.shape[1], a.shape[2] * b.shape[2])


def product(name: str, factor: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """``factor`` itself, or the product of the two that it is given as: by sums, which autocast leaves in their dtype."""
    if isinstance(factor, Tensor):
        return factor
    if not isinstance(factor, (tuple, list)) or [isinstance(t, Tensor) for t in factor] != [True, True]:
        raise TypeError(f"{name} must be a tensor or a pair of tensors, got {type(factor).__name__}")
    left, right = factor
    if left.dim() < 2 or left.shape[:-2] != right.shape[:-2] or left.shape[-1:] != right.shape[-2:-1]:
        raise ValueError(f"{name} must be a pair (n, i, p) and (n, p, j), got {tuple(left.shape)} and {tuple(right.shape)}")
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2, dtype=left.dtype)


def compacter_reference(
    x: Tensor, down: Factors, up: Factors, *, down_bias: Tensor | None = None, up_bias: Tensor | None = None,
    residual: Tensor | None = None, scale: float | Tensor = 1.0, activation: str = "gelu", adapter_ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The specification of :func:`compacter` in plain PyTorch, computed in the dtype of ``x``."""
    cast = lambda t: None if t is None else t.to(x.dtype)  # noqa: E731
    scale = cast(scale) if isinstance(scale, Tensor) else scale

    def phm(x, factors, bias):
        a, s, t = map(cast, factors)
        y = x @ kron_sum(a, s @ t)
        return y if bias is None else y + cast(bias)

    def adapter(x, down, up, down_bias, up_bias):
        return scale * phm(ACTIVATIONS[activation](phm(x, down, down_bias)), up, up_bias)

    down, up = ((product("a", a), s, t) for a, s, t in (down, up))
    if adapter_ids is None:
        y = adapter(x, down, up, down_bias, up_bias)
        return y if residual is None else residual + y
    ids = adapter_ids.reshape(adapter_ids.shape + (1,) * (x.dim() - 1 - adapter_ids.dim())).expand(x.shape[:-1]).reshape(-1)
    shape, x = x.shape, x.reshape(ids.shape[0], x.shape[-1])  # which may have no columns
    y = torch.zeros_like(x) if residual is None else residual.reshape(x.shape)
    for i in range(len(down[0])):
        rows = (ids == i).nonzero(as_tuple=True)
        biases = (None if t is None else t[i] for t in (down_bias, up_bias))
        y = y.index_put(rows, y[rows] + adapter(x[rows], [t[i] for t in down], [t[i] for t in up], *biases))
    return y.reshape(shape)


_ARGUMENTS = (
    "Tensor x, Tensor down_a, Tensor down_s, Tensor down_t, Tensor up_a, Tensor up_s, Tensor up_t, Tensor? down_bias, "
    "Tensor? up_bias, {residual}bool add_x, Tensor? scale, float scale_value, int activation, Tensor? adapter_ids"
)


def _fwd_fake(x, *args):
    return x.new_empty(x.shape)


def _bwd_fake(
    grad_y, x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, add_x, scale, scale_value, activation,
    adapter_ids, output_mask,
):  # fmt: skip
    inputs = (x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, scale)
    return tuple(t.new_empty(t.shape) if wanted else x.new_empty(0) for t, wanted in zip(inputs, output_mask))


_MAX_TRITON = 512, 64  # r and n * q: the hidden layer and the ranks of a chunk must fit the registers


def _unsupported(backend, args):
    x, _, s, t = args[:4]
    if backend == "native" and x.is_cpu:
        return None
    if x.dtype == torch.float64:
        return "does not support float64"
    if not all(isinstance(factor, Tensor) and factor.dim() > 2 for factor in (s, t)):
        return None
    n, q, r = s.shape[-3], s.shape[-1], s.shape[-3] * t.shape[-1]
    if backend == "triton" and (r > _MAX_TRITON[0] or n * q > _MAX_TRITON[1]):
        return f"supports r up to {_MAX_TRITON[0]} and n * q up to {_MAX_TRITON[1]}, got {r} and {n * q}"
    # What the backward pass keeps of a row in shared memory: 8 times its numbers of rank space, twice the bottleneck.
    if backend == "native" and 8 * n * -(-n * q // 4) * 4 + 2 * r > SHARED_FLOATS:
        return f"keeps at most {SHARED_FLOATS} numbers a row, too few for n = {n}, q = {q}, r = {r}"
    return None


# One call computes y.  ``add_x`` stands for a residual that is x itself, so that x is read once; ``scale_value`` is used
# where ``scale`` is None.  The gradients of ``_bwd`` come in the order of the inputs it lists in ``output_mask``; those not
# wanted have shape (0,).
_fwd = Leaf("compacter_fwd", f"({_ARGUMENTS.format(residual='Tensor? residual, ')}) -> Tensor", _fwd_fake, _unsupported)
_bwd = Leaf(
    "compacter_bwd",
    f"(Tensor grad_y, {_ARGUMENTS.format(residual='')}, bool[10] output_mask) -> (Tensor grad_x, Tensor grad_down_a, "
    "Tensor grad_down_s, Tensor grad_down_t, Tensor grad_up_a, Tensor grad_up_s, Tensor grad_up_t, Tensor grad_down_bias, "
    "Tensor grad_up_bias, Tensor grad_scale)",
    _bwd_fake,
)
_fwd.launch("compacter")
_bwd.launch("compacter")


class Compacter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, constants, x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, residual, scale, adapter_ids
    ):
        ctx.save_for_backward(x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, scale, adapter_ids)
        ctx.constants = backend, add_x, scale_value, activation = constants
        return getattr(_fwd, backend)(
            x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, residual, add_x, scale, scale_value, activation,
            adapter_ids,
        )  # fmt: skip

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_y):
        *inputs, scale, adapter_ids = saved
        backend, add_x, scale_value, activation = ctx.constants
        needs = ctx.needs_input_grad
        mask = [*needs[1:10], needs[11]]
        grads = [None] * 10
        if any(mask):
            outputs = getattr(_bwd, backend)(
                grad_y, *inputs, add_x, scale, scale_value, activation, adapter_ids, mask
            )
            grads = [grad if wanted else None for grad, wanted in zip(outputs, mask)]
        grad_residual = grad_y if needs[10] else None
        return (None, *grads[:9], grad_residual, grads[9], None)


def _arguments(x, down, up, down_bias, up_bias, residual, scale, activation, adapter_ids):
    """The arguments of the forward leaf: codes for names, one tensor or one number for the scale."""
    if not isinstance(activation, str) or activation not in _CODES:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    for name, factors in (("down", down), ("up", up)):
        if not isinstance(factors, (tuple, list)) or len(factors) != 3:
            got = f"{len(factors)} of them" if isinstance(factors, (tuple, list)) else type(factors).__name__
            raise TypeError(f"{name} must be three factors (a, s, t), got {got}")
    add_x = residual is x
    scale, scale_value = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    down, up = ((product(f"{name}[0]", a), s, t) for name, (a, s, t) in (("down", down), ("up", up)))
    residual = None if add_x else residual
    code = _CODES[activation]
    return x, *down, *up, down_bias, up_bias, residual, add_x, scale, scale_value, code, adapter_ids


def _check(
    x, down_a, down_s, down_t, up_a, up_s, up_t, down_bias, up_bias, residual, add_x, scale, scale_value, activation,
    adapter_ids,
):  # fmt: skip
    check.activation_dtype("x", x)
    if x.dim() == 0:
        raise ValueError("x must be (..., d), got a 0-d tensor")
    check.tensor("down[0]", down_a)
    if down_a.dim() not in (3, 4) or len(set(down_a.shape[-3:])) != 1:
        raise ValueError(f"down[0] must be (n, n, n), or (g, n, n, n) with adapter_ids, got {tuple(down_a.shape)}")
    bank, n, d = tuple(down_a.shape[:-3]), down_a.shape[-1], x.shape[-1]
    if bank and adapter_ids is None:
        raise ValueError(f"adapter_ids is needed when down[0] is a bank, got None with {tuple(down_a.shape)}")
    if adapter_ids is not None and not bank:
        raise ValueError(f"down[0] must be a bank (g, n, n, n) when adapter_ids is given, got {tuple(down_a.shape)}")
    if n == 0 or d % n:
        raise ValueError(f"down[0] must be (n, n, n) with an n that divides d = {d}, got {tuple(down_a.shape)}")
    check.tensor("down[1]", down_s)
    check.tensor("down[2]", down_t)
    q, chunk = (down_s.shape[-1] if down_s.dim() else 0), (down_t.shape[-1] if down_t.dim() else 0)
    if not q or not chunk:
        raise ValueError(
            "down[1] and down[2] must be (n, d/n, q) and (n, q, r/n) with q and r above zero, "
            f"got {tuple(down_s.shape)} and {tuple(down_t.shape)}"
        )
    g = "g, " if bank else ""
    for name, factor, shape, meaning in (
        ("down[0]", down_a, (n, n, n), "n, n, n"),
        ("down[1]", down_s, (n, d // n, q), "n, d/n, q"),
        ("down[2]", down_t, (n, q, chunk), "n, q, r/n"),
        ("up[0]", up_a, (n, n, n), "n, n, n"),
        ("up[1]", up_s, (n, chunk, q), "n, r/n, q"),
        ("up[2]", up_t, (n, q, d // n), "n, q, d/n"),
    ):
        check.tensor(name, factor)
        check.parameter(name, factor, x, (*bank, *shape), f"({g}{meaning})")
        if factor.dtype != down_a.dtype:
            raise TypeError(f"{name} must be {down_a.dtype} like down[0], got {factor.dtype}")
    check.parameter("down_bias", down_bias, x, (*bank, n * chunk), f"({g}r{'' if bank else ','})")
    check.parameter("up_bias", up_bias, x, (*bank, d), f"({g}d{'' if bank else ','})")
    check.residual(residual, x, x.shape)
    if scale is not None:
        check.parameter("scale", scale, x, (), "0-d")
    elif not isinstance(scale_value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a number or a 0-d tensor, got {type(scale_value).__name__}")
    if adapter_ids is not None:
        check.adapter_ids(adapter_ids, x, bank[0])


def compacter(
    x: Tensor, down: Factors, up: Factors, *, down_bias: Tensor | None = None, up_bias: Tensor | None = None,
    residual: Tensor | None = None, scale: float | Tensor = 1.0, activation: str = "gelu", adapter_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Compacter adapter: ``y = residual + scale * (act(x @ H_down + down_bias) @ H_up + up_bias)``.

    Each ``H`` is ``sum_i kron(a[i], s[i] @ t[i])`` over ``n`` terms and is never formed: a row passes through ``n * n * q``
    numbers on its way down and on its way up. Only the output reaches memory; the backward pass recomputes the rest. Frozen
    arguments cost no gradient. Under autocast the op keeps the dtype of ``x``, as a residual stream needs. Sources: Zhang et
    al. 2021 (parameterised hypercomplex multiplication), Karimi Mahabadi et al. 2021 (Compacter).

    Args:
        x: ``(..., d)``, any strides; float16, bfloat16, float32, or float64 on the CPU.
        down: ``(a, s, t)`` of shapes ``(n, n, n)``, ``(n, d/n, q)``, ``(n, q, r/n)``; ``n`` divides ``d`` and ``r``. ``a`` may
            be a pair of factors ``(n, n, p)`` and ``(n, p, n)`` of it. With ``adapter_ids`` each has a leading ``g``. Like
            every parameter below: dtype of ``x``, or float32 under a 16-bit ``x``; the same for all factors.
        up: ``(a, s, t)`` of shapes ``(n, n, n)``, ``(n, r/n, q)``, ``(n, q, d/n)``, in everything else like ``down``.
        down_bias, up_bias: ``(r,)`` and ``(d,)``, with a leading ``g`` in a bank, or None.
        residual: shape and dtype of ``x``, or None to add nothing; passing ``x`` itself reads it once.
        scale: a number or a 0-d tensor.
        activation: ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
        adapter_ids: integers, one for each entry of the leading dim of ``x`` (a sequence) or of all its leading dims (a
            token). A row of adapter -1 gets ``residual``, or zero. Other ids outside the bank raise on the CPU; on a GPU,
            where reading them would stall the stream, their rows become NaN.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the first of triton, native, reference on CUDA
            and of native, reference elsewhere that supports the call (see :func:`fastadapt.explain`).

    Returns:
        ``(..., d)``, contiguous, dtype of ``x``.

    Rounding: with a 16-bit ``x`` the output and the gradients are rounded once, at their end; all between is float32
    (float64 for float64), so that factors and products far below what float16 holds don't vanish. The rows of ``y`` don't
    depend on each other.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        RuntimeError: the backend asked for is missing or doesn't support the call, or the result is differentiated twice.
    """
    if not isinstance(x, Tensor):
        check.tensor("x", x)
    if isinstance(scale, (int, float)) and torch.compiler.is_compiling():
        # A tensor, since a number would be compiled in: one graph a value.
        scale = scale * torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    args = _arguments(x, down, up, down_bias, up_bias, residual, scale, activation, adapter_ids)
    name = _fwd.choose(backend, "cpu" if x.is_cpu else x.device.type, args)
    if name != "native" or torch.compiler.is_compiling():
        _check(*args)
    if name == "reference":
        return compacter_reference(
            x, down, up, down_bias=down_bias, up_bias=up_bias, residual=residual, scale=scale, activation=activation,
            adapter_ids=adapter_ids,
        )  # fmt: skip
    try:
        if needs_grad(*args[:10], args[11]):
            x, *factors, add_x, scale, scale_value, code, adapter_ids = args
            return record(Compacter, (name, add_x, scale_value, code), x, *factors, scale, adapter_ids)
        return getattr(_fwd, name)(*args)
    except Exception:
        # The kernel has refused the call. Checking only now keeps small calls fast; if an argument is to blame, say which.
        try:
            _check(*args)
        except (TypeError, ValueError) as error:
            raise error from None
        raise


compacter.leaf, compacter.arguments = _fwd, _arguments
