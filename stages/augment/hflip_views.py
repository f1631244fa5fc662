"""Real features of mirrored images, extracted beside the other features."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from typing_extensions import override

from featurestore import FeatureStore, SpecMismatchError
from stages.augment.base import Context, SampleAugmenter, SourceConfig, VariantConfig


class HflipViewsConfig(SourceConfig):
    """Mirrored views from the store; real samples are read unmirrored."""

    augmenter: Literal["hflip-views"]
    view: Literal["identity"] = "identity"  # the mirrored one is what it adds

    needs_stored_features: ClassVar[bool] = True
    needs_mirrored: ClassVar[bool] = True


class HflipViews(SampleAugmenter):
    """Adds the mirrored view of each image of the batch, read from the store."""

    config: HflipViewsConfig

    def __init__(self, config: VariantConfig, context: Context) -> None:
        super().__init__(config, context)
        views = mirrored(self.store, context.positions)
        self.extra_sources = views
        self.mirrored = dict(zip(context.positions.tolist(), views.tolist(), strict=True))

    @override
    def extra_positions(self, positions: list[int], rng: torch.Generator) -> list[int]:
        return [self.mirrored[number] for number in positions]


def mirrored(store: FeatureStore, positions: np.ndarray) -> np.ndarray:
    """Find the mirrored views of the images at ``positions`` (S,).

    Returns
    -------
    numpy.ndarray
        Their positions (S,).

    Raises
    ------
    SpecMismatchError
        When an image has no mirrored view.
    """
    ids = store.ids
    views = {ids[position]: position for position in store.positions("hflip").tolist()}
    wanted = [ids[position] for position in positions.tolist()]
    if missing := [name for name in wanted if name not in views]:
        message = (
            f"there is no mirrored view of {missing[0]}; set extract.views to [identity, hflip]"
            " for this variant"
        )
        raise SpecMismatchError(message, path=store.path)
    return np.array([views[name] for name in wanted])


def training_views(store: FeatureStore, view: str) -> np.ndarray:
    """Choose the samples that a decoder learns from.

    Returns
    -------
    numpy.ndarray
        Positions (S,) of all images. Where ``view`` is ``random`` (S, 2): of each image and of its
        mirrored view, between which the loader draws.
    """
    positions = store.positions("identity")
    if view == "identity":
        return positions
    return np.stack([positions, mirrored(store, positions)], axis=1)
