"""Memory as the strict interpreter sees it: what a program may touch, which accesses race, and what was written.

Every tensor argument of a launch gets an address space of its own, so that no overrun can land in another argument. Races
are tracked by real address, so that arguments which share memory are seen to do so.
"""

import numpy as np

# An address is the number of an argument, counted from 1, above this bit; the tensor begins in the middle of what is below.
_WINDOW = 44
_CONFLICTS = {"load": ("store", "atomic"), "store": ("load", "store", "atomic"), "atomic": ("load", "store")}


class BoundsError(AssertionError):
    """An enabled lane points to something that is no element of the tensor it started from."""


class RaceError(AssertionError):
    """The result depends on the order in which programs or lanes run."""


def _dims(tensor):
    """``(stride, size)`` of the dims that an address depends on, outermost first, what is contiguous merged into one."""
    if not tensor.numel():
        return [(1, 0)]
    merged, reach = [], 0
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride()) if n > 1 and s):
        if stride <= reach:  # elements overlap: only the first and the last one bound them
            return [(1, 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())))]
        if merged and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = merged[-1][0], merged[-1][1] * size
        else:
            merged.append((stride, size))
        reach += (size - 1) * stride
    return merged[::-1]


class Argument:
    """A tensor argument, or a tensor without memory, in place of which the kernel gets this."""

    def __init__(self, number, name, tensor):
        self.name, self.dtype, self.item, self.tensor = name, tensor.dtype, tensor.element_size(), tensor
        self.real = None if tensor.is_meta else tensor.data_ptr()
        start = tensor.storage_offset() * self.item if tensor.is_meta else self.real
        self.base = (number << _WINDOW) + (1 << _WINDOW - 1) + start % 4096  # a tensor keeps its alignment
        self.dims = _dims(tensor)
        self.bytes = (1 + sum((size - 1) * stride for stride, size in self.dims)) * self.item
        self.region, self.reached = None, 0  # how many bytes from its start on hold all that was stored

    def data_ptr(self):
        return self.base

    def element_size(self):
        return self.item

    def holds(self, offsets):
        """Which of these distances in bytes from the first element lie in an element of the tensor."""
        rest, inside = offsets // self.item, np.ones(offsets.shape, bool)
        for stride, size in self.dims:
            index = rest if stride == 1 else rest // stride
            inside &= (index >= 0) & (index < size)
            rest = rest - index * stride
        return inside & (rest == 0)

    def misses(self, offsets, width):
        """Which accesses of ``width`` bytes are not wholly in elements of the tensor, or not aligned."""
        inside = self.holds(offsets)
        if width != self.item:
            inside &= self.holds(offsets + (width - 1))
        return ~inside | ((offsets + self.base) % width != 0)


def _distinct(elements):
    """Whether no element occurs twice. A tile in the order of memory needs no sorting."""
    return (elements[1:] > elements[:-1]).all() or np.unique(elements).size == elements.size


