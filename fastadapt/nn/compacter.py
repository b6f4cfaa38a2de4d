"""Compacter: a bottleneck adapter of two PHM layers, y = residual + scale * up(act(down(norm(x))))."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.bottleneck import bottleneck
from ..ops.compacter import compacter
from .bottleneck import check_options, check_size
from .kron import PHMLinear, Rule, phm_rule


class CompacterAdapter(nn.Module):
    """A Compacter adapter of width ``d`` and bottleneck ``r``, run by :func:`fastadapt.compacter` in one kernel.

    ``y = residual + scale * up(act(down(norm(x))))`` where ``down`` and ``up`` are a :class:`PHMLinear` each. A new adapter is
    the identity, exactly: ``up.t`` starts at zero, which gets gradients at once. (A rule of zeros would not do: one that both
    projections share would leave nothing but ``up.bias`` with a gradient.) With ``residual=False`` it adds nothing to what its
    output is added to. With ``rank=None`` the two matrices are formed in each call, for the kernel of
    :func:`fastadapt.bottleneck`. A norm costs a pass of its own, but not there. Source: Karimi Mahabadi et al. 2021.

    Keys of ``state_dict``: those of ``down`` and ``up``, see :class:`PHMLinear`, of ``norm``, and ``scale`` if it is learned. A
    shared rule is there as ``down.rule`` and as ``up.rule``.

    Args:
        d, r: width of the model and of the bottleneck, multiples of ``n``.
        n, rank, shared_rule, factorized_rule: see :class:`PHMLinear`. Compacter shares one rule among both projections of all
            adapters of a model; None gives each projection a rule of its own.
        activation: as in :class:`BottleneckAdapter`.
        residual: add ``x`` where ``forward`` is given no residual; False adds nothing there.
        scale: a number, or ``"learned"``: a parameter of shape ``(1,)``.
        bias: biases in both projections.
        norm: ``"pre"`` puts a LayerNorm of the adapter's own before the down projection; None: no norm.
        norm_eps: epsilon of the LayerNorm.
        init_std: start as in the paper instead of the identity: rules that aren't shared normal with this deviation, the other
            factors uniform after Glorot with gain sqrt(2). A small rule leaves little of the adapter at first.
        backend: as in :func:`fastadapt.compacter`; also an attribute.
        device, dtype: of the parameters. float32 parameters serve 16-bit activations too.
    """

    def __init__(
        self, d: int, r: int, *, n: int = 4, rank: int | None = 1, activation: str = "gelu", residual: bool = True,
        scale: float | str = 1.0, bias: bool = True, shared_rule: Rule | None = None, factorized_rule: bool = False,
        norm: str | None = None, norm_eps: float = 1e-5, init_std: float | None = None, backend: str | None = None,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        for name, value in (("n", n), ("d", d), ("r", r)):
            check_size(name, value)
            if value % n:
                raise ValueError(f"{name} must be a multiple of n = {n}, got {value}")
        scale = check_options(activation, norm, residual, scale, None, bias, init_std, backend)
        if scale == "channel":
            raise ValueError("scale must be a number or 'learned', got 'channel'")
        self.d, self.r, self.activation, self.residual = d, r, activation, residual
        self.init_std, self.backend = init_std, backend
        factory = {"device": device, "dtype": dtype}
        phm = {"n": n, "rank": rank, "bias": bias, "shared_rule": shared_rule, "init_std": init_std, **factory}
        self.down = PHMLinear(d, r, factorized_rule=factorized_rule, **phm)
        self.up = PHMLinear(r, d, factorized_rule=factorized_rule, **phm)
        self.norm = nn.LayerNorm(d, eps=norm_eps, **factory) if norm else None
        self.scale = nn.Parameter(torch.empty(1, **factory)) if scale == "learned" else scale
        self.reset_parameters()

    @classmethod
    def compacter_plus_plus(cls, layers: int, d: int, r: int | None = None, **options) -> list["CompacterAdapter"]:
        """The adapters of Compacter++: one for each of ``layers``, after its feed-forward block, all with one rule.

        ``r`` of None is ``d / 32``, rounded down to a multiple of ``n``. The activation is ``"gelu_tanh"``, the start that of
        the paper: a rule of deviation 1e-4, so that the model is next to what it was. ``options`` override any argument of the
        constructor; with ``init_std=None`` the adapters start as the identity.
        """
        check_size("layers", layers)
        options = {"n": 4, "activation": "gelu_tanh", "init_std": 1e-4, **options}
        n = options["n"]
        if options.get("shared_rule") is None:
            made = {name: options.get(name) for name in ("device", "dtype")}
            factorized = options.get("factorized_rule", False)
            options["shared_rule"] = phm_rule(n, factorized=factorized, std=options["init_std"], **made)
        r = max(n, d // (32 * n) * n) if r is None else r
        return [cls(d, r, **options) for _ in range(layers)]

    @classmethod
    def compacter(
        cls, layers: int, d: int, r: int | None = None, **options
    ) -> list[tuple["CompacterAdapter", "CompacterAdapter"]]:
        """The adapters of Compacter: two for each of ``layers``, after attention and after the feed-forward block, all with one
        rule. In everything else as :meth:`compacter_plus_plus`."""
        check_size("layers", layers)
        adapters = cls.compacter_plus_plus(2 * layers, d, r, **options)
        return list(zip(adapters[::2], adapters[1::2]))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, see ``init_std``; a shared rule stays as it is."""
        self.down.reset_parameters()
        self.up.reset_parameters()
        if self.init_std is None:
            (self.up.t if self.up.b is None else self.up.b).zero_()
        if isinstance(self.scale, Tensor):
            self.scale.fill_(1.0)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x: Tensor, residual: Tensor | None = None, *, weight: float | Tensor | None = None) -> Tensor:
        """Adapt ``x`` ``(..., d)``; ``residual`` of the same shape takes the place of ``x`` as what the branch is added to.

        ``weight``, a number or a 0-d tensor, multiplies the branch.
        """
        if residual is None and self.residual:
            residual = x
        down, up, norm, scale = self.down, self.up, self.norm, self.scale
        scale = scale.view(()) if isinstance(scale, Tensor) else scale
        options = {
            "down_bias": down.bias, "up_bias": up.bias, "residual": residual,
            "scale": scale if weight is None else scale * weight, "activation": self.activation, "backend": self.backend,
        }  # fmt: skip
        if down.rank is None:
            if norm is not None:
                options |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}
            return bottleneck(x, down.dense_weight(), up.dense_weight(), **options)
        if norm is not None:  # in the dtype of x, under autocast too
            x = F.layer_norm(x, (self.d,), norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps).to(x.dtype)
        (down_a, down_b), (up_a, up_b) = down.factors, up.factors
        return compacter(x, (down_a, *down_b), (up_a, *up_b), **options)

    def options(self) -> dict:
        """The constructor's arguments that decide what is computed."""
        return {
            "n": self.down.n,
            "rank": self.down.rank,
            "activation": self.activation,
            "residual": self.residual,
            "scale": "learned" if isinstance(self.scale, Tensor) else self.scale,
            "bias": self.down.bias is not None,
            "factorized_rule": self.down.rule is None,
            "norm": None if self.norm is None else "pre",
            "norm_eps": 1e-5 if self.norm is None else self.norm.eps,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in {"d": self.d, "r": self.r, **self.options()}.items())
