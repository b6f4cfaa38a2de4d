"""The rounding model: float64 mathematics, rounded only where the docstring of an op says that its kernels round.

The spec of an op writes the mathematics down once more (``OpSpec.rounded``) and passes through ``points.value(t)`` what is
rounded on the way forward, through ``points.gradient(t)`` what is rounded of the gradient that comes back to ``t``. Rounded to
nearest it predicts a kernel's bits; with random roundings it samples the error that no kernel can avoid.
"""

import torch

import fastadapt


class _Through(torch.autograd.Function):
    """``forward`` of the value, ``backward`` of the gradient; neither is differentiated."""

    @staticmethod
    def forward(ctx, t, forward, backward):
        ctx.change = backward
        return t.clone() if forward is None else forward(t)

    @staticmethod
    def backward(ctx, grad):
        return grad if ctx.change is None else ctx.change(grad), None, None


class _Also(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, back):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


def units(t, dtype):
    """The distance of neighbouring numbers of ``dtype`` at the magnitude of float64 ``t``."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(t).exponent - 1
    return torch.ldexp(torch.full_like(t, info.eps), exponent).clamp(min=info.tiny * info.eps)


def nearest(t, dtype):
    return t.to(dtype).double()


def randomly(t, dtype):
    """An error like that of rounding, of a value that nobody has rounded; zero stays zero."""
    return torch.where(t == 0, t, t + units(t, dtype) * (torch.rand_like(t) - 0.5))


class Points:
    """The roundings of one call: ``round(t, dtype)`` at every documented point."""

    def __init__(self, dtype, round):
        self.change = lambda t: round(t, dtype)

    def value(self, t):
        return _Through.apply(t, self.change, None)

    def gradient(self, t):
        return _Through.apply(t, None, self.change)

    @staticmethod
    def also(y, back):
        """``y``, whose gradient goes to ``back`` as well: for a gradient that is a product of its own."""
        return _Also.apply(y, back)


def unit(backend, x):
    """What multiplies in this backend where ``x`` is, which decides on the points: "matrix" units round their operands, as
    those of "amx" do in a way of their own; "vector" units keep float32."""
    if backend != "native" or not x.is_cpu:
        return "matrix"
    return "amx" if x.dtype == torch.bfloat16 and fastadapt._C.cpu_target() == "amx" else "vector"


# A float32 sum rounds at every step. However a kernel orders it, the error of a sum of some hundred terms is like that of
# arguments which are off by up to two units in the last place of float32.
ARGUMENT_ERROR = 4 * torch.finfo(torch.float32).eps


def inexact(t):
    return t * (1 + ARGUMENT_ERROR * (torch.rand_like(t) - 0.5))
