"""AdapterFusion: a frozen layer's adapters of many tasks, mixed for each token by attention over them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._leaf import BACKENDS
from ..ops.adapter_fusion import adapter_fusion
from .bank import AdapterBank
from .bottleneck import BottleneckAdapter, check_size


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In the dtype of ``x``, which float32 parameters serve where it has 16 bits."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def folded_query(x: Tensor, query: nn.Linear | None, key: nn.Linear | None) -> Tensor:
    """A query for what adapters give, in place of one for its projection: ``<query(x), key(u)> = <key.weight.T query(x), u>``,
    but for what all adapters have in common.

    One product with a ``d x d`` matrix in place of one for each adapter, and one for both projections where that of the
    matrices costs less than that of the rows. A bias of ``key`` moves all scores of a row alike; it gets a gradient of zero, so
    that nothing waits for one.
    """
    if key is None:
        return x if query is None else _linear(x, query.weight, query.bias)
    weight, bias = key.weight.T, None if key.bias is None else 0.0 * key.bias
    if query is not None and math.prod(x.shape[:-1]) < x.shape[-1]:
        return _linear(_linear(x, query.weight, query.bias), weight, bias)
    if query is not None:
        if query.bias is not None:
            moved = weight @ query.bias
            bias = moved if bias is None else bias + moved
        weight = weight @ query.weight
    return _linear(x, weight, bias)


def projected(z: Tensor, value: nn.Linear | None, residual: Tensor | None) -> Tensor:
    """``residual + value(z)``: weights that sum to one let the projection of the values wait for their sum."""
    if value is None:
        return z if residual is None else residual + z
    if residual is None or residual.dtype != z.dtype or torch.is_autocast_enabled(z.device.type):
        z = _linear(z, value.weight)
        return z if residual is None else residual + z
    rows = (-1, z.shape[-1])
    return torch.addmm(residual.reshape(rows), z.reshape(rows), value.weight.T.to(z.dtype)).view(z.shape)


class AdapterFusion(nn.Module):
    """Adapters of ``g`` tasks mixed by attention, token by token (Pfeiffer et al. 2021).

    ``y = residual + V @ sum_i softmax_i(<q, K @ u_i> / temperature) * u_i``, where ``u_i`` is the branch of adapter ``i``,
    without its residual, and ``q = Q @ x + b``. The ``g`` branches are one call of ``bottleneck`` that copies no ``x``. ``K``
    is folded into the query and ``V`` follows the sum, so that the products of rows with ``d x d`` matrices are two, three for
    fewer rows than ``d``, whatever ``g`` is. ``V`` starts as the identity, and :meth:`regularization` holds it there. The
    adapters are frozen and cost no gradients; what flows back through them reaches ``x``.

    Attributes: ``adapters``, an :class:`AdapterBank`; ``query``, ``key`` and ``value``, each an ``nn.Linear`` or None, or
    ``query`` a parameter ``(d,)``. A bias of ``key`` would change nothing: there is none.

    Args:
        d: model width.
        adapters: an :class:`AdapterBank`, which is taken as it is, or :class:`BottleneckAdapter` s with the same options, which
            are copied. Whether ``x`` is the default residual is one of their options.
        query: ``"hidden"``: from the hidden state, as in the paper; ``"learned"``: one for all tokens, itself a parameter,
            which needs no ``key``.
        value: whether there is a ``V``.
        temperature: divides the scores.
        init_std: standard deviation of the weights of ``query`` and ``key`` and of a learned query.
        backend: of the kernels, see :func:`fastadapt.adapter_fusion`.
        device, dtype: of the other parameters. float32 parameters serve 16-bit activations too.
    """

    def __init__(
        self, d: int, adapters: AdapterBank | Sequence[BottleneckAdapter], *, query: str = "hidden", value: bool = True,
        temperature: float = 1.0, init_std: float = 2e-2, backend: str | None = None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        check_size("d", d)
        if query not in ("hidden", "learned"):
            raise ValueError(f"query must be 'hidden' or 'learned', got {query!r}")
        if backend not in (None, *BACKENDS):
            raise ValueError(f"backend must be one of {(None, *BACKENDS)}, got {backend!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature!r}")
        self.adapters = adapters if isinstance(adapters, AdapterBank) else _bank(adapters)
        if self.adapters.d != d:
            raise ValueError(f"adapters must have d = {d}, got {self.adapters.d}")
        self.adapters.requires_grad_(False)
        self.d, self.temperature, self.init_std, self.backend = d, temperature, init_std, backend
        options = {"device": device, "dtype": dtype}
        learned = query == "learned"
        self.query = nn.Parameter(torch.empty(d, **options)) if learned else nn.Linear(d, d, **options)
        self.key = None if learned else nn.Linear(d, d, bias=False, **options)
        self.value = nn.Linear(d, d, bias=False, **options) if value else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: ``V`` the identity, ``Q`` and ``K`` next to nothing, so that every adapter weighs the same."""
        if self.key is None:
            self.query.normal_(std=self.init_std)
        else:
            for linear in (self.query, self.key):
                linear.weight.normal_(std=self.init_std)
            self.query.bias.zero_()
        if self.value is not None:
            nn.init.eye_(self.value.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, hidden: Tensor | None = None, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Adapt ``x`` ``(..., d)``.

        Args:
            x: what the adapters read.
            residual: shape of ``x``; takes the place of ``x`` as what the mixture is added to.
            hidden: shape of ``x``; takes its place as what the query is made of.
            return_weights: also return the weights ``(..., g)`` of the adapters, without gradient.
        """
        if x.shape[-1:] != (self.d,):
            raise ValueError(f"x must be (..., {self.d}), got {tuple(x.shape)}")
        for name, value in (("residual", residual), ("hidden", hidden)):
            if value is not None and tuple(value.shape) != tuple(x.shape):
                raise ValueError(f"{name} must be {tuple(x.shape)} like x, got {tuple(value.shape)}")
        nothing = None
        if self.adapters.residual:
            residual = x if residual is None else residual
            nothing = x.new_zeros(self.d).expand(x.shape)
        branches = self.adapters.every(x, residual=nothing)
        if self.key is None:
            query = self.query.to(x.dtype).expand(x.shape)
        else:
            query = folded_query(x if hidden is None else hidden, self.query, self.key)
        z, weights = adapter_fusion(
            query, branches, branches, scale=1 / self.temperature, return_weights=True, backend=self.backend
        )
        y = projected(z, self.value, residual)
        return (y, weights) if return_weights else y

    def regularization(self, weight: float = 0.01) -> Tensor:
        """``weight * |V - I|^2``, 0-d, to be added to the loss; zero without a ``V``."""
        if self.value is None:
            return torch.zeros(())
        difference = self.value.weight - torch.eye(self.d, device=self.value.weight.device, dtype=self.value.weight.dtype)
        return weight * difference.square().sum()

    def options(self) -> dict:
        """The constructor's arguments that decide what is computed."""
        query = "learned" if self.key is None else "hidden"
        return {"query": query, "value": self.value is not None, "temperature": self.temperature}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in {"d": self.d, **self.options()}.items())


def _bank(adapters: Sequence[BottleneckAdapter]) -> AdapterBank:
    """A bank with copies of ``adapters``, as wide as the widest."""
    if isinstance(adapters, nn.Module) and not isinstance(adapters, nn.ModuleList):
        raise TypeError(f"adapters must be an AdapterBank or a sequence of BottleneckAdapters, got {type(adapters).__name__}")
    adapters = list(adapters)
    if not adapters:
        raise ValueError("adapters must be an AdapterBank or at least one BottleneckAdapter, got none")
    for adapter in adapters:
        if not isinstance(adapter, BottleneckAdapter):
            raise TypeError(f"adapters must be an AdapterBank or BottleneckAdapters, got {type(adapter).__name__}")
    first, r = adapters[0], max(adapter.r for adapter in adapters)
    weight = first.down.weight
    bank = AdapterBank(
        len(adapters), first.d, r, **first.options(), backend=first.backend, device=weight.device, dtype=weight.dtype
    )
    for i, adapter in enumerate(adapters):
        bank.load_adapter(i, adapter)
    return bank.train(first.training)
