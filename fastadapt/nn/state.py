"""Adapters alone in a file of safetensors: what is small, trained, and of use with the frozen model that others have too."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .freeze import _BESIDE_A_BASE, KINDS, named
from .lora import Merging
from .prefix import PrefixAttention

VERSION = 1  # of what the metadata says
SHOWN = 5  # differences that an error names


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("files of adapters need the package safetensors: pip install safetensors") from None
    return safetensors


def _options(module: nn.Module) -> dict:
    """What decides on the result of an adapter and doesn't show in the shapes of its parameters, as JSON gives it back."""
    if callable(options := getattr(module, "options", None)):
        options = options()
    else:
        scale = getattr(module, "scale", None)
        options = {"scale": scale} if isinstance(scale, float) else {}
    return json.loads(json.dumps(options, default=str))


class _Contents:
    """The adapters of a model: their tensors by the names of ``state_dict``, and their types and options."""

    def __init__(self, model: nn.Module):
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, dict] = {}
        self._types = tuple(kind for kinds in KINDS.values() for kind in kinds)
        self._walk(model, "", False)

    def _walk(self, module: nn.Module, name: str, inside: bool) -> None:
        if isinstance(module, Merging) and module.merged:
            raise RuntimeError(f"{name or 'the model'} is merged: unmerge() it first, files hold no frozen weights")
        inside |= isinstance(module, self._types)
        if isinstance(module, (*self._types, PrefixAttention)):  # which is frozen, but its ids mean what is in it
            self.modules[name] = {"type": type(module).__name__, "options": _options(module)}
        prefix = f"{name}." if name else ""
        if inside:
            own = {**module._parameters, **module._buffers}
            kept = {key: t for key, t in own.items() if t is not None and key not in module._non_persistent_buffers_set}
            self.tensors.update((prefix + key, t) for key, t in kept.items())
        for key, child in module._modules.items():
            if child is not None:
                frozen = key == "base" and isinstance(module, _BESIDE_A_BASE)
                self._walk(child, prefix + key, inside and not frozen)


def _first_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """For each name the first one that the same tensor has: its own, unless modules share it."""
    first = {}
    return {name: first.setdefault(id(t), name) for name, t in tensors.items()}


def save_adapters(model: nn.Module, path: str | os.PathLike, *, extra: str | Iterable[str] = ()) -> list[str]:
    """Write the adapters of a model, by the types of its modules, to a file of safetensors.

    The file holds their parameters and buffers under the names of ``model.state_dict()``, a shared one once, and none of the
    frozen layers. It appears under ``path`` when it is complete, in the place of one that was there.

    Args:
        model: a module that contains adapters. Merged ones have to be unmerged.
        path: of the file; its folder must exist.
        extra: names of other parameters, buffers or submodules that were trained, or patterns, as in :func:`freeze_except`;
            for example ``"classifier"`` or the keys of what that returns.

    Returns:
        The names of what was saved.
    """
    safetensors = _safetensors()
    contents = _Contents(model)
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    meant = named(extra, state) - contents.tensors.keys()
    added = {name: t for name, t in state.items() if name in meant}
    tensors = {**contents.tensors, **added}
    if not tensors:
        raise ValueError(f"model must have adapters, or extra names, got none in {type(model).__name__}")
    if meta := [name for name, t in tensors.items() if t.is_meta]:
        raise ValueError(f"model must have values, got {meta[0]!r} on the meta device")
    first = _first_names(tensors)
    stored = {name: t for name, t in tensors.items() if first[name] == name}
    about = {
        "modules": contents.modules,
        "shared": {name: owner for name, owner in first.items() if name != owner},
        "extra": sorted(added),
    }
    metadata = {"format": "pt", "fastadapt": str(VERSION), **{key: json.dumps(value) for key, value in about.items()}}
    # Copies, since safetensors refuses views of one storage, such as the parameters of a flattened model.
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in stored.items()}
    data = safetensors.torch.save(copies, metadata)
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        complete = Path(folder) / path.name
        with complete.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        complete.replace(path)
    return list(tensors)


