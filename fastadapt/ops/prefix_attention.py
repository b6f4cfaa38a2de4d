"""prefix_attention: y = softmax(scale * q [prefix_k; k].T) [prefix_v; v], the prefix shared by the batch and never copied."""

import math

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .. import _check as check
from .._leaf import Leaf, differentiable_once, needs_grad, record
from . import dropout
from .lora_linear import autocast, autocasts


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dim; a row without any finite or larger score has no weights at all."""
    dead = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)


def prefix_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, is_causal: bool = False,
    key_lengths: Tensor | None = None, attn_mask: Tensor | None = None, scale: float | None = None, gate: Tensor | None = None,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None, adapter_ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The specification of :func:`prefix_attention` in plain PyTorch, computed in the dtype of ``q``."""
    (b, h, t, e), t_k, p, device = q.shape, k.shape[2], prefix_k.shape[-2], q.device
    scale = e**-0.5 if scale is None else scale
    prefix_k, prefix_v = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
    if adapter_ids is not None:
        prefix_k, prefix_v = (t.index_select(0, adapter_ids.clamp(min=0).long()) for t in (prefix_k, prefix_v))
    of_query = lambda t: t.repeat_interleave(h // t.shape[-3], -3)  # noqa: E731
    scores = scale * (q @ of_query(k).transpose(-1, -2))
    prefix_scores = scale * (q @ of_query(prefix_k).transpose(-1, -2))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask.to(q.dtype)
    keys = torch.arange(t_k, device=device)
    if is_causal:
        scores = scores.masked_fill(keys > torch.arange(t, device=device)[:, None] + t_k - t, -math.inf)
    if key_lengths is not None:
        scores = scores.masked_fill(keys >= key_lengths[:, None, None, None], -math.inf)
    if adapter_ids is not None:
        prefix_scores = prefix_scores.masked_fill((adapter_ids < 0)[:, None, None, None], -math.inf)
    if gate is None:
        weights, prefix_weights = _softmax(torch.cat([prefix_scores, scores], -1)).split([p, t_k], -1)[::-1]
    else:
        weights, prefix_weights = _softmax(scores), _softmax(prefix_scores)
    if dropout_p:
        first = own_column(p)
        stays = dropout.kept(dropout_seed, b * h * t, first + t_k, dropout_p).view(b, h, t, first + t_k)
        stays = stays.to(q.dtype) * dropout.kept_scale(dropout_p)
        weights, prefix_weights = weights * stays[..., first:], prefix_weights * stays[..., :p]
    prefix = prefix_weights @ of_query(prefix_v)
    return weights @ of_query(v) + (prefix if gate is None else gate.to(q.dtype)[:, None, None] * prefix)


def own_column(p: int) -> int:
    """The column of the dropout matrix that belongs to the first own key: draws are made eight columns at a time."""
    return (p + 7) // 8 * 8


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? gate, bool is_causal, Tensor? key_lengths, "
    "Tensor? attn_mask, float scale, float dropout_p, Tensor? seed, Tensor? adapter_ids"
)


def _by_token(like: Tensor, shape: torch.Size) -> Tensor:
    """``(b, h, t, e)`` laid out as ``(b, t, h, e)``, so that to merge the heads is a view."""
    b, h, t, e = shape
    return like.new_empty(b, t, h, e).transpose(1, 2)


def _fwd_fake(q, *args):
    gate, keep_lse = args[4], args[-1]
    shape = (1 if gate is None else 2, *q.shape[:3]) if keep_lse else 0
    return _by_token(q, q.shape), q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def _bwd_fake(
    grad_y, y, lse, q, k, v, prefix_k, prefix_v, gate, is_causal, key_lengths, attn_mask, scale, dropout_p, seed, adapter_ids,
    output_mask,
):  # fmt: skip
    grads = [_by_token(t, t.shape) if wanted else t.new_empty(0) for t, wanted in zip((q, k, v), output_mask)]
    parameters = zip((prefix_k, prefix_v, gate), output_mask[3:])
    return *grads, *(t.new_empty(t.shape) if wanted else q.new_empty(0) for t, wanted in parameters)


_MAX_WIDTH = 256  # on a GPU, of a head: its tiles must fit the registers


def _unsupported(backend, args):
    q, attn_mask = args[0], args[8]
    if isinstance(attn_mask, Tensor) and attn_mask.requires_grad and torch.is_grad_enabled():
        return "does not differentiate attn_mask"
    if backend == "native" and q.is_cpu:
        return None
    if q.dtype == torch.float64:
        return "does not support float64"
    e = q.shape[-1] if q.dim() else 0
    return f"supports head widths e up to {_MAX_WIDTH} that 8 divides, got {e}" if e % 8 or e > _MAX_WIDTH else None


