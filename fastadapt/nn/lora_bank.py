"""Many LoRA adapters of one frozen layer in one batch: every row goes through the adapter that its id names."""

import torch
from torch import Tensor, nn

from ..ops.lora_linear import lora_linear
from .bottleneck import check_size
from .lora import Beside, LoRALinear, adapter_dtype, check_options, leave_fast_path, linear_sizes
from .route import Routed


class LoRABank(Beside, Routed):
    """A frozen linear layer and ``g`` slots for LoRA adapters, chosen per row by ``adapter_ids``, for training and inference.

    Row ``j`` of the output is what the :class:`LoRALinear` in slot ``adapter_ids[j]`` gives for row ``j`` of ``x``; a row of id
    -1, or of a slot that is free, gets what ``base`` computes. All rows run in one call of :func:`fastadapt.lora_linear`,
    whatever the mixture. Ranks and alphas may differ: a smaller rank is filled up with zeros, which is exact and stays so in
    training. A new bank is empty; :meth:`add`, :meth:`remove` and :meth:`replace` change the parameters in place, so that
    nothing is compiled anew. An optimizer doesn't see that: what it keeps of a slot, such as Adam's moments, is to be zeroed
    there, or it moves the new adapter as the one before, what was filled up too, which :meth:`adapter` cuts off. DoRA has no
    banks.

    Parameters: ``lora_A`` ``(g, r, k)``, ``lora_B`` ``(g, n, r)`` and, by option, ``lora_bias`` ``(g, n)``. ``state_dict`` also
    holds ``scale`` ``(g,)``, float32 whatever the module is cast to, and ``ranks`` ``(g,)``, which is 0 for a free slot.

    Args:
        base: as in :class:`LoRALinear`. It is frozen and kept, not copied.
        g: number of slots.
        r: the largest rank of an adapter.
        dropout: probability that an element of the input of ``lora_A`` is dropped in training, whatever that of an adapter
            was when it came.
        lora_bias: a bias for each adapter, which costs a pass over the output.
        check_ids: refuse ids outside the bank on a GPU too, where looking at them stalls its stream; also an attribute.
        backend, dtype: as in :class:`LoRALinear`.
    """

    def __init__(
        self, base: nn.Module, g: int, r: int = 8, *, dropout: float = 0.0, lora_bias: bool = False, check_ids: bool = False,
        backend: str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        check_size("g", g)
        check_options(r, 1.0, dropout, backend, lora_bias=lora_bias, check_ids=check_ids)
        super().__init__()
        self._transposed, self.k, self.n = linear_sizes(base)
        self.base = base.requires_grad_(False)
        leave_fast_path(base)
        self.g, self.r, self.dropout, self.check_ids, self.backend = g, r, float(dropout), check_ids, backend
        device = base.weight.device

        def stack(*shape):
            return nn.Parameter(torch.zeros(g, *shape, device=device, dtype=adapter_dtype(base.weight, dtype)))

        self.lora_A, self.lora_B = stack(r, self.k), stack(self.n, r)
        self.lora_bias = stack(self.n) if lora_bias else None
        self.register_buffer("scale", torch.zeros(g, device=device, dtype=torch.float32))
        self.register_buffer("ranks", torch.zeros(g, device=device, dtype=torch.int64))
        self.train(base.training)

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # 16 bits of a scale would move every output
            self.scale = scale.to(self.scale.device)
        return self

    @property
    def slots(self) -> list[int]:
        """The slots that hold an adapter."""
        return self.ranks.nonzero().flatten().tolist()

    def forward(self, x: Tensor, adapter_ids: Tensor | None = None) -> Tensor:
        """``(..., k)`` to ``(..., n)``.

        Args:
            x: ``(..., k)``.
            adapter_ids: integers from -1 (no adapter) to ``g - 1``, one for each entry of the leading dim of ``x`` (a
                sequence) or of all its leading dims (a token). None: those of :func:`route`.
        """
        return lora_linear(
            x, self.base.weight.T if self._transposed else self.base.weight, self.base.bias, self.lora_A, self.lora_B,
            scale=self.scale.double() if self.lora_A.dtype == torch.float64 else self.scale,
            dropout_p=self.dropout if self.training else 0.0, lora_bias=self.lora_bias, adapter_ids=self._chosen(adapter_ids),
            check_ids=self.check_ids, backend=self.backend,
        )  # fmt: skip

    def _index(self, slot: int, used: bool = False) -> int:
        if not isinstance(slot, int) or isinstance(slot, bool):
            raise TypeError(f"slot must be an integer, got {type(slot).__name__}")
        if not 0 <= slot < self.g:
            raise IndexError(f"slot must lie in [0, {self.g - 1}] for a bank of {self.g}, got {slot}")
        if used and not self.ranks[slot]:
            raise ValueError(f"slot must be one of {self.slots}, which hold an adapter, got {slot}")
        return slot

    def _check(self, adapter: LoRALinear) -> None:
        if not isinstance(adapter, LoRALinear):
            raise TypeError(f"adapter must be a LoRALinear, got {type(adapter).__name__}")
        sizes = adapter.lora_B.out_features, adapter.lora_A.in_features
        if sizes != (self.n, self.k):
            raise ValueError(f"adapter must be one of an {(self.n, self.k)} weight like that of the bank, got {sizes}")
        if adapter.r > self.r:
            raise ValueError(f"adapter must have a rank of at most {self.r}, the bank's, got {adapter.r}")
        if adapter.magnitude is not None:
            raise ValueError("adapter must have dora=False in a bank, got True")
        if adapter.lora_B.bias is not None and self.lora_bias is None:
            raise ValueError("adapter must have lora_bias=False like the bank, got True")

    @torch.no_grad()
    def _clear(self, slot: int) -> None:
        for tensor in (self.lora_A, self.lora_B, self.lora_bias, self.scale, self.ranks):
            if tensor is not None:
                tensor[slot].zero_()

    def add(self, adapter: LoRALinear) -> int:
        """Copy ``adapter`` into the first slot that is free, and return that slot. Its ``base`` isn't looked at."""
        self._check(adapter)
        free = (self.ranks == 0).nonzero().flatten().tolist()
        if not free:
            raise RuntimeError(f"add: all {self.g} slots are in use; remove() or replace() an adapter")
        return self.replace(free[0], adapter)

    def remove(self, slot: int) -> None:
        """Free ``slot``."""
        self._clear(self._index(slot, used=True))

    @torch.no_grad()
    def replace(self, slot: int, adapter: LoRALinear) -> int:
        """Copy ``adapter`` into ``slot``, whatever that holds, and return it."""
        self._check(adapter)
        self._clear(self._index(slot))
        r = adapter.r
        self.lora_A[slot, :r] = adapter.lora_A.weight
        self.lora_B[slot, :, :r] = adapter.lora_B.weight
        if adapter.lora_B.bias is not None:
            self.lora_bias[slot] = adapter.lora_B.bias
        self.scale[slot], self.ranks[slot] = adapter.scale, r
        return slot

    @torch.no_grad()
    def adapter(self, slot: int) -> LoRALinear:
        """Copy the adapter in ``slot`` out of the bank, for use alone. Its ``base`` is that of the bank, and its ``alpha`` is
        ``scale * r``, whatever the two were made of."""
        r, scale = int(self.ranks[self._index(slot, used=True)]), float(self.scale[slot])
        adapter = LoRALinear(
            self.base, r, alpha=scale * r, dropout=self.dropout, lora_bias=self.lora_bias is not None, backend=self.backend,
            dtype=self.lora_A.dtype,
        )  # fmt: skip
        adapter.scale = scale
        adapter.lora_A.weight.copy_(self.lora_A[slot, :r])
        adapter.lora_B.weight.copy_(self.lora_B[slot, :, :r])
        if self.lora_bias is not None:
            adapter.lora_B.bias.copy_(self.lora_bias[slot])
        return adapter.train(self.training)

    def extra_repr(self) -> str:
        return f"g={self.g}, r={self.r}, dropout={self.dropout}, lora_bias={self.lora_bias is not None}"
