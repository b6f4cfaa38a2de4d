"""Many bottleneck adapters in one batch: every row runs through the adapter that its id names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.bottleneck import bottleneck
from .bottleneck import BottleneckAdapter, check_options, check_size, init_pair
from .route import Routed


class AdapterBank(Routed):
    """``g`` bottleneck adapters of one shape, chosen per row by ``adapter_ids``, for training and inference.

    Row ``j`` of the output is what :class:`BottleneckAdapter` number ``adapter_ids[j]`` gives for row ``j`` of ``x``; a row of
    id -1 gets the residual alone. All rows run in one kernel, whatever the mixture. The adapters differ in every parameter;
    they share ``d``, ``r`` and the options, which mean what they do in :class:`BottleneckAdapter`. The mixture of tasks in a
    batch is that of multi-task adapters (Houlsby et al. 2019; Pfeiffer et al. 2021).

    The kernel's LayerNorm, scale and skips are shared by a bank. A LayerNorm or a learned scale of each adapter's own is
    therefore folded into its projections, which costs a pass over the weights, not over ``x``; ``skip="channel"`` adds one
    elementwise pass over the output and ``skip="hidden"`` a second call of the kernel.

    Parameters, each the stack of its counterpart: ``down_weight`` ``(g, r, d)``, ``down_bias`` ``(g, r)``, ``up_weight``
    ``(g, d, r)``, ``up_bias`` ``(g, d)``, and by option ``norm_weight``, ``norm_bias`` ``(g, d)``, ``scale`` ``(g, 1)`` or
    ``(g, d)``, ``skip_weight`` ``(g, d)``, ``hidden_skip_weight`` ``(g, r)``.

    Args:
        g: number of adapters.
        d, r, activation, norm, residual, scale, skip, bias, norm_eps, init_std, backend, device, dtype: see
            :class:`BottleneckAdapter`.
    """

    def __init__(
        self, g: int, d: int, r: int, *, activation: str = "relu", norm: str | None = None, residual: bool = True,
        scale: float | str = 1.0, skip: str | None = None, bias: bool = True, norm_eps: float = 1e-5,
        init_std: float | None = None, backend: str | None = None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        for name, value in (("g", g), ("d", d), ("r", r)):
            check_size(name, value)
        scale = check_options(activation, norm, residual, scale, skip, bias, init_std, backend)
        self.g, self.d, self.r, self.init_std, self.backend = g, d, r, init_std, backend
        self._options = {
            "activation": activation, "norm": norm, "residual": residual, "scale": scale, "skip": skip, "bias": bias,
            "norm_eps": norm_eps if norm else 1e-5,
        }  # fmt: skip

        def stack(wanted, *shape):
            return nn.Parameter(torch.empty(g, *shape, device=device, dtype=dtype)) if wanted else None

        self.down_weight, self.down_bias = stack(True, r, d), stack(bias, r)
        self.up_weight, self.up_bias = stack(True, d, r), stack(bias, d)
        self.norm_weight, self.norm_bias = stack(norm, d), stack(norm, d)
        self.scale = stack(True, d if scale == "channel" else 1) if isinstance(scale, str) else scale
        self.skip_weight, self.hidden_skip_weight = stack(skip == "channel", d), stack(skip == "hidden", r)
        self.reset_parameters()

    @property
    def residual(self) -> bool:
        """Whether ``x`` is what a branch is added to where no other residual is given."""
        return self._options["residual"]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start every adapter anew, as :class:`BottleneckAdapter` does."""
        init_pair(self.down_weight, self.up_weight, self.init_std)
        for zero in (self.down_bias, self.up_bias, self.norm_bias, self.skip_weight, self.hidden_skip_weight):
            if zero is not None:
                zero.zero_()
        for one in (self.norm_weight, self.scale):
            if isinstance(one, Tensor):
                one.fill_(1.0)

    def forward(self, x: Tensor, adapter_ids: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Adapt ``x`` ``(..., d)`` row by row.

        Args:
            x: ``(..., d)``.
            adapter_ids: integers from -1 (no adapter) to ``g - 1``, one for each entry of the leading dim of ``x`` (a
                sequence) or of all its leading dims (a token). None: those of :func:`route`.
            residual: shape of ``x``; takes the place of ``x`` as what the branch is added to.
        """
        options, adapter_ids = self._options, self._chosen(adapter_ids)
        if residual is None and options["residual"]:
            residual = x
        down_weight, down_bias, norm_weight = self.down_weight, self.down_bias, None
        if options["norm"]:
            # Wd @ (xhat * w + b) = (Wd * w) @ xhat + Wd @ b. The sum is elementwise to stay out of autocast's reach.
            shift = (down_weight * self.norm_bias.unsqueeze(1)).sum(-1)
            down_bias = shift if down_bias is None else down_bias + shift
            down_weight = down_weight * self.norm_weight.unsqueeze(1)
            norm_weight = down_weight.new_ones(self.d)
        up_weight, up_bias, scale = self.up_weight, self.up_bias, self.scale
        if isinstance(scale, Tensor):
            up_weight = up_weight * scale.unsqueeze(-1)
            up_bias = None if up_bias is None else up_bias * scale
            scale = 1.0
        shared = {
            "down_bias": down_bias, "scale": scale, "norm_weight": norm_weight, "norm_eps": options["norm_eps"],
            "adapter_ids": adapter_ids, "backend": self.backend,
        }  # fmt: skip
        y = bottleneck(
            x, down_weight, up_weight, up_bias=up_bias, residual=residual, activation=options["activation"], **shared
        )
        if options["skip"] == "hidden":  # the linear path is an adapter without activation
            linear = up_weight * self.hidden_skip_weight.unsqueeze(1)
            y = bottleneck(x, down_weight, linear, residual=y, activation="identity", **shared)
        if options["skip"] == "channel":
            rows = adapter_ids.long().clamp(-1, self.g - 1)  # the kernel has judged the ids; -1 takes the row of zeros
            weight = F.pad(self.skip_weight, (0, 0, 0, 1)).to(x.dtype)[rows]
            weight = weight.view(rows.shape + (1,) * (x.dim() - 1 - rows.dim()) + (self.d,))
            y = torch.addcmul(y, weight, x)
        return y

    def every(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """What each of the ``g`` adapters makes of ``x`` ``(..., d)``: ``(g, ..., d)``, in one call that copies no ``x``.

        Args:
            x: ``(..., d)``.
            residual: shape of ``x``; takes the place of ``x`` as what each branch is added to.
        """
        each = x.expand(self.g, *x.shape)
        if residual is not None:
            residual = each if residual is x else residual.expand(self.g, *residual.shape)
        # Made anew in each call: a buffer that isn't in the state_dict would be lost between the meta device and a checkpoint.
        return self(each, torch.arange(self.g, device=x.device), residual)

    def _index(self, i: int) -> int:
        if not isinstance(i, int) or isinstance(i, bool):
            raise TypeError(f"i must be an integer, got {type(i).__name__}")
        if not 0 <= i < self.g:
            raise IndexError(f"i must lie in [0, {self.g - 1}] for a bank of {self.g}, got {i}")
        return i

    def _pairs(self, i: int, adapter: BottleneckAdapter) -> list[tuple[Tensor, Tensor]]:
        """Views of adapter ``i`` of the bank, cut to the rank of ``adapter``, beside the parameters of ``adapter``."""
        r = adapter.r
        norm = adapter.norm
        pairs = (
            (self.down_weight[i, :r], adapter.down.weight),
            (self.up_weight[i, :, :r], adapter.up.weight),
            (self.down_bias is not None and self.down_bias[i, :r], adapter.down.bias),
            (self.up_bias is not None and self.up_bias[i], adapter.up.bias),
            (self.norm_weight is not None and self.norm_weight[i], None if norm is None else norm.weight),
            (self.norm_bias is not None and self.norm_bias[i], None if norm is None else norm.bias),
            (isinstance(self.scale, Tensor) and self.scale[i], adapter.scale if isinstance(adapter.scale, Tensor) else None),
            (self.skip_weight is not None and self.skip_weight[i], adapter.skip_weight),
            (self.hidden_skip_weight is not None and self.hidden_skip_weight[i, :r], adapter.hidden_skip_weight),
        )
        return [(mine, theirs) for mine, theirs in pairs if theirs is not None]

    @torch.no_grad()
    def load_adapter(self, i: int, adapter: BottleneckAdapter) -> None:
        """Copy the parameters of ``adapter`` into place ``i``.

        The options must be those of the bank. A smaller rank is filled up with zeros, which is exact and stays so in
        training: those rows and columns get no gradient. What an optimizer keeps of the place, such as Adam's moments, is to
        be zeroed there, or it moves the new adapter as the one before, and those rows and columns with it.
        """
        self._index(i)
        if not isinstance(adapter, BottleneckAdapter):
            raise TypeError(f"adapter must be a BottleneckAdapter, got {type(adapter).__name__}")
        if adapter.d != self.d:
            raise ValueError(f"adapter must have d = {self.d} like the bank, got {adapter.d}")
        if adapter.r > self.r:
            raise ValueError(f"adapter must have a rank of at most {self.r}, the bank's, got {adapter.r}")
        for name, value in adapter.options().items():
            if value != self._options[name]:
                raise ValueError(f"adapter must have {name}={self._options[name]!r} like the bank, got {value!r}")
        for parameter in (self.down_weight, self.down_bias, self.up_weight, self.hidden_skip_weight):
            if parameter is not None:
                parameter[i].zero_()
        for mine, theirs in self._pairs(i, adapter):
            mine.copy_(theirs)

    @torch.no_grad()
    def adapter(self, i: int) -> BottleneckAdapter:
        """Copy adapter ``i`` out of the bank, for use alone."""
        self._index(i)
        weight = self.down_weight
        adapter = BottleneckAdapter(
            self.d, self.r, **self._options, init_std=self.init_std, backend=self.backend, device=weight.device,
            dtype=weight.dtype,
        )  # fmt: skip
        for mine, theirs in self._pairs(i, adapter):
            theirs.copy_(mine)
        return adapter.train(self.training)

    def options(self) -> dict:
        """The constructor's arguments that decide what is computed."""
        return dict(self._options)

    def extra_repr(self) -> str:
        sizes = {"g": self.g, "d": self.d, "r": self.r}
        return ", ".join(f"{name}={value!r}" for name, value in {**sizes, **self._options}.items())
