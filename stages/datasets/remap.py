"""``prepare.remap``: merging, renaming and dropping the classes of any data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from stages.common.errors import ConfigError
from stages.data.images import VOID, read_bytes
from stages.data.manifest import Classes, Pair
from stages.data.masks import decode_mask
from stages.datasets.class_list import VOID_NAMES
from stages.datasets.layout import DatasetLayout

KEY = "prepare.remap"


def remap_classes(layout: DatasetLayout, remap: Mapping[str, str | None]) -> DatasetLayout:
    """Return a data set with other classes.

    All names are replaced at once: with ``{a: b, b: c}`` the old ``a`` becomes ``b``. Classes of
    one new name are one class. The order is that of the old classes.

    Parameters
    ----------
    layout
        The data set.
    remap
        New name by old name or index. A new name may be an index, too, for the class of this
        index. None, and a name such as ``void``, makes the pixels void.

    Raises
    ------
    ConfigError
        When an old name is unknown or named twice, or no class is left.
    """
    old = layout.classes
    targets: dict[int, str | None] = {}
    for name, new in remap.items():
        index = _index(name, old)
        if index is None:
            known = ", ".join(f"{number} {name}" for number, name in enumerate(old.names))
            message = f"there is no class {name!r}; the classes are {known}"
            raise ConfigError(KEY, message, expected=old.names, actual=name)
        if index in targets:
            message = f"names the class {old.names[index]!r} twice, by name and by index"
            raise ConfigError(KEY, message, actual=name)
        targets[index] = _new_name(new, old)
    renamed = [targets.get(index, name) for index, name in enumerate(old.names)]
    names = [name for name in dict.fromkeys(renamed) if name is not None]
    if not names:
        raise ConfigError(KEY, "makes every class void; keep at least two", actual=dict(remap))
    table = np.full(256, VOID, np.uint8)
    for value, kept in enumerate(renamed):
        if kept is not None:
            table[value] = names.index(kept)
    # A merged class has the colour of the old class that keeps its name, else of the first one.
    kept_names = {name for name, new in zip(old.names, renamed, strict=True) if name == new}
    palette = [
        old.palette[(old.names if name in kept_names else renamed).index(name)] for name in names
    ]

    def convert(pair: Pair) -> np.ndarray:
        mask = layout.convert(pair) if layout.convert is not None else None
        if mask is None:
            mask = decode_mask(
                read_bytes(pair.mask, "mask"),
                pair.mask,
                num_classes=len(old.names),
                void_index=old.void_index,
            )
        return table[mask]

    return replace(layout, classes=Classes(tuple(names), tuple(palette)), convert=convert)


def kept_classes(classes: Classes, remap: Mapping[str, str | None]) -> list[str]:
    """Return the old classes that a remapping does not name."""
    named = {_index(name, classes) for name in remap}
    return [name for index, name in enumerate(classes.names) if index not in named]


def _new_name(new: str | None, old: Classes) -> str | None:
    """Return a new name, None for void; an index stands for the old class of this index."""
    index = None if new is None else _index(new, old)
    name = new if index is None else old.names[index]
    return None if name is None or name.lower() in VOID_NAMES else name


def _index(name: str, classes: Classes) -> int | None:
    """Return the index of a class by its name, else by its number."""
    if name in classes.names:
        return classes.names.index(name)
    return int(name) if name.isdecimal() and int(name) < len(classes.names) else None
