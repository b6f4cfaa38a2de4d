"""Bottleneck adapters: y = residual + scale * (act(norm(x) @ Wd.T + bd) @ Wu.T + bu) + skip * x."""

import inspect
from numbers import Real

import torch
from torch import Tensor, nn

from .._leaf import BACKENDS
from ..ops.bottleneck import ACTIVATIONS, bottleneck


def check_size(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_init_std(init_std: float | None) -> float | None:
    if init_std is not None and not (isinstance(init_std, Real) and init_std > 0):
        raise ValueError(f"init_std must be None or a positive number, got {init_std!r}")
    return init_std


def check_options(activation, norm, residual, scale, skip, bias, init_std, backend) -> float | str:
    """Refuse what no adapter can be built from; return ``scale`` as a float or its name."""
    for name, value, allowed in (
        ("activation", activation, tuple(ACTIVATIONS)),
        ("norm", norm, (None, "pre")),
        ("skip", skip, (None, "channel", "hidden")),
        ("backend", backend, (None, *BACKENDS)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    for name, value in (("residual", residual), ("bias", bias)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    check_init_std(init_std)
    if isinstance(scale, str):
        if scale not in ("learned", "channel"):
            raise ValueError(f"scale must be a number, 'learned' or 'channel', got {scale!r}")
        return scale
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number, 'learned' or 'channel', got {type(scale).__name__}")
    return float(scale)


@torch.no_grad()
def init_pair(down_weight: Tensor, up_weight: Tensor, init_std: float | None) -> None:
    """Identity (``down`` as in ``nn.Linear``, ``up`` zero), or both normal with ``init_std``, cut at two deviations."""
    if init_std is None:
        bound = down_weight.shape[-1] ** -0.5
        down_weight.uniform_(-bound, bound)
        up_weight.zero_()
        return
    for weight in (down_weight, up_weight):
        nn.init.trunc_normal_(weight, std=init_std, a=-2 * init_std, b=2 * init_std)


class BottleneckAdapter(nn.Module):
    """A bottleneck adapter of width ``d`` and rank ``r``, run by :func:`fastadapt.bottleneck` in one kernel.

    ``y = residual + scale * (hidden @ up.weight.T + up.bias) + skip_weight * x`` with
    ``z = norm(x) @ down.weight.T + down.bias`` and ``hidden = act(z) + hidden_skip_weight * z``.

    A new adapter is the identity, exactly: ``up`` and the skip weights start at zero and learned scales at one. With
    ``residual=False`` it adds nothing to what its output is added to. ``down``, ``up`` and ``norm`` hold the parameters under
    their usual names; their own ``forward`` is not called. Sources: Houlsby et al. 2019 (bottleneck adapters), Pfeiffer et
    al. 2021 (AdapterFusion), He et al. 2022 (parallel and scaled adapters), Steitz & Roth 2024 (Adapter+).

    Args:
        d, r: width of the model and of the bottleneck.
        activation: ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
        norm: ``"pre"`` puts a LayerNorm of the adapter's own before the down projection; None: no norm.
        residual: add ``x`` where ``forward`` is given no residual; False adds nothing there.
        scale: a number, ``"learned"`` (a parameter of shape ``(1,)``, which FSDP can shard and a 0-d one not) or
            ``"channel"`` (``(d,)``).
        skip: ``"channel"`` learns ``skip_weight`` ``(d,)``, ``"hidden"`` learns ``hidden_skip_weight`` ``(r,)``, a linear
            path around the activation.
        bias: biases in both projections.
        norm_eps: epsilon of the LayerNorm.
        init_std: start both projections from a normal distribution of this deviation, cut at two deviations, instead of the
            identity; biases are zero either way.
        backend: as in :func:`fastadapt.bottleneck`; also an attribute.
        device, dtype: of the parameters. float32 parameters serve 16-bit activations too.
    """

    def __init__(
        self, d: int, r: int, *, activation: str = "relu", norm: str | None = None, residual: bool = True,
        scale: float | str = 1.0, skip: str | None = None, bias: bool = True, norm_eps: float = 1e-5,
        init_std: float | None = None, backend: str | None = None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        check_size("d", d)
        check_size("r", r)
        scale = check_options(activation, norm, residual, scale, skip, bias, init_std, backend)
        self.d, self.r, self.activation, self.residual = d, r, activation, residual
        self.init_std, self.backend = init_std, backend
        self._learned_scale = scale if isinstance(scale, str) else None
        factory = {"device": device, "dtype": dtype}
        self.down = nn.Linear(d, r, bias=bias, **factory)
        self.up = nn.Linear(r, d, bias=bias, **factory)
        self.norm = nn.LayerNorm(d, eps=norm_eps, **factory) if norm else None
        if isinstance(scale, str):
            scale = nn.Parameter(torch.empty(d if scale == "channel" else 1, **factory))
        self.scale = scale
        self.skip_weight = nn.Parameter(torch.empty(d, **factory)) if skip == "channel" else None
        self.hidden_skip_weight = nn.Parameter(torch.empty(r, **factory)) if skip == "hidden" else None
        self.reset_parameters()

    @classmethod
    def houlsby(cls, d: int, r: int, **options) -> "BottleneckAdapter":
        """GELU and truncated normal weights of deviation 0.01 as in Houlsby et al. 2019, in their place after each sublayer.

        The LayerNorm parameters that they train along with the adapter are its own LayerNorm here; ``norm=None`` leaves it
        out. ``options`` override any argument of the constructor.
        """
        return cls(d, r, **{"activation": "gelu", "norm": "pre", "init_std": 1e-2, **options})

    @classmethod
    def pfeiffer(cls, d: int, r: int, **options) -> "BottleneckAdapter":
        """ReLU and BERT's initialisation, for one adapter a layer after the feed-forward block (Pfeiffer et al. 2021)."""
        return cls(d, r, **{"activation": "relu", "init_std": 2e-2, **options})

    @classmethod
    def parallel(cls, d: int, r: int, **options) -> "BottleneckAdapter":
        """The scaled parallel branch of He et al. 2022: ReLU, scale 4, ``up`` zero, no residual; see ParallelAdapter."""
        return cls(d, r, **{"activation": "relu", "scale": 4.0, "residual": False, **options})

    @classmethod
    def adapter_plus(cls, d: int, r: int, **options) -> "BottleneckAdapter":
        """Adapter+ (Steitz & Roth 2024): GELU, a learned scale per channel, weights as in Houlsby et al. 2019.

        The stochastic depth that the paper trains with is not part of the module.
        """
        return cls(d, r, **{"activation": "gelu", "scale": "channel", "init_std": 1e-2, **options})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: see ``init_std``."""
        init_pair(self.down.weight, self.up.weight, self.init_std)
        for zero in (self.down.bias, self.up.bias, self.skip_weight, self.hidden_skip_weight):
            if zero is not None:
                zero.zero_()
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
        down, up, norm, scale, skip_weight = self.down, self.up, self.norm, self.scale, self.skip_weight
        if isinstance(scale, Tensor) and scale.numel() == 1:
            scale = scale.view(())
        if weight is not None:
            scale = scale * weight
            skip_weight = None if skip_weight is None else skip_weight * weight
        return bottleneck(
            x, down.weight, up.weight, down_bias=down.bias, up_bias=up.bias, residual=residual, scale=scale,
            activation=self.activation, norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias, norm_eps=1e-5 if norm is None else norm.eps,
            skip_weight=skip_weight, hidden_skip_weight=self.hidden_skip_weight, backend=self.backend,
        )  # fmt: skip

    def options(self) -> dict:
        """The constructor's arguments that decide what is computed."""
        skips = {"channel": self.skip_weight, "hidden": self.hidden_skip_weight}
        return {
            "activation": self.activation,
            "norm": None if self.norm is None else "pre",
            "residual": self.residual,
            "scale": self._learned_scale or self.scale,
            "skip": next((name for name, weight in skips.items() if weight is not None), None),
            "bias": self.down.bias is not None,
            "norm_eps": 1e-5 if self.norm is None else self.norm.eps,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in {"d": self.d, "r": self.r, **self.options()}.items())


class ParallelAdapter(nn.Module):
    """A sublayer with an adapter beside it: ``y = layer(x) + adapter_branch(x)`` (He et al. 2022).

    The adapter takes the layer's output as its residual, so the sum costs no pass of its own, whatever the adapter's own
    ``residual`` says. The layer is left as it is, frozen or not. Where its output has another dtype than ``x``, as under
    autocast, the adapter reads ``x`` in the dtype of the output, as autocast would give it to a linear layer.

    Args:
        layer: any module from ``(..., d)`` to ``(..., d)``, or to a tuple that starts with such a tensor.
        adapter: a :class:`BottleneckAdapter`, an :class:`AdapterBank`, or a module called as ``adapter(x, residual=...)``.
    """

    def __init__(self, layer: nn.Module, adapter: nn.Module):
        super().__init__()
        for name, value in (("layer", layer), ("adapter", adapter)):
            if not isinstance(value, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")
        self.layer, self.adapter = layer, adapter
        # Models pass their hidden states by position or by the name that the layer gives them.
        self._input = next(iter(inspect.signature(layer.forward).parameters), "x")

    def forward(self, *args, adapter_ids: Tensor | str | None = None, **kwargs):
        """Call the layer with these arguments, the first being ``x``.

        ``adapter_ids`` go to an :class:`AdapterBank`, also in a :class:`Switched`. With ``"every"`` all adapters of the bank
        stand beside the layer, which runs once: in place of ``(..., d)`` comes ``(g, ..., d)``, for as many tasks at once.
        """
        if isinstance(adapter_ids, str) and (adapter_ids != "every" or not hasattr(self.adapter, "every")):
            raise ValueError(f"adapter_ids must be a tensor, or 'every' with an AdapterBank, got {adapter_ids!r}")
        if not args and self._input not in kwargs:
            raise TypeError(f"{self._input} must be given, the input of the layer, got {tuple(kwargs)}")
        x = args[0] if args else kwargs[self._input]
        out = self.layer(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) and out else out
        if not isinstance(first, Tensor):
            raise TypeError(f"layer must return a tensor or a tuple that starts with one, got {type(out).__name__}")
        if isinstance(adapter_ids, str):
            y = self.adapter.every(x.to(first.dtype), residual=first)
        else:
            ids = {} if adapter_ids is None else {"adapter_ids": adapter_ids}
            y = self.adapter(x.to(first.dtype), residual=first, **ids)
        if first is out:
            return y
        return type(out)._make((y, *out[1:])) if hasattr(out, "_make") else (y, *out[1:])
