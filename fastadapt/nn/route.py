"""Which adapter serves which row of a batch, said once for all modules of a model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


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
    layers again in the backward pass, which then belongs into the context.

    Args:
        model: a model that contains such modules.
        ids: as ``adapter_ids`` of the modules: integers, -1 for no adapter, one for each sequence or, where the modules take
            that, for each token. None: none are set.

    Raises:
        ValueError: no module of ``model`` takes ids.
    """
    takers = [module for module in model.modules() if hasattr(module, "set_ids")]
    if not takers:
        raise ValueError(f"model must have a module that takes ids, such as an AdapterBank; {type(model).__name__} has none")
    with ExitStack() as stack:
        for module in takers:
            stack.callback(module.set_ids, module.set_ids(ids))
        yield
