"""LoRA beside frozen layers: y = gain * (x @ W.T + scale * (dropout(x) @ A.T) @ B.T) + bias."""

import math
import sys
import warnings
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dense import dense, is_packed
from .._leaf import BACKENDS
from ..ops.lora_linear import lora_linear, row_norms, without_autocast
from ..ops.lora_merge import lora_merge
from .bottleneck import check_size


def check_options(r, alpha, dropout, backend, **flags) -> None:
    """Refuse what no LoRA can be built from."""
    check_size("r", r)
    if not isinstance(alpha, Real) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}")
    if not isinstance(dropout, Real) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {(None, *BACKENDS)}, got {backend!r}")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def adapter_dtype(weight, dtype: torch.dtype | None) -> torch.dtype:
    """``dtype``, or if that is None the one of a frozen ``weight``, but float32 where that is packed or has 16 bits."""
    if dtype is not None:
        return dtype
    return weight.dtype if not is_packed(weight) and weight.dtype in (torch.float32, torch.float64) else torch.float32


def pair(k: int, n: int, r: int, weight, *, bias: bool = False, dtype=None) -> tuple[nn.Linear, nn.Linear]:
    """The two projections beside a frozen ``weight``, with the dtype of ``adapter_dtype``."""
    factory = {"device": weight.device, "dtype": adapter_dtype(weight, dtype)}
    return nn.Linear(k, r, bias=False, **factory), nn.Linear(r, n, bias=bias, **factory)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether this is the linear layer of ``transformers`` that keeps its weight transposed."""
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and isinstance(layer, module.Conv1D)


def is_falcons(layer: nn.Module) -> bool:
    """Whether this is the linear layer of Falcon in ``transformers``: that of PyTorch, but that it rounds before the bias."""
    module = sys.modules.get("transformers.models.falcon.modeling_falcon")
    return module is not None and type(layer) is module.FalconLinear


def linear_sizes(base: nn.Module) -> tuple[bool, int, int]:
    """Whether a frozen linear layer keeps its weight as (k, n), and k and n. Refuses other layers, and hooks."""
    check_no_hooks(base)
    if is_conv1d(base):
        return True, base.nx, base.nf
    if not isinstance(base, nn.Linear):
        raise TypeError(f"base must be a torch.nn.Linear or a Conv1D of transformers, got {type(base).__name__}")
    if type(base).forward is not nn.Linear.forward and not is_packed(base.weight) and not is_falcons(base):
        raise TypeError(f"base must be linear as torch.nn.Linear is, got {type(base).__name__} with a forward of its own")
    return False, base.in_features, base.out_features


def _nothing(module: nn.Module, args: tuple) -> None:
    """A hook for :func:`leave_fast_path`; copies and pickles of a model keep it."""


def leave_fast_path(inside: nn.Module) -> None:
    """Let PyTorch's encoder layers run what ``inside`` belongs to in evaluation too, by a hook on this module, which nothing
    calls. Without one in it a layer leaves its submodules for a function of the weights that these show."""
    if _nothing not in inside._forward_pre_hooks.values():
        inside.register_forward_pre_hook(_nothing)


def check_no_hooks(base: nn.Module) -> None:
    """Refuse a layer with hooks, such as that of an adapter after it, or a ``forward`` of its own, but for the one with which
    the library accelerate moves inputs to its device: what stands in its place doesn't call it."""
    if not isinstance(base, nn.Module):
        raise TypeError(f"base must be a module, got {type(base).__name__}")
    own = None if "_hf_hook" in vars(base) else vars(base).get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(base).forward:
        raise ValueError(f"base must have the forward of its class, got a {type(base).__name__} with one that would be lost")
    hooks = (base._forward_pre_hooks, base._forward_hooks, base._backward_pre_hooks, base._backward_hooks)
    if any(hook is not _nothing for kind in hooks for hook in kind.values()):
        raise ValueError(f"base must have no hooks, which would not run any more, got a {type(base).__name__} with hooks")


class Beside:
    """What stands in the place of a frozen ``base`` shows its weight and bias: models look at their dtypes and tie them."""

    _tied_weights_keys = {"base.weight": None}  # as in PHMLinear

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def register_parameter(self, name: str, parameter: nn.Parameter | None) -> None:
        """Called by ``setattr`` too: a weight that a model ties is that of ``base``."""
        if name not in ("weight", "bias"):
            super().register_parameter(name, parameter)
        elif getattr(self, "merged", False):
            raise RuntimeError(f"{name}: unmerge the adapter first, or unmerge() would take the new {name} away")
        else:
            setattr(self.base, name, parameter)


