"""Side networks: what is trained lies beside a frozen model, which no gradient enters."""

import copy
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bottleneck import check_size


def _first(out, whose: str) -> Tensor:
    """The tensor in what a module returns: itself, or the first of a tuple or of a mapping."""
    first = out
    if isinstance(out, Mapping):
        first = next(iter(out.values()), None)
    elif isinstance(out, tuple):
        first = out[0] if out else None
    if not isinstance(first, Tensor):
        raise TypeError(f"{whose} must return a tensor, or a tuple or a mapping that starts with one, got {type(out).__name__}")
    return first


def _with_first(out, y: Tensor):
    """``out`` with ``y`` in the place of its first tensor."""
    if isinstance(out, Tensor):
        return y
    if isinstance(out, Mapping):
        out = copy.copy(out)
        out[next(iter(out))] = y
        return out
    return type(out)._make((y, *out[1:])) if hasattr(out, "_make") else (y, *out[1:])


def _check_module(name: str, value) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")


class _BesideFrozen(nn.Module):
    """A frozen ``base`` that runs without a graph and without dropout, whatever mode the module is in."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        self.base.eval()
        return self


class SideNetwork(_BesideFrozen):
    """Side-tuning: ``y = alpha * base(x) + (1 - alpha) * side(x)`` with a frozen base. Source: Zhang et al. 2020.

    ``base`` runs without a graph, in evaluation mode also in training: it keeps nothing for the backward pass, and no gradient
    goes through it to ``x``. With a learned ``alpha`` the difference of the two outputs is kept. What ``base`` returns may be a
    tensor, or a tuple or a mapping that starts with one, such as the outputs of Hugging Face; the blend takes its place.

    Keys of ``state_dict``: those of ``base`` and ``side``, and ``alpha`` ``(1,)``, before its sigmoid, if it is learned.

    Args:
        base: any module. It is frozen and kept, not copied.
        side: a module that is called with the same arguments, and whose output has the shape of that of ``base``. It may start
            as a small copy of ``base`` or at random.
        alpha: the share of ``base`` at the start.
        learned: learn it, through a sigmoid, which keeps it between 0 and 1; False leaves it fixed.
    """

    def __init__(self, base: nn.Module, side: nn.Module, *, alpha: float = 0.5, learned: bool = True):
        _check_module("base", base)
        _check_module("side", side)
        if not isinstance(learned, bool):
            raise TypeError(f"learned must be True or False, got {type(learned).__name__}")
        inside = isinstance(alpha, Real) and (0 < alpha < 1 if learned else 0 <= alpha <= 1)
        if not inside or isinstance(alpha, bool):
            raise ValueError(f"alpha must be a number in {'(0, 1)' if learned else '[0, 1]'}, got {alpha!r}")
        super().__init__(base)
        self.side = side
        self.alpha = float(alpha)
        if learned:
            like = next(side.parameters(), torch.empty(0))
            self.alpha = nn.Parameter(torch.full((1,), math.log(alpha / (1 - alpha)), device=like.device, dtype=like.dtype))

    @property
    def share(self) -> Tensor | float:
        """The share of ``base`` in the output."""
        return self.alpha.sigmoid().view(()) if isinstance(self.alpha, Tensor) else self.alpha

    def forward(self, *args, **kwargs):
        """Call both with these arguments; returns what ``base`` does, with the blend as its first tensor."""
        with torch.no_grad():
            out = self.base(*args, **kwargs)
        frozen, side, share = _first(out, "base"), _first(self.side(*args, **kwargs), "side"), self.share
        if side.shape != frozen.shape:
            raise ValueError(f"side must put out {tuple(frozen.shape)} like base, got {tuple(side.shape)}")
        y = side + share * (frozen - side) if isinstance(share, Tensor) else torch.lerp(side, frozen.to(side.dtype), share)
        return _with_first(out, y.to(frozen.dtype))

    def options(self) -> dict:
        """The constructor's arguments that decide what is computed."""
        return {"alpha": "learned" if isinstance(self.alpha, Tensor) else self.alpha}

    def extra_repr(self) -> str:
        return f"alpha={self.options()['alpha']!r}"


class SideBlock(nn.Module):
    """A small transformer layer, LayerNorm first: attention, and a feed-forward network of width ``4 * d``."""

    def __init__(self, d: int, h: int, *, causal: bool = False, device=None, dtype=None):
        super().__init__()
        check_size("h", h)
        if d % h:
            raise ValueError(f"h must divide the width {d} of the side network, got {h}")
        self.h, self.causal = h, causal
        factory = {"device": device, "dtype": dtype}
        self.norm, self.ffn_norm = nn.LayerNorm(d, **factory), nn.LayerNorm(d, **factory)
        self.qkv, self.out = nn.Linear(d, 3 * d, **factory), nn.Linear(d, d, **factory)
        self.ffn = nn.Sequential(nn.Linear(d, 4 * d, **factory), nn.GELU(), nn.Linear(4 * d, d, **factory))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(b, t, d)``; ``mask`` ``(b, t)`` is True for the tokens that may be seen."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.h, -1)).permute(2, 0, 3, 1, 4).unbind()
        seen = None
        if mask is not None:
            square = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
            seen = mask[:, None, None] & (square.tril() if self.causal else square)
            seen = seen | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)  # padding sees itself: no empty softmax
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=self.causal and mask is None)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.ffn(self.ffn_norm(x))


