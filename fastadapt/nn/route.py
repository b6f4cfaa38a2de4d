"""Which adapter serves which row of a batch, said once for all modules of a model."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

_lock = threading.Lock()
_threads: dict[nn.Module, int] = {}  # which thread has set the ids of a module, for those that a context has set


@contextmanager
def one_thread(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Refuse a thread that would set the ids of ``modules`` inside of the context of another one.

    They can't be kept for each thread: on a GPU the backward pass, which checkpointing has run layers again, is one of its own.
    """
    if torch.compiler.is_compiling():  # ids that are set in a graph stay in it
        yield
        return
    here = threading.get_ident()
    with _lock:
        if any(_threads.get(module, here) != here for module in modules):
            raise RuntimeError("the model is inside another thread's `route` or `use`: one at a time, or a model for each")
        outermost = [module for module in modules if module not in _threads]
        _threads.update(dict.fromkeys(outermost, here))
    try:
        yield
    finally:
        for module in outermost:
            del _threads[module]


class Routed(nn.Module):
    """What has many adapters and takes ``adapter_ids``: those of the call, or those set here for all calls."""

    _ids: Tensor | None = None

    def set_ids(self, ids: Tensor | None) -> Tensor | None:
        """Use ``ids`` in calls that give none; None: there are none. Returns what was set before. See :func:`route`."""
        before, self._ids = self._ids, ids
        return before

    def _chosen(self, adapter_ids: Tensor | None) -> Tensor:
        adapter_ids = self._ids if adapter_ids is None else adapter_ids
        if adapter_ids is None:
            raise ValueError("adapter_ids must be given, or set for the whole model by fastadapt.nn.route, got None")
        return adapter_ids


@contextmanager
def route(model: nn.Module, ids: Tensor | None) -> Iterator[None]:
    """Within the context, row ``j`` of a batch goes through adapter ``ids[j]`` of every module of ``model`` that has several.

    These are the modules with a method ``set_ids``, for example :class:`AdapterBank`, :class:`LoRABank` and
    :class:`PrefixAttention`, wherever they lie in ``model``, which is called as ever. Ids that a call gives itself come first.
    Contexts may be nested: what was set before is set again at the end, after an exception too. Activation checkpointing runs
    layers again in the backward pass, which then belongs into the context. One thread at a time: what is set holds for calls
    from all threads, and another thread that enters a context of its own meanwhile is refused.

    Args:
        model: a model that contains such modules.
        ids: as ``adapter_ids`` of the modules: integers, -1 for no adapter, one for each sequence or, where the modules take
            that, for each token. None: none are set. A sequence is an entry of the leading dim of what a module reads: where
            tokens come first (``batch_first=False``), or all in one dim (OPT in feed-forward blocks), ids are those of tokens.

    Raises:
        ValueError: no module of ``model`` takes ids.
        RuntimeError: another thread is inside such a context with one of these modules.
    """
    takers = [module for module in model.modules() if hasattr(module, "set_ids")]
    if not takers:
        raise ValueError(f"model must have a module that takes ids, such as an AdapterBank; {type(model).__name__} has none")
    with one_thread(takers), ExitStack() as stack:
        for module in takers:
            stack.callback(module.set_ids, module.set_ids(ids))
        yield
