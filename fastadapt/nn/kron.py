"""Linear layers whose matrix is a sum of Kronecker products: y = x @ sum_i kron(a[i], b[i]) + bias."""

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dense import dense
from .._leaf import BACKENDS
from ..ops.compacter import kron_sum, product
from ..ops.kron_linear import kron_linear
from ..ops.lora_linear import without_autocast
from .bottleneck import check_size
from .lora import Merging, adapter_dtype, leave_fast_path, linear_sizes

Rule = nn.Parameter | tuple[nn.Parameter, nn.Parameter]


@torch.no_grad()
def init_a(a: Tensor | tuple[Tensor, Tensor], std: float | None) -> None:
    """Normal with this deviation; None takes the one with which the layer starts like ``nn.Linear``. So is a product."""
    parts = (a,) if isinstance(a, Tensor) else tuple(a)
    terms, a_in, p = parts[0].shape
    std = (terms * a_in) ** -0.5 if std is None else std
    for part in parts:
        part.normal_(std=std if len(parts) == 1 else (std / math.sqrt(p)) ** 0.5)


@torch.no_grad()
def init_b(b: Tensor | tuple[Tensor, Tensor], glorot: bool = False) -> None:
    """As in ``nn.Linear``, where ``a`` starts as above; or each term, each factor of it, uniform after Glorot, gain sqrt(2)."""
    parts = (b,) if isinstance(b, Tensor) else tuple(b)
    if glorot:
        for term in (term for part in parts for term in part):
            nn.init.xavier_uniform_(term, gain=math.sqrt(2))
        return
    bound = parts[0].shape[1] ** -0.5
    parts[0].uniform_(-bound, bound)
    for t in parts[1:]:
        t.normal_(std=t.shape[1] ** -0.5)


def phm_rule(n: int, *, factorized: bool = False, std: float | None = None, device=None, dtype=None) -> Rule:
    """A new rule ``(n, n, n)`` for ``shared_rule`` of many layers, normal with the deviation ``std`` (None: ``1 / n``).

    ``factorized`` makes it the product of two parameters ``(n, n, 1)`` and ``(n, 1, n)``.
    """
    check_size("n", n)
    shapes = ((n, n, 1), (n, 1, n)) if factorized else ((n, n, n),)
    made = tuple(nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in shapes)
    made = made if factorized else made[0]
    init_a(made, std)
    return made


def check_kron_options(rank, bias, backend) -> None:
    if rank is not None:
        check_size("rank", rank)
    if not isinstance(bias, bool):
        raise TypeError(f"bias must be True or False, got {type(bias).__name__}")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {(None, *BACKENDS)}, got {backend!r}")