class Merging(Beside, nn.Module):
    """A frozen layer ``base`` that an adapter can be merged into: ``_merged()`` is weight, as (n, k), and bias with it."""

    def __init__(self, base: nn.Module, transposed: bool, backend: str | None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.backend = backend
        self._transposed = transposed  # base keeps its weight as (k, n)
        self._kept = None  # what base held before the merge: a tuple, or these would become parameters of this module

    def _weight(self) -> Tensor:
        return self.base.weight.T if self._transposed else self.base.weight

    @property
    def merged(self) -> bool:
        """Whether ``base`` holds the merged weight."""
        return self._kept is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Put a new weight into ``base`` that contains the adapter, so that ``forward`` costs what the frozen layer does.

        The old one is kept for :meth:`unmerge`; meanwhile ``state_dict()`` holds the new one. A quantised weight becomes dense.
        """
        if self.merged:
            raise RuntimeError("merge: the adapter is merged already")
        if "weight" not in self.base._parameters:
            raise RuntimeError("merge: base must have its weight as a parameter, not computed from others by a parametrization")
        weight, bias = self._merged()
        if self.training and weight.dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"merge: training on a merged {weight.dtype} weight loses every update below half a unit in its last place; "
                "unmerge() before training goes on",
                stacklevel=2,
            )
        kept = self.base.weight, getattr(self.base, "bias", None)
        if bias is not kept[1]:
            self.base.bias = nn.Parameter(bias, requires_grad=False)
        self.base.weight = nn.Parameter(weight.T if self._transposed else weight, requires_grad=False)
        self._kept = kept

    def unmerge(self) -> None:
        """Give ``base`` back the very parameters that it had before :meth:`merge`, to the bit."""
        if not self.merged:
            raise RuntimeError("unmerge: the adapter is not merged")
        base, merged = self.base, self.base.weight
        base.weight, bias = self._kept
        if hasattr(base, "bias"):
            base.bias = bias
        self._kept = None
        # The module may have moved in the meantime.
        if base.weight.device != merged.device:
            base.to(merged.device)
        if base.weight.is_floating_point():
            base.to(merged.dtype)


class _Pair(Merging):
    """A frozen layer and the pair ``lora_A``, ``lora_B``."""

    def __init__(self, base: nn.Module, transposed: bool, alpha: float, r: int, rslora: bool, backend: str | None):
        super().__init__(base, transposed, backend)
        self.r, self.alpha, self.rslora = r, alpha, rslora
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        self.magnitude = None

    def _norms(self) -> Tensor:
        return row_norms(dense(self._weight()), self.lora_A.weight, self.lora_B.weight, self.scale)

    def _merged(self) -> tuple[Tensor, Tensor | None]:
        pair_and_scale = {"lora_a": self.lora_A.weight, "lora_b": self.lora_B.weight, "scale": self.scale}
        weight = lora_merge(self._weight(), **pair_and_scale, magnitude=self.magnitude)
        bias = getattr(self.base, "bias", None)
        if self.lora_B.bias is not None:
            added = self.scale * self.lora_B.bias.to(torch.promote_types(weight.dtype, torch.float32))
            if self.magnitude is not None:
                added = added * self.magnitude / self._norms()
            bias = (added if bias is None else bias + added).to(weight.dtype)
        return weight, bias

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, rslora={self.rslora}, merged={self.merged}"


class LoRALinear(_Pair):
    """A frozen linear layer with LoRA, run by :func:`fastadapt.lora_linear`.

    ``y = gain * (x @ W.T + scale * (dropout(x) @ lora_A.weight.T @ lora_B.weight.T + lora_B.bias)) + bias`` with the weight
    and the bias of ``base``, ``scale = alpha / r`` and ``gain = 1``. A new layer computes what ``base`` does: ``lora_A`` starts
    as in ``nn.Linear``, ``lora_B`` at zero. ``lora_A``, ``lora_B`` and ``base`` hold the parameters under their usual names;
    their own ``forward`` is not called. Sources: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA).

    With DoRA ``gain = magnitude / ||W + scale * B @ A||``, of each row; the norm is not differentiated. Dropout acts on the
    LoRA branch alone, so that the frozen product stays one product. ``peft`` drops the input of both in DoRA with dropout,
    which is another regularisation; without dropout the two are equal.

    ``state_dict`` has the keys ``base.weight``, ``base.bias``, ``lora_A.weight`` ``(r, k)``, ``lora_B.weight`` ``(n, r)`` and,
    by option, ``lora_B.bias`` ``(n,)`` and ``magnitude`` ``(n,)``. After :meth:`merge` those of ``base`` hold merged values.

    An ``nn.TransformerEncoderLayer`` with one in it doesn't take its fast path of evaluation; where padding is masked, build
    ``nn.TransformerEncoder`` with ``enable_nested_tensor=False``, as :func:`attach` sees to.

    Args:
        base: ``nn.Linear``, the ``Conv1D`` of ``transformers``, or a linear layer with a quantised weight as in
            :func:`fastadapt.lora_linear`; without hooks and a ``forward`` of its own, since it isn't called. It is frozen and
            kept, not copied.
        r: rank.
        alpha: scale times ``r``.
        dropout: probability that an element of the input of ``lora_A`` is dropped in training.
        rslora: ``scale = alpha / sqrt(r)``.
        dora: learn ``magnitude``, which starts at the norms of the rows of ``W``; none of them may be zero.
        lora_bias: a bias in ``lora_B``.
        backend: as in :func:`fastadapt.lora_linear`; also an attribute.
        dtype: of the adapter; None takes that of ``base``, or float32 where it has 16 bits or is quantised.
    """

    def __init__(
        self, base: nn.Module, r: int = 8, *, alpha: float = 16, dropout: float = 0.0, rslora: bool = False,
        dora: bool = False, lora_bias: bool = False, backend: str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        check_options(r, alpha, dropout, backend, rslora=rslora, dora=dora, lora_bias=lora_bias)
        conv1d, k, n = linear_sizes(base)
        super().__init__(base, conv1d, alpha, r, rslora, backend)
        self.dropout = float(dropout)
        self.lora_A, self.lora_B = pair(k, n, r, base.weight, bias=lora_bias, dtype=dtype)
        leave_fast_path(self.lora_A)
        if dora:
            self.magnitude = nn.Parameter(torch.empty_like(self.lora_B.weight[:, 0]))
        self.reset_parameters()
        self.train(base.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, as what ``base`` alone computes."""
        if self.merged:
            raise RuntimeError("reset_parameters: unmerge the adapter first")
        self.lora_A.reset_parameters()
        self.lora_B.weight.zero_()
        if self.lora_B.bias is not None:
            self.lora_B.bias.zero_()
        if self.magnitude is not None:
            self.magnitude.copy_(self._norms())
            if not self.magnitude.is_meta and not self.magnitude.all():
                raise ValueError("base must have no row of zeros with dora=True, which divides by the norms of the rows")

    def forward(self, x: Tensor) -> Tensor:
        """``(..., k)`` to ``(..., n)``."""
        base, lora_A, lora_B = self.base, self.lora_A, self.lora_B
        if self.merged:
            return F.linear(x, self._weight(), base.bias)
        return lora_linear(
            x, self._weight(), base.bias, lora_A.weight, lora_B.weight, scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0, magnitude=self.magnitude, lora_bias=lora_B.bias,
            backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}, dora={self.magnitude is not None}"


