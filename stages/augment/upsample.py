"""Upsample: images of rare classes more often (Kumar et al. 2019; thesis section 2.2.1)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from featurestore import FeatureStore
from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, SourceConfig, read_samples


class UpsampleConfig(SourceConfig):
    """Variant ``upsample``."""

    augmenter: Literal["upsample"]
    threshold: float = Field(
        default=1.0, gt=0, le=1
    )  # share of the images, below which a class is rare; 1: the rarer the more


def repeat_factors(store: FeatureStore, positions: np.ndarray, threshold: float) -> np.ndarray:
    """(n,) how much more often than the others each sample is drawn: ``max over its classes of sqrt(threshold / share)``, 1 at least.

    ``share`` is the share of the images that have the class (Gupta et al. 2019, LVIS).
    """
    masks = (store.mask(int(position)) for position in positions)
    there = np.stack(
        [np.bincount(mask.ravel(), minlength=256)[: store.spec.num_classes] > 0 for mask in masks]
    )  # (n, K)
    shares = there.mean(0)
    factors = np.sqrt(threshold / np.maximum(shares, 1 / len(there)))
    return np.maximum(1.0, (there * factors).max(1))


class Upsample(Augmenter):
    """A second batch of real features, in which images of rare classes are more frequent."""

    def __init__(self, config: UpsampleConfig, context: Context) -> None:
        super().__init__(config, context)
        self.store, self.positions, self.weight = context.store, context.positions, config.weight
        factors = repeat_factors(context.store, context.positions, config.threshold)
        self.chances = factors / factors.sum()

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """As many samples, drawn with their chances."""
        drawing = np.random.default_rng([rng.initial_seed(), self.accelerator.process_index])
        chosen = np.sort(drawing.choice(self.positions, len(batch), p=self.chances))
        return Augmented([read_samples(self.store, chosen, batch.features.device, self.weight)])
