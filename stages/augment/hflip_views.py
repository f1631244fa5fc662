"""Real features of mirrored images, extracted beside the others: the cheap real alternative to generated ones."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from featurestore import FeatureStore, SpecMismatchError
from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, SourceConfig, read_samples


class HflipViewsConfig(SourceConfig):
    """Variant ``hflip-views``."""

    augmenter: Literal["hflip-views"]
    view: Literal["identity"] = "identity"  # the mirrored one is what it adds

    @property
    def needs_mirrored(self) -> bool:
        """Always."""
        return True


class HflipViews(Augmenter):
    """The mirrored view of each image of the batch."""

    def __init__(self, config: HflipViewsConfig, context: Context) -> None:
        super().__init__(config, context)
        self.store, self.weight = context.store, config.weight
        self.mirrored = dict(
            zip(
                context.positions.tolist(),
                mirrored(context.store, context.positions).tolist(),
                strict=True,
            )
        )

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """Their features (B, C, h, w) and masks (B, H, W), read from the store."""
        chosen = [self.mirrored[position] for position in batch.positions.tolist()]
        return Augmented([read_samples(self.store, chosen, batch.features.device, self.weight)])


def mirrored(store: FeatureStore, positions: np.ndarray) -> np.ndarray:
    """(S,) positions of the mirrored views of the images at ``positions`` (S,).

    Raises
    ------
    SpecMismatchError
        When one has none.
    """
    ids = store.ids
    by_id = {ids[position]: position for position in store.positions("hflip").tolist()}
    for position in positions.tolist():
        if ids[position] not in by_id:
            message = f"there is no mirrored view of {ids[position]}; set extract.views to [identity, hflip] for this variant"
            raise SpecMismatchError(message, path=store.path)
    return np.array([by_id[ids[position]] for position in positions.tolist()])


def training_views(store: FeatureStore, view: str) -> np.ndarray:
    """Choose the samples that a decoder learns from.

    Returns
    -------
    positions
        (S,) of all images; where ``view`` is ``random`` (S, 2): of each one, and of its mirrored
        view, among which the loader draws.
    """
    positions = store.positions("identity")
    if view == "identity":
        return positions
    return np.stack([positions, mirrored(store, positions)], axis=1)
