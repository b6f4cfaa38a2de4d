"""Every configuration that a launcher can pick: the tables of tiles in kernels/, and launchers made to take a given tile."""

import contextlib
import importlib
import pkgutil

import fastadapt.kernels
from fastadapt.kernels._common import Tiles


def tables() -> dict[str, Tiles]:
    """The tables of all kernels by name."""
    names = [m.name for m in pkgutil.iter_modules(fastadapt.kernels.__path__)]
    return {
        f"{name}.{attribute}": value
        for name in names
        for attribute, value in vars(importlib.import_module(f"fastadapt.kernels.{name}")).items()
        if isinstance(value, Tiles)
    }


@contextlib.contextmanager
def taken(place: int | None = None):
    """Inside, launchers take the tile at ``place`` of their tables (the last tile where there are fewer) whatever the call is;
    None leaves the choice to them. Yields the set of ``(table name, key, place)`` that were taken."""
    names = {id(table): name for name, table in tables().items()}
    stock, seen = Tiles.pick, set()

    def pick(table, key, suits):
        tiles = table[key]
        tile = stock(table, key, suits) if place is None else tiles[min(place, len(tiles) - 1)]
        seen.add((names[id(table)], key, tiles.index(tile)))
        return tile

    Tiles.pick = pick
    try:
        yield seen
    finally:
        Tiles.pick = stock


def entries() -> set:
    """Every ``(table name, key, place)`` that exists."""
    return {(name, key, i) for name, table in tables().items() for key, tiles in table.items() for i in range(len(tiles))}
