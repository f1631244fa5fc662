"""The stores that a training reads: a folder of them, or opened ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import featurestore
from featurestore import FeatureStore

Features: TypeAlias = Path | Mapping[str, FeatureStore]  # a folder of stores, or stores by split


def open_split(features: Features, split: str, layers: Sequence[str]) -> FeatureStore:
    """Return the store of a split with some of its layers; none: all.

    Raises
    ------
    FeatureStoreError
        When there is no sound store, or it lacks a layer.
    """
    store = (
        features[split] if isinstance(features, Mapping) else featurestore.open(features / split)
    )
    return store.select(layers)