# ``lse`` is the logarithm of the sum of the exponentials of a query's scores, in float32 (float64 for float64) and by base e:
# ``(1, b, h, t)``, with ``gate`` ``(2, b, h, t)``, of the own keys first and then of the prefix; -inf where no key is seen. It
# is what backward needs beside the arguments and ``y``; without ``keep_lse`` its shape is (0,). ``attn_mask`` is expanded to
# ``(b, h, t, t_k)``. With dropout, the weight of row ``(i * h + j) * t + l`` and column ``c`` of a matrix of ``b * h * t`` rows
# stays or not as ``dropout.kept`` says: ``c`` is the index of a prefix key, or ``own_column(p)`` plus that of an own key. The
# output and the gradients of ``q``, ``k`` and ``v`` are laid out as ``(b, t, h, e)``. The gradients of ``_bwd`` come in the
# order of the inputs that ``output_mask`` lists; those not wanted have shape (0,).
_fwd = Leaf("prefix_attention_fwd", f"({_ARGUMENTS}, bool keep_lse) -> (Tensor y, Tensor lse)", _fwd_fake, _unsupported)
_bwd = Leaf(
    "prefix_attention_bwd",
    f"(Tensor grad_y, Tensor y, Tensor lse, {_ARGUMENTS}, bool[6] output_mask) -> (Tensor grad_q, Tensor grad_k, "
    "Tensor grad_v, Tensor grad_prefix_k, Tensor grad_prefix_v, Tensor grad_gate)",
    _bwd_fake,
)
_fwd.launch("prefix_attention")
_bwd.launch("prefix_attention")


class PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, constants, q, k, v, prefix_k, prefix_v, gate, key_lengths, attn_mask, seed, adapter_ids):
        ctx.constants = backend, is_causal, scale, dropout_p = constants
        args = (
            q, k, v, prefix_k, prefix_v, gate, is_causal, key_lengths, attn_mask, scale, dropout_p, seed, adapter_ids
        )  # fmt: skip
        y, lse = getattr(_fwd, backend)(*args, True)
        ctx.save_for_backward(y, lse, q, k, v, prefix_k, prefix_v, gate, key_lengths, attn_mask, seed, adapter_ids)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_y):
        *tensors, key_lengths, attn_mask, seed, adapter_ids = saved
        backend, is_causal, scale, dropout_p = ctx.constants
        mask = list(ctx.needs_input_grad[1:7])
        grads = [None] * 6
        if any(mask):
            outputs = getattr(_bwd, backend)(
                grad_y, *tensors, is_causal, key_lengths, attn_mask, scale, dropout_p, seed, adapter_ids, mask
            )
            grads = [grad if wanted else None for grad, wanted in zip(outputs, mask)]
        return None, *grads, None, None, None, None