def _read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a file under all their names, and what it says about them."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} must be a file of safetensors: {error}") from None
    if metadata.get("fastadapt") != str(VERSION):
        got = f"version {metadata['fastadapt']}" if "fastadapt" in metadata else "a file of something else"
        raise ValueError(f"{path} must be a file of save_adapters, version {VERSION}, got {got}")
    about = {key: json.loads(metadata[key]) for key in ("modules", "shared", "extra")}
    tensors.update({name: tensors[owner] for name, owner in about["shared"].items()})
    return tensors, about


def _groups(tensors: dict[str, Tensor]) -> dict[str, set[str]]:
    """For each name all names of the same tensor."""
    first, groups = _first_names(tensors), {}
    for name, owner in first.items():
        groups.setdefault(owner, set()).add(name)
    return {name: groups[owner] for name, owner in first.items()}


def _differences(file: dict[str, Tensor], about: dict, model: dict[str, Tensor], modules: dict, cast: bool) -> Iterator[str]:
    """What keeps the tensors of a file from the places they have in a model, in words."""
    for name in about["modules"].keys() & modules.keys():
        theirs, mine = about["modules"][name], modules[name]
        called = name or "the model"
        if theirs["type"] != mine["type"]:
            yield f"{called} is a {theirs['type']} in the file, a {mine['type']} in the model"
            continue
        for option in sorted(theirs["options"]):  # of others the file knows nothing
            values = [side["options"].get(option) for side in (theirs, mine)]
            if values[0] != values[1]:
                yield f"{called} has {option}={values[0]!r} in the file, {option}={values[1]!r} in the model"
    yield from (f"{name} is missing in the file" for name in model if name not in file)
    yield from (f"{name} is not in the model" for name in file if name not in model)
    shared = _groups(file), _groups(model)
    for name, mine in model.items():
        if name not in file:
            continue
        theirs = file[name]
        if theirs.shape != mine.shape:
            yield f"{name} is {tuple(theirs.shape)} in the file, {tuple(mine.shape)} in the model"
        elif theirs.dtype != mine.dtype and not (cast and theirs.is_floating_point() and mine.is_floating_point()):
            yield f"{name} is {theirs.dtype} in the file, {mine.dtype} in the model"
        elif mine.is_meta:
            yield f"{name} is on the meta device in the model"
        alone = [group[name] & file.keys() & model.keys() for group in shared]
        if alone[0] != alone[1] and name == min(alone[0] | alone[1]):
            with_whom = [" and ".join(sorted(group - {name})) or "none" for group in alone]
            yield f"{name} is one tensor with {with_whom[0]} in the file, with {with_whom[1]} in the model"


@torch.no_grad()
def load_adapters(model: nn.Module, path: str | os.PathLike, *, cast: bool = False) -> list[str]:
    """Copy what :func:`save_adapters` has written into a model with the same adapters.

    The parameters stay those that they are, with their devices and ``requires_grad``. Everything is checked before the first
    is changed: names, types and options of the adapters, shapes, dtypes, and which of them share a tensor. The frozen model is
    not looked at.

    Args:
        model: of the structure that the saved one had, adapters and what ``extra`` named.
        path: of the file.
        cast: convert floating values to the dtype that the parameter has; otherwise another dtype is refused.

    Returns:
        The names of what was loaded.

    Raises:
        ValueError: the file doesn't fit; says where, and has changed nothing.
    """
    tensors, about = _read(path)
    contents = _Contents(model)
    state = model.state_dict(keep_vars=True)
    places = {**contents.tensors, **{name: state[name] for name in about["extra"] if name in state}}
    if differences := list(_differences(tensors, about, places, contents.modules, cast)):
        shown = "; ".join(differences[:SHOWN])
        more = len(differences) - SHOWN
        raise ValueError(f"{path} must fit the model, got {shown}{f'; and {more} more differences' if more > 0 else ''}")
    owners = [name for name, owner in _first_names(places).items() if name == owner]
    for name in owners:
        places[name].copy_(places[name].clone())  # PyTorch refuses what can't be written to before anything is changed
    for name in owners:
        places[name].copy_(tensors[name])
    return list(places)
