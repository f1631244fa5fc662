"""Which samples of a store a decoder learns from, where images have several views."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featurestore import FeatureStore, SpecMismatchError


def find_views(store: FeatureStore, positions: np.ndarray, views: Sequence[str]) -> np.ndarray:
    """Find V views of the images at ``positions`` (S,).

    Returns
    -------
    numpy.ndarray
        Their positions (S, V).

    Raises
    ------
    SpecMismatchError
        When an image lacks one of the views.
    """
    ids = store.ids
    place = {name: position for position, name in enumerate(zip(ids, store.views, strict=True))}
    wanted = [(ids[position], view) for position in positions.tolist() for view in views]
    if missing := [name for name in wanted if name not in place]:
        id, view = missing[0]
        message = f"there is no view {view} of {id}; add it to extract.views for this variant"
        raise SpecMismatchError(message, path=store.path)
    return np.array([place[name] for name in wanted]).reshape(len(positions), len(views))


def training_views(store: FeatureStore, view: str) -> np.ndarray:
    """Choose the samples that a decoder learns from.

    Returns
    -------
    numpy.ndarray
        Positions (S,) of all images. Where ``view`` is ``random`` (S, V): the V views of each image
        between which the loader draws, ``identity`` first.

    Raises
    ------
    SpecMismatchError
        When ``view`` is ``random`` and there is only one view, or an image lacks one.
    """
    positions = store.positions("identity")
    if view == "identity":
        return positions
    views = list(dict.fromkeys(["identity", *store.views]))
    if len(views) == 1:
        message = (
            "holds no view but identity, and view: random draws among several; add hflip, rotate,"
            " crop, colour or random-K to extract.views"
        )
        raise SpecMismatchError(message, path=store.path)
    return find_views(store, positions, views)