class Region:
    """Memory that one argument, or several overlapping ones, cover, and which program touched what of it."""

    def __init__(self, argument):
        self.name, self.item, self.start = argument.name, argument.item, argument.real
        self.end = argument.real + argument.bytes
        self.touched = {}
        self.unseen = []  # what the running program stored since its last barrier

    def absorb(self, argument):
        self.name, self.item = f"{self.name}/{argument.name}", min(self.item, argument.item)
        self.end = max(self.end, argument.real + argument.bytes)

    def log(self, program, addresses, width, kind, ordered):
        """Note an access by ``program``, counted from 1. ``ordered``: an atomic whose result depends on the order."""
        elements = (addresses - self.start) // self.item
        if width > self.item:
            elements = (elements[:, None] + np.arange(width // self.item)).ravel()
        for other in (*_CONFLICTS[kind], *(("atomic",) if ordered else ())):
            if other in self.touched:
                seen = self.touched[other][elements]
                self._raise_if((seen != 0) & (seen != program), elements, program, kind, f"another program's {other}")
        if kind == "load" and self.unseen:
            self._raise_if(np.isin(elements, np.concatenate(self.unseen)), elements, program, kind, "a store before a barrier")
        if (kind == "store" or ordered) and not _distinct(elements):
            raise RaceError(f"{kind} by program {program - 1} writes an element of {self.name} from several lanes")
        if kind == "store":
            self.unseen.append(elements)
        if kind not in self.touched:
            self.touched[kind] = np.zeros(-(-(self.end - self.start) // self.item), np.int32)
        seen = self.touched[kind][elements]
        self.touched[kind][elements] = np.where((seen == 0) | (seen == program), program, -1)  # -1: several programs

    def _raise_if(self, wrong, elements, program, kind, what):
        if wrong.any():
            at = int(elements[np.argmax(wrong)])
            raise RaceError(f"{kind} by program {program - 1} races with {what}, at element {at} of {self.name}")


class Memory:
    """The tensor arguments of one launch."""

    def __init__(self):
        self.arguments, self.regions = [], []

    def add(self, name, tensor):
        self.arguments.append(Argument(len(self.arguments) + 1, name, tensor))
        return self.arguments[-1]

    def merge(self):
        """Find out which arguments share memory."""
        real = [a for a in self.arguments if a.real is not None and a.tensor.numel()]
        for argument in sorted(real, key=lambda a: a.real):
            if self.regions and argument.real < self.regions[-1].end:
                self.regions[-1].absorb(argument)
            else:
                self.regions.append(Region(argument))
            argument.region = self.regions[-1]

    def access(self, builder, pointers, mask, kind, ordered=False):
        """Check an access. Returns the real addresses of its lanes and which of them are enabled and have memory."""
        shape, addresses, mask = pointers.data.shape, pointers.data.ravel(), np.asarray(mask)
        lanes = np.flatnonzero(mask if mask.shape == shape else np.broadcast_to(mask, shape))
        real, backed = np.zeros(addresses.size, np.uint64), np.zeros(addresses.size, bool)
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        x, y, z = builder.grid_idx
        program = 1 + x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)
        owners = (addresses[lanes] >> np.uint64(_WINDOW)).astype(np.int64)
        alone = owners.size and (owners == owners[0]).all()
        for owner in owners[:1] if alone else np.unique(owners):
            here = lanes if alone else lanes[owners == owner]
            if not 0 < owner <= len(self.arguments):
                raise BoundsError(f"{kind} by program {builder.grid_idx} at {addresses[here[0]]:#x}, which is in no argument")
            argument = self.arguments[owner - 1]
            offsets = (addresses[here] - np.uint64(argument.base)).astype(np.int64)
            wrong = argument.misses(offsets, width)
            if wrong.any():
                raise BoundsError(
                    f"{kind} by program {builder.grid_idx} of {width} bytes at byte {offsets[np.argmax(wrong)]} of "
                    f"{argument.name}, a {tuple(argument.tensor.shape)} {argument.dtype} with strides "
                    f"{tuple(argument.tensor.stride())}; {int(wrong.sum())} of {wrong.size} lanes are outside"
                )
            if kind != "load":
                argument.reached = max(argument.reached, int(offsets.max()) + width)
            if argument.real is not None:
                argument.region.log(program, offsets + argument.real, width, kind, ordered)
                real[here], backed[here] = (offsets + argument.real).astype(np.uint64), True
        return real.reshape(shape), backed.reshape(shape)

    def barrier(self):
        """Also called at the start of every program."""
        for region in self.regions:
            region.unseen = []

    def stores(self):
        """``(start, item, which elements were written)`` of every region that was."""
        for region in self.regions:
            written = [region.touched[kind] != 0 for kind in ("store", "atomic") if kind in region.touched]
            if written:
                yield region.start, region.item, np.logical_or.reduce(written)


def unwritten(tensor, stores):
    """How many elements of ``tensor`` no launch has stored; None if none stored to it at all."""
    item, offsets = tensor.element_size(), np.zeros((), np.int64)
    for size, stride in zip(tensor.shape, tensor.stride()):
        offsets = offsets[..., None] + np.arange(size) * stride
    addresses = tensor.data_ptr() + item * offsets.ravel()
    done, touched = np.zeros(addresses.size, bool), False
    for start, width, written in stores:
        here = (addresses >= start) & (addresses < start + width * written.size)
        if here.any():
            touched |= written[(addresses[here] - start) // width].any()
            done[here] |= written[(addresses[here] - start) // width]
    return int((~done).sum()) if touched else None


def unreached(arguments):
    """The names of those that were stored to, of whose tensors no store reached the last element."""
    names, reached = {}, {}
    for a in arguments:
        tensor = a.tensor.untyped_storage()._cdata, a.tensor.storage_offset(), a.bytes
        if a.reached:
            names[tensor], reached[tensor] = a.name, max(reached.get(tensor, 0), a.reached)
    return [name for tensor, name in names.items() if reached[tensor] < tensor[-1]]


def poison(dtype, shape, shift):
    """What lanes hold that are masked off without ``other``: NaN and huge numbers of both signs, by turns, since a sum
    shows the one and a maximum only the other. Integers lie outside any small tensor, and overflow no product with a stride.
    """
    if dtype.kind in "iub":
        large = {1: 113, 2: 30_011}.get(dtype.itemsize, (1 << 20) + 7)
        kinds = [True, False] if dtype.kind == "b" else [large, -large] if dtype.kind == "i" else [large]
    else:
        large = {"e": 6e4, "d": 1e300}.get(dtype.char, 3e38)
        kinds = [np.nan, large, -large]
    return np.resize(np.roll(np.array(kinds), shift), shape).astype(dtype)
