"""The stores that a training reads: a folder of them, or opened ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import featurestore
from featurestore import FeatureStore, SpecMismatchError

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


def check_like(store: FeatureStore, train: FeatureStore) -> None:
    """Refuse a store that does not fit the training store, or holds no sample.

    Raises
    ------
    SpecMismatchError
        When the specs differ, or the store is empty.
    """
    if store.spec != train.spec:
        message = f"its spec differs from that of {train.path}; run the extract stage again"
        raise SpecMismatchError(message, path=store.path, expected=train.spec, actual=store.spec)
    if not len(store):
        message = (
            "holds no image; set prepare.unlabelled, or remove what reads it: train_gan.unlabelled"
            " or the variant"
        )
        raise SpecMismatchError(message, path=store.path)