class _Kronecker(nn.Module):
    """What the two kinds below share: ``b``, dense or as ``s`` and ``t``, and ``bias``."""

    def __init__(self, in_features, out_features, shape_b, rank, bias, backend, factory):
        super().__init__()
        terms, b_in, b_out = shape_b
        self.in_features, self.out_features, self.rank, self.backend = in_features, out_features, rank, backend

        def parameter(wanted, *shape):
            return nn.Parameter(torch.empty(shape, **factory)) if wanted else None

        self.b = parameter(rank is None, terms, b_in, b_out)
        self.s, self.t = parameter(rank, terms, b_in, rank), parameter(rank, terms, rank, b_out)
        self.bias = parameter(bias, out_features)

    @property
    def factors(self) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]:
        """``a`` and ``b`` as :func:`fastadapt.kron_linear` takes them."""
        return self._a(), (self.s, self.t) if self.b is None else self.b

    def dense_weight(self) -> Tensor:
        """The matrix as ``nn.Linear`` keeps it, ``(out_features, in_features)``, in the parameters' dtype, rounded once.

        Worth its memory in inference where ``b`` is dense or its rank large; :func:`fastadapt.explain` on ``kron_linear``
        names the order in which a call is computed. Gradients reach the factors through it.
        """
        a, b = self.factors
        first = a if isinstance(a, Tensor) else a[0]
        wide = torch.promote_types(first.dtype, torch.float32)
        a, b = (t.to(wide) if isinstance(t, Tensor) else tuple(part.to(wide) for part in t) for t in (a, b))
        with without_autocast(first):
            return kron_sum(product("a", a), product("b", b)).T.to(first.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        return kron_linear(x, *self.factors, self.bias, backend=self.backend)


class PHMLinear(_Kronecker):
    """A linear layer of parameterised hypercomplex multiplication: ``y = x @ sum_i kron(rule[i], b[i]) + bias``, ``n`` terms.

    With a ``rank``, ``b[i] = s[i] @ t[i]`` (LPHM) and the matrix is never formed; with ``rank=None`` ``b`` is dense. A new
    layer starts with the variance of a new ``nn.Linear``, its bias at zero. Sources: Zhang et al. 2021 (PHM), Karimi Mahabadi
    et al. 2021 (Compacter, LPHM).

    Keys of ``state_dict``: ``rule`` ``(n, n, n)``, or ``rule_left`` ``(n, n, p)`` and ``rule_right`` ``(n, p, n)``; ``s``
    ``(n, in_features / n, rank)`` and ``t`` ``(n, rank, out_features / n)``, or ``b`` ``(n, in_features / n, out_features /
    n)``; ``bias``. A shared rule is there under the key of each of its layers, as PyTorch does with tied parameters; it is one
    parameter, whose gradient is the sum over the layers.

    Args:
        in_features, out_features: multiples of ``n``.
        n: number of terms and size of the rule.
        rank: of ``b``; None keeps it dense.
        bias: add one.
        shared_rule: a parameter, or a pair of them, that other layers have too (:func:`phm_rule` makes one). None: a rule of
            the layer's own. :meth:`reset_parameters` leaves a shared rule alone. ``to_empty`` of PyTorch, which a meta device
            needs, gives every layer a rule of its own: share again after it.
        factorized_rule: a rule of its own is the product of ``(n, n, 1)`` and ``(n, 1, n)``.
        init_std: start as in Compacter instead: a rule of its own normal with this deviation, the other factors uniform after
            Glorot with gain sqrt(2).
        backend: as in :func:`fastadapt.kron_linear`; also an attribute.
        device, dtype: of the parameters. float32 parameters serve 16-bit activations too.
    """

    # save_pretrained of transformers writes a tensor once whose names are all among these: 4.57 reads a list, 5 the keys.
    _tied_weights_keys = dict.fromkeys(("rule", "rule_left", "rule_right"))

    def __init__(
        self, in_features: int, out_features: int, *, n: int = 4, rank: int | None = 1, bias: bool = True,
        shared_rule: Rule | None = None, factorized_rule: bool = False, init_std: float | None = None,
        backend: str | None = None, device=None, dtype=None,
    ):  # fmt: skip
        for name, value in (("n", n), ("in_features", in_features), ("out_features", out_features)):
            check_size(name, value)
            if value % n:
                raise ValueError(f"{name} must be a multiple of n = {n}, got {value}")
        check_kron_options(rank, bias, backend)
        if init_std is not None and not (isinstance(init_std, Real) and init_std > 0):
            raise ValueError(f"init_std must be None or a positive number, got {init_std!r}")
        factory = {"device": device, "dtype": dtype}
        super().__init__(in_features, out_features, (n, in_features // n, out_features // n), rank, bias, backend, factory)
        self.n, self.init_std, self.shares_rule = n, init_std, shared_rule is not None
        if shared_rule is None:
            shared_rule = phm_rule(n, factorized=factorized_rule, **factory)
        single = isinstance(shared_rule, Tensor)
        parts = (shared_rule,) if single else tuple(shared_rule)
        shapes = [tuple(part.shape) for part in parts if isinstance(part, nn.Parameter)]
        p = shapes[0][-1] if shapes and shapes[0] else 0
        if len(shapes) != len(parts) or shapes != ([(n, n, n)] if single else [(n, n, p), (n, p, n)]):
            got = shapes if len(shapes) == len(parts) else [type(part).__name__ for part in parts]
            raise ValueError(
                f"shared_rule must be a Parameter ({n}, {n}, {n}), or a pair ({n}, {n}, p) and ({n}, p, {n}), got {got}"
            )
        self.rule = shared_rule if single else None
        self.rule_left, self.rule_right = (None, None) if single else parts
        self.reset_parameters()

    def _a(self) -> Tensor | tuple[Tensor, Tensor]:
        return (self.rule_left, self.rule_right) if self.rule is None else self.rule

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew; a shared rule stays as it is."""
        a, b = self.factors
        if not self.shares_rule:
            init_a(a, self.init_std)
        init_b(b, glorot=self.init_std is not None)
        if self.bias is not None:
            self.bias.zero_()

    def extra_repr(self) -> str:
        options = {"n": self.n, "rank": self.rank, "bias": self.bias is not None, "shares_rule": self.shares_rule}
        words = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{self.in_features}, {self.out_features}, {words}"


def _nearest_root(size: int) -> int:
    """The largest divisor of ``size`` up to its square root."""
    return next(i for i in range(math.isqrt(size), 0, -1) if size % i == 0)


class KronLinear(_Kronecker):
    """A linear layer whose matrix is a Kronecker product, or a sum of them: ``y = x @ sum_i kron(a[i], b[i]) + bias``.

    Keys of ``state_dict``: ``a`` ``(terms, a_in, a_out)``; ``b`` ``(terms, in_features / a_in, out_features / a_out)``, or
    with a rank ``s`` ``(terms, in_features / a_in, rank)`` and ``t`` ``(terms, rank, out_features / a_out)``; ``bias``
    ``(out_features,)``. In PyTorch's layout ``torch.kron(a[i].T, b[i].T)`` is the weight ``(out_features, in_features)``. A
    new layer starts with the variance of a new ``nn.Linear``, its bias at zero.

    Args:
        in_features, out_features: widths.
        a_shape: ``(a_in, a_out)``, which divide the widths; None takes the largest divisors up to the square roots.
        terms: number of products.
        rank: of ``b``, whose factors are then never multiplied out; None keeps it dense, for PyTorch's own products.
        bias: add one.
        backend: as in :func:`fastadapt.kron_linear`; also an attribute.
        device, dtype: of the parameters. float32 parameters serve 16-bit activations too.
    """

    def __init__(
        self, in_features: int, out_features: int, *, a_shape: tuple[int, int] | None = None, terms: int = 1,
        rank: int | None = None, bias: bool = True, backend: str | None = None, device=None, dtype=None,
    ):  # fmt: skip
        for name, value in (("in_features", in_features), ("out_features", out_features), ("terms", terms)):
            check_size(name, value)
        check_kron_options(rank, bias, backend)
        if a_shape is not None and (not isinstance(a_shape, (tuple, list)) or len(a_shape) != 2):
            raise ValueError(f"a_shape must be (a_in, a_out) or None, got {a_shape!r}")
        a_in, a_out = (_nearest_root(in_features), _nearest_root(out_features)) if a_shape is None else a_shape
        for name, value, width in (("a_shape[0]", a_in, in_features), ("a_shape[1]", a_out, out_features)):
            check_size(name, value)
            if width % value:
                raise ValueError(f"{name} must divide {width}, got {value}")
        factory = {"device": device, "dtype": dtype}
        shape_b = terms, in_features // a_in, out_features // a_out
        super().__init__(in_features, out_features, shape_b, rank, bias, backend, factory)
        self.a = nn.Parameter(torch.empty(terms, a_in, a_out, **factory))
        self.reset_parameters()

    def _a(self) -> Tensor:
        return self.a

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew."""
        a, b = self.factors
        init_a(a, None)
        init_b(b)
        if self.bias is not None:
            self.bias.zero_()

    def extra_repr(self) -> str:
        terms, *a_shape = self.a.shape
        options = {"a_shape": tuple(a_shape), "terms": terms, "rank": self.rank, "bias": self.bias is not None}
        words = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{self.in_features}, {self.out_features}, {words}"


class KronALinear(Merging):
    """A frozen linear layer with Kronecker products beside it (KronA): ``y = base(x) + scale * (x @ sum_i kron(a[i], b[i]))``.

    A new layer computes what ``base`` does: ``b``, or its factor ``t``, starts at zero, and gets the first gradients. ``base``
    and ``kron``, a :class:`KronLinear` without bias, hold the parameters; :meth:`merge` and :meth:`unmerge` as in
    :class:`LoRALinear`. Keys of ``state_dict``: those of ``base`` and ``kron.a``, ``kron.b`` or ``kron.s``, ``kron.t``. Source:
    Edalati et al. 2022 (KronA).

    Args:
        base: as in :class:`LoRALinear`. It is frozen and kept, not copied.
        a_shape, terms, rank: see :class:`KronLinear`.
        scale: a number.
        backend: as in :func:`fastadapt.kron_linear`; also an attribute.
        dtype: of the factors; None takes that of ``base``, or float32 where it has 16 bits or is quantised.
    """

    def __init__(
        self, base: nn.Module, *, a_shape: tuple[int, int] | None = None, terms: int = 1, rank: int | None = None,
        scale: float = 1.0, backend: str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        if not isinstance(scale, Real) or isinstance(scale, bool) or not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale!r}")
        conv1d, k, n = linear_sizes(base)
        super().__init__(base, conv1d, backend)
        self.scale = float(scale)
        factory = {"device": base.weight.device, "dtype": adapter_dtype(base.weight, dtype)}
        self.kron = KronLinear(k, n, a_shape=a_shape, terms=terms, rank=rank, bias=False, backend=backend, **factory)
        leave_fast_path(self.kron)
        self.reset_parameters()
        self.train(base.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, as what ``base`` alone computes."""
        if self.merged:
            raise RuntimeError("reset_parameters: unmerge the adapter first")
        self.kron.reset_parameters()
        (self.kron.t if self.kron.b is None else self.kron.b).zero_()

    def _merged(self) -> tuple[Tensor, Tensor | None]:
        weight, added = dense(self._weight()), self.kron.dense_weight()
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.add(weight.to(wide), added.to(wide), alpha=self.scale).to(weight.dtype), getattr(self.base, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., k)`` to ``(..., n)``."""
        if self.merged:
            return F.linear(x, self._weight(), self.base.bias)
        y = self.base(x)
        return kron_linear(x.to(y.dtype), *self.kron.factors, residual=y, scale=self.scale, backend=self.backend)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, merged={self.merged}"
