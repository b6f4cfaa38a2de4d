"""HyperFormer++: one small network generates the bottleneck adapters of every task, layer and position."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._leaf import BACKENDS
from ..ops.bottleneck import ACTIVATIONS, bottleneck
from .bottleneck import check_init_std, check_size
from .route import one_thread

NORMS = (None, "pre", "post")


class HyperWeights(NamedTuple):
    """The generated adapter of one place in the model; with ``adapter_ids`` a bank of them, one for a task.

    The fields are arguments of :func:`fastadapt.bottleneck`, but for ``norm_weight`` and ``norm_bias``, ``(d,)`` or ``(g, d)``:
    those belong to the LayerNorm after the up projection. That before the down projection is folded into the latter.
    """

    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor
    up_bias: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    adapter_ids: Tensor | None


Generated = tuple[tuple[HyperWeights, ...], ...]  # [layer][position]


class HyperAdapter(nn.Module):
    """Adapters of many tasks for a whole model, generated from embeddings of task, layer and position by one network.

    ``y = x + norm(act(x @ down.T + down_bias) @ up.T + up_bias)`` at each place, a position of a layer. Weights, biases and the
    LayerNorm's weight and bias are linear functions of ``LN(linear(relu(linear([task; layer; position]))))``. One product
    generates those of all places and tasks, once a step; every task more costs an embedding, and tasks learn from each other.
    A batch may mix tasks, also in training. Source: Karimi Mahabadi et al. 2021 (HyperFormer++).

    Three steps lead into a model: keep the ``HyperAdapter`` as a submodule, put ``hyper.site(layer, position)``, which has no
    parameters and is called as ``site(x, residual=None)``, where an adapter belongs, and run the model inside
    ``with hyper.use(adapter_ids):``. The generated weights are those of the block. With activation checkpointing, whose
    backward pass runs the sites again, ``backward()`` belongs into the block too, and ``use_reentrant=False``, since the
    reentrant kind walks through the generating network once a checkpoint. Without state: ``weights = hyper(adapter_ids)`` and
    ``hyper.adapt(x, weights[layer][position])``.

    A new ``HyperAdapter`` is the identity, exactly: the rows of ``generator.weight`` that make the LayerNorm's weight and bias
    (``norm="post"``) or the up projection start at zero. The rest starts as in the paper: embeddings from N(0, 1), linear
    layers from N(0, 0.01²) with zero biases.

    A generated weight is a sum of ``embedding`` terms that an optimizer such as Adam moves all at once: the network wants a
    learning rate some ten times smaller than adapters that are trained themselves.

    Keys of ``state_dict``: ``task_embeddings.<name>`` ``(embedding,)`` for each task; ``layer_embedding.weight``,
    ``position_embedding.weight``; of the network, ``condition.0``, ``condition.2`` (linear), ``condition.3`` (LayerNorm) and
    ``generator``, each with ``weight`` and ``bias``.

    Args:
        tasks: names of the tasks, or how many there are: those are called ``"0"``, ``"1"`` and so on.
        layers, d, r: number of layers, width of the model and of the bottlenecks.
        embedding, hidden: width of the embeddings and of the hidden layer of the network.
        positions: places for an adapter in a layer, for example after attention and after the feed-forward block.
        activation: as in :class:`BottleneckAdapter`.
        norm: ``"post"``, a LayerNorm after the up projection, the paper's choice; ``"pre"``, one before the down projection,
            whose generated weight is an offset from one; None, no norm. Those two run in one kernel.
        norm_eps: epsilon of that LayerNorm.
        init_std: start all linear layers from a normal distribution of this deviation, as the paper does with 0.01, instead of
            the identity.
        backend: as in :func:`fastadapt.bottleneck`; also an attribute.
        device, dtype: of the parameters. float32 parameters serve 16-bit activations too.
    """

    def __init__(
        self, tasks: int | Iterable[str], layers: int, d: int, r: int, *, embedding: int = 64, hidden: int = 128,
        positions: int = 2, activation: str = "gelu_tanh", norm: str | None = "post", norm_eps: float = 1e-5,
        init_std: float | None = None, backend: str | None = None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        sizes = {"layers": layers, "d": d, "r": r, "embedding": embedding, "hidden": hidden, "positions": positions}
        for name, value in sizes.items():
            check_size(name, value)
        for name, value, allowed in (
            ("activation", activation, tuple(ACTIVATIONS)), ("norm", norm, NORMS), ("backend", backend, (None, *BACKENDS)),
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        self.layers, self.d, self.r, self.embedding, self.hidden, self.positions = sizes.values()
        self.activation, self.norm, self.norm_eps, self.backend = activation, norm, norm_eps, backend
        self.init_std = check_init_std(init_std)
        factory = {"device": device, "dtype": dtype}
        self.layer_embedding = nn.Embedding(layers, embedding, **factory)
        self.position_embedding = nn.Embedding(positions, embedding, **factory)
        self.condition = nn.Sequential(
            nn.Linear(3 * embedding, hidden, **factory), nn.ReLU(), nn.Linear(hidden, embedding, **factory),
            nn.LayerNorm(embedding, **factory),
        )  # fmt: skip
        # In the order of HyperWeights.
        self._shapes = [(r, d), (d, r), (r,), (d,), *([(d,), (d,)] if norm else [])]
        self._widths = [torch.Size(shape).numel() for shape in self._shapes]
        self.generator = nn.Linear(embedding, sum(self._widths), **factory)
        self.task_embeddings = nn.ParameterDict()
        if isinstance(tasks, int):
            check_size("tasks", tasks)
            tasks = map(str, range(tasks))
        if isinstance(tasks, str) or not isinstance(tasks, Iterable):
            raise TypeError(f"tasks must be a number or a sequence of names, got {type(tasks).__name__}")
        for name in tasks:
            self._new_task(name)
        if not self.task_embeddings:
            raise ValueError("tasks must be a number or the names of at least one task, got none")
        self._weights: Generated | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew."""
        for embedding in (*self.task_embeddings.values(), self.layer_embedding.weight, self.position_embedding.weight):
            nn.init.normal_(embedding)
        for linear in (self.condition[0], self.condition[2], self.generator):
            nn.init.normal_(linear.weight, std=self.init_std or 1e-2)
            nn.init.zeros_(linear.bias)
        self.condition[3].reset_parameters()
        if self.init_std is None:
            parts = self.generator.weight.split(self._widths)
            for last in parts[4:] if self.norm == "post" else (parts[1], parts[3]):
                last.zero_()

    @property
    def names(self) -> list[str]:
        """The names of the tasks, in the order of their ids."""
        return list(self.task_embeddings)

    def _new_task(self, name: str) -> nn.Parameter:
        if name in self.names:
            raise ValueError(f"a task's name must be a new one, got {name!r}, which is among {self.names}")
        if not isinstance(name, str) or not name or "." in name or hasattr(self.task_embeddings, name):
            raise ValueError(f"a task's name must be a string that can be a key of a ParameterDict, got {name!r}")
        like = self.layer_embedding.weight
        self.task_embeddings[name] = nn.Parameter(like.new_empty(self.embedding))
        return self.task_embeddings[name]

    @torch.no_grad()
    def add_task(self, name: str, *, like: str | int | None = None, freeze: bool = False) -> int:
        """Add a task by a new embedding, the only parameter that it brings, and return its id.

        Args:
            name: a new one.
            like: the task whose embedding the new one starts as; None starts it as the mean of all.
            freeze: leave the new embedding alone trainable, so that no other task changes.
        """
        others = tuple(self.task_embeddings.values())
        start = torch.stack(others).mean(0) if like is None else others[self.task_id(like)]
        self._new_task(name).copy_(start)
        if freeze:
            self.requires_grad_(False)
            self.task_embeddings[name].requires_grad_(True)
        return len(others)

    def task_id(self, task: str | int) -> int:
        """The id of a task, by its name or by the id itself."""
        names = self.names
        if isinstance(task, str) and task in names:
            return names.index(task)
        if isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(names):
            return task
        raise ValueError(f"task must be one of {names} or an id from 0 to {len(names) - 1}, got {task!r}")

    def ids(self, tasks: Iterable[str | int | None]) -> Tensor:
        """``adapter_ids`` for a batch by the task of each row; None for no adapter."""
        ids = [-1 if task is None else self.task_id(task) for task in tasks]
        return torch.tensor(ids, dtype=torch.int64, device=self.generator.weight.device)

    def _select(self, adapter_ids: Tensor | str | int) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the tasks to generate for, and each row's place among them, None where all rows are of one task."""
        embeddings = tuple(self.task_embeddings.values())
        if isinstance(adapter_ids, str | int):
            return embeddings[self.task_id(adapter_ids)].unsqueeze(0), None
        if not isinstance(adapter_ids, Tensor) or adapter_ids.is_floating_point() or adapter_ids.dtype == torch.bool:
            got = adapter_ids.dtype if isinstance(adapter_ids, Tensor) else type(adapter_ids).__name__
            raise TypeError(f"adapter_ids must be an integer tensor, or a task for the whole batch, got {got}")
        n, lowest = len(embeddings), -1 if adapter_ids.dim() else 0
        if adapter_ids.is_cpu and adapter_ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(end) for end in adapter_ids.aminmax())
            if low < lowest or high >= n:
                wrong = low if low < lowest else high
                raise ValueError(f"adapter_ids must lie in [{lowest}, {n - 1}] for the tasks {self.names}, got {wrong}")
        embeddings = torch.stack(embeddings)
        if not adapter_ids.dim():
            return embeddings.index_select(0, adapter_ids.view(1)), None
        if adapter_ids.dim() == 1 and len(adapter_ids) < n:  # an adapter a row is less to generate than one a task
            known = (adapter_ids >= 0) & (adapter_ids < n)
            places = torch.arange(len(adapter_ids), device=adapter_ids.device)
            return embeddings[adapter_ids.long().clamp(0, n - 1)], torch.where(known, places, adapter_ids)
        return embeddings, adapter_ids

    def forward(self, adapter_ids: Tensor | str | int) -> Generated:
        """Generate the adapters of all places, to be found as ``weights[layer][position]``.

        Args:
            adapter_ids: integers from -1 (no adapter) to the number of tasks less one, one a sequence or one a token, as in
                :func:`fastadapt.bottleneck`; see :meth:`ids`. Or the name or id of the task of the whole batch, also as a 0-d
                tensor: then a site runs as one adapter and not as a bank.
        """
        # Elementwise, the residual stream keeps its dtype under autocast, and so must what is added to it.
        with torch.autocast(self.generator.weight.device.type, enabled=False):
            tasks, adapter_ids = self._select(adapter_ids)
            return self._generate(tasks, adapter_ids)

    def _generate(self, tasks: Tensor, adapter_ids: Tensor | None) -> Generated:
        grid = self.layers, self.positions, len(tasks), self.embedding
        layers, positions = self.layer_embedding.weight, self.position_embedding.weight
        parts = tasks.expand(grid), layers[:, None, None].expand(grid), positions[:, None].expand(grid)
        generated = self.generator(self.condition(torch.cat(parts, -1))).flatten(0, 1)
        single = adapter_ids is None
        # Contiguous, since the kernels of a GPU would copy what isn't, for each place and in both directions.
        down, up, down_bias, up_bias, *norm = (
            (part.squeeze(1) if single else part).unflatten(-1, shape).contiguous()
            for part, shape in zip(generated.split(self._widths, -1), self._shapes)
        )
        if self.norm == "pre":
            # down @ (xhat * (1 + w) + b) = (down * (1 + w)) @ xhat + down @ b
            weight, bias = (value.unsqueeze(-2) for value in norm)
            down, down_bias = torch.addcmul(down, down, weight), down_bias + (down * bias).sum(-1)
        values = [down, up, down_bias, up_bias, *(norm if self.norm == "post" else ())]
        # unlike that of indices, the backward pass of unbind makes one tensor for all places
        columns = [value.unbind() for value in values] + [(None,) * len(generated)] * (6 - len(values))
        sites = [HyperWeights(*weights, adapter_ids) for weights in zip(*columns)]
        return tuple(tuple(sites[i : i + self.positions]) for i in range(0, len(sites), self.positions))

    def adapt(self, x: Tensor, weights: HyperWeights, residual: Tensor | None = None) -> Tensor:
        """Adapt ``x`` ``(..., d)`` with the adapter of one place; ``residual`` takes the place of ``x`` in the sum."""
        residual = x if residual is None else residual
        down, up, down_bias, up_bias, norm_weight, norm_bias, ids = weights
        y = bottleneck(
            x, down, up, down_bias=down_bias, up_bias=up_bias, residual=None if self.norm == "post" else residual,
            activation=self.activation, norm_weight=down.new_ones(self.d) if self.norm == "pre" else None,
            norm_eps=self.norm_eps, adapter_ids=ids, backend=self.backend,
        )  # fmt: skip
        if self.norm != "post":
            return y
        norm_weight, norm_bias = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
        if ids is None:
            return (residual + F.layer_norm(y, (self.d,), norm_weight, norm_bias, self.norm_eps)).to(x.dtype)
        rows = ids.long().clamp(-1, len(norm_weight) - 1)  # the kernel has judged the ids; -1 takes the row of zeros
        norm_weight, norm_bias = (
            F.pad(value, (0, 0, 0, 1))[rows].view(rows.shape + (1,) * (x.dim() - 1 - rows.dim()) + (self.d,))
            for value in (norm_weight, norm_bias)
        )
        return torch.addcmul(residual + norm_bias, norm_weight, F.layer_norm(y, (self.d,), eps=self.norm_eps)).to(x.dtype)

    @contextmanager
    def use(self, adapter_ids: Tensor | str | int | Generated) -> Iterator[Generated]:
        """Inside ``with hyper.use(adapter_ids):`` the sites run with what :meth:`forward` generates for these ids, once, or
        with what it has generated before: for a task that is served, once and for all. One thread at a time, as in
        :func:`route`."""
        with one_thread([self]):
            before = self.set_ids(adapter_ids)
            try:
                yield self._weights
            finally:
                self._weights = before

    def set_ids(self, adapter_ids: Tensor | str | int | Generated | None) -> Generated | None:
        """What :meth:`use` does, until the next call; None: the sites have no weights. Returns what the sites had before."""
        before = self._weights
        generated = isinstance(adapter_ids, tuple) and all(isinstance(layer, tuple) for layer in adapter_ids)
        self._weights = adapter_ids if generated or adapter_ids is None else self(adapter_ids)
        return before

    def site(self, layer: int, position: int = 0) -> "HyperSite":
        """A module without parameters that adapts its input at this place of the model."""
        for name, value, end in (("layer", layer, self.layers), ("position", position, self.positions)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if not 0 <= value < end:
                raise IndexError(f"{name} must lie in [0, {end - 1}], got {value}")
        return HyperSite(self, layer, position)

    def options(self) -> dict:
        """The constructor's arguments that decide what is computed and don't show in the shapes of the parameters; the tasks in
        the order of their ids."""
        return {"tasks": self.names, "activation": self.activation, "norm": self.norm, "norm_eps": self.norm_eps}

    def extra_repr(self) -> str:
        sizes = f"layers={self.layers}, positions={self.positions}, d={self.d}, r={self.r}"
        return f"tasks={self.names}, {sizes}, activation={self.activation!r}, norm={self.norm!r}"


class HyperSite(nn.Module):
    """One place of a :class:`HyperAdapter` in a model; made by its method ``site``, called like an adapter."""

    def __init__(self, hyper: HyperAdapter, layer: int, position: int):
        super().__init__()
        self._owner = (hyper,)  # in a tuple it isn't a submodule, whose parameters each site would repeat
        self.layer, self.position = layer, position

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Adapt ``x`` ``(..., d)``; ``residual`` of the same shape takes the place of ``x`` as what the branch is added to."""
        (hyper,) = self._owner
        if hyper._weights is None:
            raise RuntimeError(
                f"the site of layer {self.layer}, position {self.position} has no weights: run the model, and with activation "
                "checkpointing its backward pass, inside `with hyper.use(adapter_ids):`"
            )
        return hyper.adapt(x, hyper._weights[self.layer][self.position], residual)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, position={self.position}"