def _found(base: nn.Module) -> str:
    """The name of the list of a model's layers: the longest ``nn.ModuleList`` that is in no other one."""
    lists = {name: len(m) for name, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = {name: n for name, n in lists.items() if not any(name.startswith(f"{other}.") for other in lists if other != name)}
    longest = [name for name, n in outer.items() if n == max(outer.values())]
    if len(longest) != 1:
        raise ValueError(f"layers must be given where base has not one longest ModuleList, got {longest or 'none'}")
    return longest[0]


def _layer_names(base: nn.Module, layers: str | Sequence[str] | None) -> list[str]:
    if layers is None or isinstance(layers, str):
        container = _found(base) if layers is None else layers
        layers = [f"{container}.{name}" if container else name for name, _ in _submodule(base, container).named_children()]
    for name in layers:
        _submodule(base, name)
    if not layers:
        raise ValueError("layers must name at least one layer of base, got none")
    return list(layers)


def _submodule(base: nn.Module, name: str) -> nn.Module:
    try:
        return base.get_submodule(name)
    except AttributeError:
        known = [known for known, _ in base.named_modules() if known]
        raise ValueError(f"layers must name submodules of base, such as {known[:8]}, got {name!r}") from None


class _Thread(threading.local):
    """Where the ladder that runs in this thread keeps what it reads: its hooks see the base run in other threads too."""

    taps: list[Tensor] | None = None


_thread = _Thread()


class LadderSideNetwork(_BesideFrozen):
    """Ladder side-tuning: a small network that reads the hidden states of a frozen one. Source: Sung et al. 2022 (LST).

    Beside each tapped layer ``i`` of ``base`` there is a block of width ``d / reduction``, which gets
    ``mu[i] * h + (1 - mu[i]) * down[i](hidden[i])`` with ``h`` from the block before it and ``mu = sigmoid(alpha /
    temperature)``. The first ``h`` is ``down`` of what the first layer gets. The last one goes through ``norm`` and ``up``.

    ``base`` runs without a graph, in evaluation mode also in training. For the backward pass of ``down`` one tensor a tapped
    layer is kept, the hidden state itself; of what is inside the layers, nothing. No gradient goes to the input of ``base``.
    To ``torch.compile``, ``base`` and the side network are graphs of their own.

    Keys of ``state_dict``: those of ``base``, ``down.0`` to ``down.<layers>`` and ``up``, ``weight`` and ``bias`` each, those
    of ``blocks.<i>`` and ``norm``, and ``alpha`` ``(layers,)``.

    Args:
        base: any module that puts out hidden states: a tensor, or a tuple or a mapping that starts with one, which it doesn't
            change in place afterwards: refused, but not seen in inference mode and by ``torch.compile``. It is frozen and kept,
            not copied.
        d: width of the hidden states.
        reduction: what divides the width, a divisor of ``d``.
        layers: which to tap, in the order in which they run: the name of their container in ``base``, or names. None for all
            of the longest ``nn.ModuleList``.
        residual: the output is added to that of ``base``, and ``up`` starts at zero: a new network changes nothing. False
            takes it alone, as in the paper, with ``up`` as in ``nn.Linear``.
        block: makes a block from its width; the block is called with ``(b, t, width)``, and with ``mask=`` if it has an
            argument of this name, see :meth:`forward`. None takes a transformer layer.
        h: number of heads of the transformer layers.
        causal: a token sees none after it, in the transformer layers; what ``base`` does, it does.
        temperature: of the gates, which start at one half.
        device, dtype: of the parameters; hidden states are cast to their dtype.
    """

    def __init__(
        self, base: nn.Module, d: int, *, reduction: int = 8, layers: str | Sequence[str] | None = None, residual: bool = True,
        block: Callable[[int], nn.Module] | None = None, h: int = 4, causal: bool = False, temperature: float = 0.1,
        device=None, dtype=None,
    ):  # fmt: skip
        _check_module("base", base)
        check_size("d", d)
        check_size("reduction", reduction)
        if d % reduction:
            raise ValueError(f"reduction must divide d = {d}, got {reduction}")
        for name, value in (("residual", residual), ("causal", causal)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
        if not isinstance(temperature, Real) or not temperature > 0:
            raise ValueError(f"temperature must be a positive number, got {temperature!r}")
        names, width, factory = _layer_names(base, layers), d // reduction, {"device": device, "dtype": dtype}
        block = partial(SideBlock, h=h, causal=causal, **factory) if block is None else block
        blocks = nn.ModuleList(block(width) for _ in names)
        super().__init__(base)  # freezes it, once nothing can be refused any more
        self.layers, self.d, self.residual, self.temperature = names, d, residual, float(temperature)
        self.down = nn.ModuleList(nn.Linear(d, width, **factory) for _ in range(len(names) + 1))
        self.blocks = blocks
        self._masked = ["mask" in inspect.signature(block.forward).parameters for block in blocks]
        self.norm, self.up = nn.LayerNorm(width, **factory), nn.Linear(width, d, **factory)
        self.alpha = nn.Parameter(torch.zeros(len(names), **factory))
        if residual:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    @torch.no_grad()
    def _run(self, args: tuple, kwargs: dict) -> tuple[object, list[Tensor]]:
        """What ``base`` puts out, and the hidden states: the input of the first layer and the output of each."""
        hidden, versions, ran = [], [], []

        def tap(state):
            hidden.append(state)
            # Inference tensors have no version, and to ask which they are would cut a compiled base into pieces.
            versions.append(None if torch.compiler.is_compiling() or state.is_inference() else state._version)

        def before(layer, args, kwargs):
            if _thread.taps is hidden and not hidden:
                tap(_first(args or kwargs, "the call of the first layer"))

        def after(name):
            def keep(layer, args, output):
                if _thread.taps is hidden:
                    ran.append(name)
                    tap(_first(output, name))

            return keep

        modules = [self.base.get_submodule(name) for name in self.layers]
        handles = [modules[0].register_forward_pre_hook(before, with_kwargs=True)]
        handles += [module.register_forward_hook(after(name)) for name, module in zip(self.layers, modules)]
        outer, _thread.taps = _thread.taps, hidden
        try:
            out = self.base(*args, **kwargs)
        finally:
            _thread.taps = outer
            for handle in handles:
                handle.remove()
        if ran != self.layers:
            raise RuntimeError(f"layers must each run once, in the order {self.layers}, got {ran}")
        for name, state, version in zip(["the first layer's input", *self.layers], hidden, versions):
            if version is not None and state._version != version:
                raise RuntimeError(f"base must not change in place what is tapped, got a change of that from {name}")
            if state.is_nested or state.shape[-1] != self.d:
                got = "a nested tensor" if state.is_nested else tuple(state.shape)
                raise ValueError(f"layers must put out (..., {self.d}), got {got} from {name}")
        return out, hidden

    def _mask(self, args: tuple, kwargs: dict) -> Tensor | None:
        """The mask of the tokens in the call of ``base``, if it has one as models of Hugging Face do."""
        try:
            call = inspect.signature(self.base.forward).bind_partial(*args, **kwargs).arguments
        except TypeError:
            return None  # base will say what is wrong with the call
        call = {**call, **call.get("kwargs", {})}
        past = call.get("past_key_values")
        if past is not None and (past.get_seq_length() if hasattr(past, "get_seq_length") else len(past)):
            raise ValueError("past_key_values must be empty: a side network has no cache; generate with use_cache=False")
        mask = call.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def forward(self, *args, side_mask: Tensor | None = None, **kwargs):
        """Call ``base`` with these arguments, then the side network.

        Args:
            side_mask: ``(b, t)``, True for the tokens that the blocks may see. None takes an argument ``attention_mask`` of
                ``base`` of that shape, where the call has one.

        Returns:
            What ``base`` does, with the new hidden states as its first tensor.
        """
        mask = self._mask(args, kwargs) if side_mask is None else side_mask
        out, hidden = self._run(args, kwargs)
        dtype = self.up.weight.dtype
        if not torch.is_autocast_enabled(hidden[0].device.type):
            hidden = [state.to(dtype) for state in hidden]
        x = self.down[0](hidden[0])
        gates = torch.sigmoid(self.alpha / self.temperature).unbind()
        for state, down, mu, block, masked in zip(hidden[1:], self.down[1:], gates, self.blocks, self._masked):
            read = down(state)
            x = read + mu * (x - read)
            x = block(x, mask=mask) if masked else block(x)
        first = _first(out, "base")
        y = self.up(self.norm(x)).to(first.dtype)
        if first.shape != y.shape:
            raise ValueError(f"base must put out hidden states {tuple(y.shape)}, got {tuple(first.shape)}")
        return _with_first(out, first + y if self.residual else y)

    def options(self) -> dict:
        """The constructor's arguments that decide what is computed."""
        causal = any(getattr(block, "causal", False) for block in self.blocks)
        return {"layers": self.layers, "residual": self.residual, "causal": causal, "temperature": self.temperature}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in {"d": self.d, **self.options()}.items())
