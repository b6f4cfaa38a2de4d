"""bottleneck: y = residual + scale * (act(norm(x) @ Wd.T + bd) @ Wu.T + bu)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check as check
from .._leaf import Leaf, differentiable_once, needs_grad, record

# The position is the code that the kernels receive.
ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}
_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def bottleneck_reference(
    x: Tensor, down_weight: Tensor, up_weight: Tensor, *, down_bias: Tensor | None = None, up_bias: Tensor | None = None,
    residual: Tensor | None = None, scale: float | Tensor = 1.0, activation: str = "relu",
    norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, norm_eps: float = 1e-5,
    skip_weight: Tensor | None = None, hidden_skip_weight: Tensor | None = None, adapter_ids: Tensor | None = None,
) -> Tensor:
    """The specification of :func:`bottleneck` in plain PyTorch, computed in the dtype of ``x``."""
    cast = lambda t: None if t is None else t.to(x.dtype)  # noqa: E731
    scale = cast(scale) if isinstance(scale, Tensor) else scale

    def adapter(x, down_weight, up_weight, down_bias, up_bias):
        n = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], cast(norm_weight), cast(norm_bias), norm_eps)
        z = F.linear(n, cast(down_weight), cast(down_bias))
        hidden = ACTIVATIONS[activation](z)
        if hidden_skip_weight is not None:
            hidden = hidden + cast(hidden_skip_weight) * z
        y = scale * F.linear(hidden, cast(up_weight), cast(up_bias))
        return y if skip_weight is None else y + cast(skip_weight) * x

    if adapter_ids is None:
        y = adapter(x, down_weight, up_weight, down_bias, up_bias)
        return y if residual is None else residual + y
    ids = adapter_ids.reshape(adapter_ids.shape + (1,) * (x.dim() - 1 - adapter_ids.dim())).expand(x.shape[:-1]).reshape(-1)
    shape, x = x.shape, x.reshape(ids.shape[0], x.shape[-1])  # which may have no columns
    y = torch.zeros_like(x) if residual is None else residual.reshape(x.shape)
    for i in range(len(down_weight)):
        rows = (ids == i).nonzero(as_tuple=True)
        bank = (None if t is None else t[i] for t in (down_weight, up_weight, down_bias, up_bias))
        y = y.index_put(rows, y[rows] + adapter(x[rows], *bank))
    return y.reshape(shape)


_ARGUMENTS = (
    "Tensor x, Tensor down_weight, Tensor up_weight, Tensor? down_bias, Tensor? up_bias, {residual}bool add_x, "
    "Tensor? scale, float scale_value, int activation, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, "
    "Tensor? skip_weight, Tensor? hidden_skip_weight, Tensor? adapter_ids"
)


def _fwd_fake(x, *args):
    return x.new_empty(x.shape)


def _bwd_fake(
    grad_y, x, down_weight, up_weight, down_bias, up_bias, add_x, scale, scale_value, activation,
    norm_weight, norm_bias, norm_eps, skip_weight, hidden_skip_weight, adapter_ids, output_mask,
):  # fmt: skip
    inputs = (x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight, hidden_skip_weight)
    return tuple(t.new_empty(t.shape) if wanted else x.new_empty(0) for t, wanted in zip(inputs, output_mask))


_MAX_RANK = {"triton": 256, "native": 1024}  # on a GPU: the hidden tile must fit the registers, or the shared memory


def _unsupported(backend, args):
    x, down_weight = args[:2]
    if backend == "native" and x.is_cpu:
        return None
    if x.dtype == torch.float64:
        return "does not support float64"
    r = down_weight.shape[-2] if isinstance(down_weight, Tensor) and down_weight.dim() > 1 else 0
    return f"supports r up to {_MAX_RANK[backend]}, got {r}" if r > _MAX_RANK[backend] else None


# One call computes y.  ``add_x`` stands for a residual that is x itself, so that x is read once; ``scale_value`` is used
# where ``scale`` is None.  The gradients of ``_bwd`` come in the order of the inputs it lists in ``output_mask``; those not
# wanted have shape (0,).
_fwd = Leaf("bottleneck_fwd", f"({_ARGUMENTS.format(residual='Tensor? residual, ')}) -> Tensor", _fwd_fake, _unsupported)
_bwd = Leaf(
    "bottleneck_bwd",
    f"(Tensor grad_y, {_ARGUMENTS.format(residual='')}, bool[10] output_mask) -> (Tensor grad_x, Tensor grad_down_weight, "
    "Tensor grad_up_weight, Tensor grad_down_bias, Tensor grad_up_bias, Tensor grad_scale, Tensor grad_norm_weight, "
    "Tensor grad_norm_bias, Tensor grad_skip_weight, Tensor grad_hidden_skip_weight)",
    _bwd_fake,
)
_fwd.launch("bottleneck")
_bwd.launch("bottleneck")


class Bottleneck(torch.autograd.Function):
    @classmethod
    def of(cls, backend, x, down_weight, up_weight, down_bias, up_bias, residual, add_x, scale, scale_value, activation,
           norm_weight, norm_bias, norm_eps, skip_weight, hidden_skip_weight, adapter_ids):  # fmt: skip
        """``apply`` for the arguments of the forward leaf. An argument costs it time: what isn't a tensor goes as one."""
        return record(
            cls, (backend, add_x, scale_value, activation, norm_eps), x, down_weight, up_weight, down_bias, up_bias, residual,
            scale, norm_weight, norm_bias, skip_weight, hidden_skip_weight, adapter_ids,
        )  # fmt: skip

    @staticmethod
    def forward(
        ctx, constants, x, down_weight, up_weight, down_bias, up_bias, residual, scale, norm_weight, norm_bias, skip_weight,
        hidden_skip_weight, adapter_ids,
    ):  # fmt: skip
        ctx.save_for_backward(
            x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight, hidden_skip_weight,
            adapter_ids,
        )  # fmt: skip
        ctx.constants = backend, add_x, scale_value, activation, norm_eps = constants
        return getattr(_fwd, backend)(
            x, down_weight, up_weight, down_bias, up_bias, residual, add_x, scale, scale_value, activation,
            norm_weight, norm_bias, norm_eps, skip_weight, hidden_skip_weight, adapter_ids,
        )  # fmt: skip

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_y):
        (
            x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight, hidden_skip_weight,
            adapter_ids,
        ) = saved  # fmt: skip
        backend, add_x, scale_value, activation, norm_eps = ctx.constants
        needs = ctx.needs_input_grad
        mask = [needs[i] for i in (1, 2, 3, 4, 5, 7, 8, 9, 10, 11)]
        grads = [None] * 10
        if any(mask):
            outputs = getattr(_bwd, backend)(
                grad_y, x, down_weight, up_weight, down_bias, up_bias, add_x, scale, scale_value, activation,
                norm_weight, norm_bias, norm_eps, skip_weight, hidden_skip_weight, adapter_ids, mask,
            )  # fmt: skip
            grads = [grad if wanted else None for grad, wanted in zip(outputs, mask)]
        grad_residual = grad_y if needs[6] else None
        return (None, *grads[:5], grad_residual, *grads[5:], None)