def _arguments(
    q, k, v, prefix_k, prefix_v, is_causal, key_lengths, attn_mask, scale, gate, dropout_p, dropout_seed, adapter_ids
):  # fmt: skip
    """The arguments of the forward leaf: a mask of every query and key, a number for the scale, a seed if it is used."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    seed = dropout_seed if dropout_p else None
    return q, k, v, prefix_k, prefix_v, gate, is_causal, key_lengths, attn_mask, scale, dropout_p, seed, adapter_ids


def _check_prefix(q, k, prefix_k, prefix_v, adapter_ids):
    (b, _, _, e), h_kv = q.shape, k.shape[1]
    for name, prefix in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        check.tensor(name, prefix)
        banked, several = adapter_ids is not None, prefix.dim() == 4
        if banked and not several:
            raise ValueError(f"{name} must be a bank (g, h_kv, p, e) when adapter_ids is given, got {tuple(prefix.shape)}")
        if prefix.dim() not in (3, 4):
            raise ValueError(f"{name} must be (h_kv, p, e) or (b, h_kv, p, e), got {tuple(prefix.shape)}")
        count = () if not several else prefix_k.shape[:1] if banked else (b,)
        shape = (*count, h_kv, prefix_k.shape[-2], e)
        meaning = f"({'' if not several else 'g, ' if banked else 'b, '}h_kv, p, e)"
        if several and not banked and prefix.shape[0] != b:
            raise ValueError(
                f"{name} must be {meaning} = {shape}, got {tuple(prefix.shape)}; a bank (g, h_kv, p, e) needs adapter_ids"
            )
        check.parameter(name, prefix, q, shape, meaning, "q")
    if prefix_v.dtype != prefix_k.dtype:
        raise TypeError(f"prefix_v must be {prefix_k.dtype} like prefix_k, got {prefix_v.dtype}")


def _check_integers(name, value, q, shape, low, high, meaning, values):
    check.tensor(name, value)
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be (b,) = {shape}, got {tuple(value.shape)}")
    check.same_device(name, value, q, "q")
    readable = values and value.device.type == "cpu" and not torch.compiler.is_compiling() and value.numel()
    if readable and not isinstance(value, FakeTensor) and not torch._C._functorch.is_batchedtensor(value):
        least, most = int(value.min()), int(value.max())
        if least < low or most > high:
            raise ValueError(f"{name} must lie in [{low}, {high}] {meaning}, got {least if least < low else most}")


def _check(
    q, k, v, prefix_k, prefix_v, is_causal, key_lengths, attn_mask, scale, gate, dropout_p, dropout_seed, adapter_ids, values
):  # fmt: skip
    """``values`` says to read integers on a CPU, which the kernel there does itself."""
    check.activation_dtype("q", q)
    if q.dim() != 4:
        raise ValueError(f"q must be (b, h, t, e), got {tuple(q.shape)}")
    b, h, t, e = q.shape
    for name, value in (("k", k), ("v", v)):
        check.tensor(name, value)
        if value.dim() != 4 or value.shape[0] != b or value.shape[3] != e:
            raise ValueError(f"{name} must be (b, h_kv, t_k, e) = ({b}, h_kv, t_k, {e}) to match q, got {tuple(value.shape)}")
        if value.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype} like q, got {value.dtype}")
        check.same_device(name, value, q, "q")
    if v.shape != k.shape:
        raise ValueError(f"v must be {tuple(k.shape)} like k, got {tuple(v.shape)}")
    h_kv, t_k = k.shape[1], k.shape[2]
    if h != h_kv and (h_kv == 0 or h % h_kv):
        raise ValueError(f"k must have a number of heads that divides the {h} of q, got {h_kv}")
    if e == 0:
        raise ValueError(f"q must be (b, h, t, e) with e above zero, got {tuple(q.shape)}")
    _check_prefix(q, k, prefix_k, prefix_v, adapter_ids)
    check.parameter("gate", gate, q, (h,), "(h,)", "q")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, got {type(is_causal).__name__}")
    if attn_mask is not None:
        check.tensor("attn_mask", attn_mask)
        if attn_mask.dtype not in (torch.bool, torch.float32, q.dtype):
            raise TypeError(f"attn_mask must be torch.bool, {q.dtype} like q or torch.float32, got {attn_mask.dtype}")
        sizes = zip(reversed(attn_mask.shape), (t_k, t, h, b))
        if attn_mask.dim() > 4 or any(size not in (1, full) for size, full in sizes):
            raise ValueError(f"attn_mask must broadcast to (b, h, t, t_k) = {(b, h, t, t_k)}, got {tuple(attn_mask.shape)}")
        check.same_device("attn_mask", attn_mask, q, "q")
    if key_lengths is not None:
        _check_integers("key_lengths", key_lengths, q, (b,), 0, t_k, f"for t_k = {t_k}", values)
    if adapter_ids is not None:
        g = prefix_k.shape[0]
        _check_integers("adapter_ids", adapter_ids, q, (b,), -1, g - 1, f"for a bank of {g}", values)
    if not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat, type(None))):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    dropout.check(dropout_p, dropout_seed, q, "q")


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, is_causal: bool = False,
    key_lengths: Tensor | None = None, attn_mask: Tensor | None = None, scale: float | None = None, gate: Tensor | None = None,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None, adapter_ids: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Attention with a learned prefix: ``y = softmax(scale * q @ [prefix_k; k].T) @ [prefix_v; v]``.

    Every query sees every key of the prefix; masks, causality and lengths are about the own keys ``k``. Nothing is
    concatenated, expanded over the batch or repeated over heads. With ``gate`` the prefix has a softmax of its own:
    ``y = softmax(scale * q @ k.T) @ v + gate * softmax(scale * q @ prefix_k.T) @ prefix_v``. Backward saves ``q``, ``k``,
    ``v``, ``y`` and one float32 number a query (with ``gate`` two), no weights. Frozen arguments cost no gradient. Under
    autocast ``q``, ``k`` and ``v`` are cast, as for PyTorch's attention, and what else has 16 bits. A query that
    sees no key at all has the output 0. Sources: Li and Liang 2021 (prefix tuning), Zhang et al. 2023 (LLaMA-Adapter:
    ``gate``), Dao 2023 (FlashAttention-2).

    Args:
        q: ``(b, h, t, e)``, any strides; float16, bfloat16, float32, or float64 on the CPU. On a GPU 8 divides ``e``, at most
            256. Rotary positions are applied by the caller, to ``q`` and ``k`` and not to the prefix.
        k, v: ``(b, h_kv, t_k, e)``, dtype of ``q``; ``h_kv`` divides ``h``, and query head ``i`` uses head
            ``i // (h / h_kv)`` of them and of the prefix.
        prefix_k, prefix_v: ``(h_kv, p, e)`` for the whole batch, ``(b, h_kv, p, e)`` with one for each sequence, or a bank
            ``(g, h_kv, p, e)`` with ``adapter_ids``. Dtype of ``q``, or float32 under a 16-bit ``q``. ``p`` may be 0.
        is_causal: query ``i`` sees own key ``j`` if ``j <= i + t_k - t``: the last query sees the last key, also where
            ``k`` comes from a cache that is longer than ``q``.
        key_lengths: ``(b,)`` integers in ``[0, t_k]``: the own keys of a sequence from there on are padding. Others raise on
            the CPU; on a GPU, where reading them would stall the stream, they count as 0 or ``t_k``.
        attn_mask: of any shape that broadcasts to ``(b, h, t, t_k)``; bool, True where an own key is seen, or floating (float32
            or the dtype of ``q``), added to the scaled scores. A mask that needs a gradient is left to the reference.
        scale: number that multiplies the scores; None for ``1 / sqrt(e)``. A constant of a model: ``torch.compile`` compiles
            each value in.
        gate: ``(h,)``, dtype of ``q`` or float32; LLaMA-Adapter's, after its tanh.
        dropout_p: probability in [0, 1) that a weight, of prefix or own key, is dropped, in steps of 1 / 65536; the others grow
            by the inverse of the probability to stay.
        dropout_seed: 0-d int64 tensor that fixes the dropped weights; None draws one from torch's generator.
        adapter_ids: ``(b,)`` integers, the prefix of each sequence in the bank; -1 for none. Others raise on the CPU; on a
            GPU the outputs of their sequences become NaN.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the first of triton, native, reference on CUDA
            and of native, reference elsewhere that supports the call (see :func:`fastadapt.explain`).

    Returns:
        ``(b, h, t, e)``, dtype of ``q``, laid out as ``(b, t, h, e)``: ``y.transpose(1, 2).flatten(2)`` copies nothing.

    Rounding, with a 16-bit ``q``: the output and the gradients once, at their end, and a float32 prefix to the dtype of ``q``
    before its use; scores and sums are float32 (float64 for float64), and backward uses the rounded output and makes the
    weights anew, from the logarithm of a query's sum of exponentials in float32: of a query all of whose scores lie so far
    from 0 that it is rounded by more than 1, as where ``finfo.min`` is added to all of them, these are only known to be at
    most 1. Matrix units (every GPU backend, and those of a CPU in bfloat16) also round the weights, before they are divided by
    their sum, and in backward the weights and the gradients of the scores. Sequences don't depend on each other.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        RuntimeError: the backend asked for is missing or doesn't support the call, or the result is differentiated twice.
    """
    if isinstance(q, Tensor) and autocasts(q):
        q, k, v, prefix_k, prefix_v, attn_mask, gate = autocast(q, (q, k, v), (prefix_k, prefix_v, attn_mask, gate))
    given = (
        q, k, v, prefix_k, prefix_v, is_causal, key_lengths, attn_mask, scale, gate, dropout_p, dropout_seed, adapter_ids
    )  # fmt: skip
    _check(*given, values=backend not in (None, "native"))
    if dropout_p and dropout_seed is None:
        given = *given[:11], dropout.draw_seed(q.device), adapter_ids
    args = _arguments(*given)
    name = _fwd.choose(backend, "cpu" if q.is_cpu else q.device.type, args)
    if name == "reference":
        _check(*given, values=True)
        return prefix_attention_reference(
            q, k, v, prefix_k, prefix_v, is_causal=is_causal, key_lengths=key_lengths, attn_mask=attn_mask, scale=scale,
            gate=gate, dropout_p=dropout_p, dropout_seed=given[11], adapter_ids=adapter_ids,
        )  # fmt: skip
    *tensors, is_causal, key_lengths, attn_mask, scale, dropout_p, seed, adapter_ids = args
    constants = name, is_causal, scale, dropout_p
    try:
        if needs_grad(*args[:6]):
            return record(PrefixAttention, constants, *tensors, key_lengths, attn_mask, seed, adapter_ids)
        return getattr(_fwd, name)(*args, False)[0]
    except Exception:
        _check(*given, values=True)  # the kernel has refused the call; if lengths or ids are to blame, say which
        raise


prefix_attention.leaf, prefix_attention.arguments = _fwd, _arguments