class LoRAEmbedding(_Pair):
    """A frozen embedding with LoRA: ``y = E[ids] + scale * lora_A.weight.T[ids] @ lora_B.weight.T``, ``scale = alpha / r``.

    The product and the sum are one call of ``torch.addmm``. A new layer computes what ``base`` does: ``lora_A`` starts at zero
    and ``lora_B`` normal, so that the first step moves just those rows that are looked up (Hu et al. 2021). The row
    ``padding_idx`` of ``lora_A`` gets no gradient. Keys of ``state_dict``: ``base.weight``, ``lora_A.weight``
    ``(r, num_embeddings)`` and ``lora_B.weight`` ``(embedding_dim, r)``.

    Args:
        base: ``nn.Embedding`` without ``max_norm``, which would change the frozen weight. It is frozen and kept, not copied.
        r, alpha, rslora, dtype: as in :class:`LoRALinear`.
    """

    def __init__(
        self, base: nn.Embedding, r: int = 8, *, alpha: float = 16, rslora: bool = False, dtype: torch.dtype | None = None
    ):
        check_options(r, alpha, 0.0, None, rslora=rslora)
        if not isinstance(base, nn.Embedding) or type(base).forward is not nn.Embedding.forward:
            raise TypeError(f"base must be a torch.nn.Embedding with the forward of that, got {type(base).__name__}")
        if base.max_norm is not None:
            raise ValueError(f"base must have max_norm=None, got {base.max_norm}")
        super().__init__(base, True, alpha, r, rslora, None)
        self.lora_A, self.lora_B = pair(base.num_embeddings, base.embedding_dim, r, base.weight, dtype=dtype)
        self.reset_parameters()
        self.train(base.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, as what ``base`` alone computes."""
        if self.merged:
            raise RuntimeError("reset_parameters: unmerge the adapter first")
        self.lora_A.weight.zero_()
        self.lora_B.weight.normal_()

    def forward(self, ids: Tensor) -> Tensor:
        """Integers ``(...)`` to ``(..., embedding_dim)``, in the dtype of ``base``, under autocast too."""
        y = self.base(ids)
        if self.merged:
            return y
        rows = F.embedding(ids, self.lora_A.weight.T, self.base.padding_idx).to(y.dtype)
        with without_autocast(y):
            b = self.lora_B.weight.to(y.dtype)
            return torch.addmm(y.view(-1, y.shape[-1]), rows.view(-1, self.r), b.T, alpha=self.scale).view(y.shape)