def _arguments(
    x, down_weight, up_weight, down_bias, up_bias, residual, scale, activation, norm_weight, norm_bias, norm_eps,
    skip_weight, hidden_skip_weight, adapter_ids,
):  # fmt: skip
    """The arguments of the forward leaf: codes for names, one tensor or one number for the scale."""
    if not isinstance(activation, str) or activation not in _CODES:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    add_x = residual is x
    scale, scale_value = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    return (
        x, down_weight, up_weight, down_bias, up_bias, None if add_x else residual, add_x, scale, scale_value,
        _CODES[activation], norm_weight, norm_bias, norm_eps, skip_weight, hidden_skip_weight, adapter_ids,
    )  # fmt: skip


def _check(
    x, down_weight, up_weight, down_bias, up_bias, residual, add_x, scale, scale_value, activation,
    norm_weight, norm_bias, norm_eps, skip_weight, hidden_skip_weight, adapter_ids,
):  # fmt: skip
    check.activation_dtype("x", x)
    if x.dim() == 0:
        raise ValueError("x must be (..., d), got a 0-d tensor")
    check.tensor("down_weight", down_weight)
    if down_weight.dim() not in (2, 3):
        raise ValueError(f"down_weight must be (r, d), or (g, r, d) with adapter_ids, got {tuple(down_weight.shape)}")
    bank = tuple(down_weight.shape[:-2])
    if bank and adapter_ids is None:
        raise ValueError(f"adapter_ids is needed when down_weight is a bank, got None with {tuple(down_weight.shape)}")
    if adapter_ids is not None and not bank:
        raise ValueError(f"down_weight must be a bank (g, r, d) when adapter_ids is given, got {tuple(down_weight.shape)}")
    d, r, g = x.shape[-1], down_weight.shape[-2], "g, " if bank else ""
    check.parameter("down_weight", down_weight, x, (*bank, r, d), f"({g}r, d)")
    check.tensor("up_weight", up_weight)
    check.parameter("up_weight", up_weight, x, (*bank, d, r), f"({g}d, r)")
    if up_weight.dtype != down_weight.dtype:
        raise TypeError(f"up_weight must be {down_weight.dtype} like down_weight, got {up_weight.dtype}")
    check.parameter("down_bias", down_bias, x, (*bank, r), f"({g}r)")
    check.parameter("up_bias", up_bias, x, (*bank, d), f"({g}d)")
    check.residual(residual, x, x.shape)
    if scale is not None:
        check.parameter("scale", scale, x, (d,) if scale.dim() else (), "0-d or (d,)")
    elif not isinstance(scale_value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a number or a tensor, got {type(scale_value).__name__}")
    check.parameter("norm_weight", norm_weight, x, (d,), "(d,)")
    if norm_weight is None and norm_bias is not None:
        raise ValueError("norm_weight must be given with norm_bias, got None")
    check.parameter("norm_bias", norm_bias, x, (d,), "(d,)")
    if not isinstance(norm_eps, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"norm_eps must be a number, got {type(norm_eps).__name__}")
    check.parameter("skip_weight", skip_weight, x, (d,), "(d,)")
    check.parameter("hidden_skip_weight", hidden_skip_weight, x, (r,), "(r,)")
    if adapter_ids is not None:
        check.adapter_ids(adapter_ids, x, bank[0])


def bottleneck(
    x: Tensor, down_weight: Tensor, up_weight: Tensor, *, down_bias: Tensor | None = None, up_bias: Tensor | None = None,
    residual: Tensor | None = None, scale: float | Tensor = 1.0, activation: str = "relu",
    norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, norm_eps: float = 1e-5,
    skip_weight: Tensor | None = None, hidden_skip_weight: Tensor | None = None, adapter_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Adapter: ``y = residual + scale * (act(norm(x) @ down_weight.T + down_bias) @ up_weight.T + up_bias)``.

    The hidden activations never reach memory; the backward pass recomputes them. Frozen arguments cost no gradient.
    Under autocast the op keeps the dtype of ``x``, as a residual stream needs. Source: Houlsby et al. 2019.

    Args:
        x: ``(..., d)``, any strides; float16, bfloat16, float32, or float64 on the CPU.
        down_weight, up_weight: ``(r, d)`` and ``(d, r)``, or banks ``(g, r, d)`` and ``(g, d, r)`` with ``adapter_ids``.
            Like every parameter below: dtype of ``x``, or float32 under a 16-bit ``x``.
        down_bias, up_bias: ``(r,)`` and ``(d,)``, with a leading ``g`` in a bank, or None.
        residual: shape and dtype of ``x``, or None to add nothing; passing ``x`` itself reads it once.
        scale: a number, a 0-d tensor or a ``(d,)`` tensor.
        activation: ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
        norm_weight, norm_bias: ``(d,)``; LayerNorm of ``x`` over ``d`` with ``norm_eps`` before the down projection.
        skip_weight: ``(d,)``; adds ``skip_weight * x``.
        hidden_skip_weight: ``(r,)``; the activation becomes ``act(z) + hidden_skip_weight * z``.
        adapter_ids: integers, one for each entry of the leading dim of ``x`` (a sequence) or of all its leading dims (a
            token). A row of adapter -1 gets ``residual``, or zero. Other ids outside the bank raise on the CPU; on a GPU,
            where reading them would stall the stream, their rows become NaN.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the first of triton, native, reference on CUDA
            and of native, reference elsewhere that supports the call (see :func:`fastadapt.explain`).

    Returns:
        ``(..., d)``, contiguous, dtype of ``x``; products accumulate in float32 (float64 for float64).

    Rounding, with a 16-bit ``x``: the output and the gradients once, at their end. The vector units of a CPU round nothing
    else. Matrix units (every GPU backend; AMX with bfloat16) also round what they multiply to the dtype of ``x``: float32
    weights, the normalised rows, the hidden activations; in backward the gradient that comes out of the activation, and
    ``scale * grad_y`` if ``scale`` is ``(d,)``. AMX multiplies ``norm_weight``, and in backward ``scale``, into the weight
    before it rounds that. The rows of ``y`` don't depend on each other; on a CPU their last bits may differ between calls of
    up to 128 rows and larger ones.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        RuntimeError: the backend asked for is missing or doesn't support the call, or the result is differentiated twice.
    """
    if not isinstance(x, Tensor):
        check.tensor("x", x)
    if isinstance(scale, (int, float)) and torch.compiler.is_compiling():
        # A tensor, since a number would be compiled in: one graph a value.
        scale = scale * torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    args = _arguments(
        x, down_weight, up_weight, down_bias, up_bias, residual, scale, activation, norm_weight, norm_bias, norm_eps,
        skip_weight, hidden_skip_weight, adapter_ids,
    )  # fmt: skip
    name = _fwd.choose(backend, "cpu" if x.is_cpu else x.device.type, args)
    if name != "native" or torch.compiler.is_compiling():
        _check(*args)
    if name == "reference":
        return bottleneck_reference(
            x, down_weight, up_weight, down_bias=down_bias, up_bias=up_bias, residual=residual, scale=scale,
            activation=activation, norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps,
            skip_weight=skip_weight, hidden_skip_weight=hidden_skip_weight, adapter_ids=adapter_ids,
        )  # fmt: skip
    try:
        recorded = needs_grad(
            x, down_weight, up_weight, down_bias, up_bias, residual, args[7], norm_weight, norm_bias, skip_weight,
            hidden_skip_weight,
        )  # fmt: skip
        return Bottleneck.of(name, *args) if recorded else getattr(_fwd, name)(*args)
    except Exception:
        # The kernel has refused the call. Checking only now keeps small calls fast; if an argument is to blame, say which.
        try:
            _check(*args)
        except (TypeError, ValueError) as error:
            raise error from None
        raise


bottleneck.leaf, bottleneck.arguments = _fwd, _arguments
