"""Datasets of HDF5 files from anywhere: all that is read is in the file itself, and as large."""

from __future__ import annotations

import h5py
import numpy as np

LAYOUT_NAMES = {
    h5py.h5d.COMPACT: "compact",
    h5py.h5d.CONTIGUOUS: "contiguous",
    h5py.h5d.CHUNKED: "chunked",
    h5py.h5d.VIRTUAL: "virtual",
}


def find_dataset(file: h5py.File, path: str, *, chunked: bool = False) -> h5py.Dataset:
    """Find a dataset without following a link, and before HDF5 opens any other file.

    Parameters
    ----------
    file
        The open file.
    path
        Names of groups and of the dataset, joined by ``/``.
    chunked
        Whether the dataset is chunked; default: contiguous, and so without a filter.

    Raises
    ------
    ValueError
        When a name is missing, a soft or external link, or no group or dataset; when the values
        are virtual, in another file, or not stored as expected.
    """
    node: h5py.Group | h5py.Dataset | h5py.Datatype = file
    for name in path.split("/"):
        if not isinstance(node, h5py.Group):
            raise ValueError(f"{node.name!r} is no group")
        link = node.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            found = "missing" if link is None else f"a {type(link).__name__}, which is refused"
            raise ValueError(f"{path!r} is {found}")
        node = node[name]
    if not isinstance(node, h5py.Dataset):
        raise ValueError(f"{path!r} is no dataset")
    storage = node.id.get_create_plist()
    expected = h5py.h5d.CHUNKED if chunked else h5py.h5d.CONTIGUOUS
    if (layout := storage.get_layout()) != expected:
        names = LAYOUT_NAMES[layout], LAYOUT_NAMES[expected]
        raise ValueError("{!r} is stored as {}, not {}".format(path, *names))
    if storage.get_external_count():
        raise ValueError(f"{path!r} has its values in another file, which is refused")
    return node


def map_dataset(content: np.ndarray, dataset: h5py.Dataset) -> np.ndarray:
    """Find a contiguous dataset's values in the memory map of its file.

    Parameters
    ----------
    content
        (n,) uint8, all bytes of the file.
    dataset
        Of any shape and type of numbers or fixed-length text.

    Raises
    ------
    TypeError, ValueError
        When the dataset has no place in the file, reaches past its end, or holds references.
    """
    offset = dataset.id.get_offset() if dataset.size else 0
    if dataset.shape is None or offset is None:
        raise ValueError(f"{dataset.name!r} has no values")
    return np.ndarray(dataset.shape, dataset.dtype, content, offset)
