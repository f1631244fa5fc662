"""Upsampling: images of rare classes are drawn more often.

Kumar et al. 2019; thesis section 2.2.1.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from typing_extensions import override

from featurestore import FeatureStore
from stages.augment.base import Context, SampleAugmenter, SourceConfig, VariantConfig


class UpsampleConfig(SourceConfig):
    """Threshold below which a class is rare."""

    augmenter: Literal["upsample"]
    threshold: float = Field(
        1.0,
        gt=0,
        le=1,
        description="fraction of the images below which a class is rare; "
        "1: weight every class by its rarity",
    )

    needs_stored_features: ClassVar[bool] = True


def repeat_factors(store: FeatureStore, positions: np.ndarray, threshold: float) -> np.ndarray:
    """Compute how often each sample is drawn, relative to a sample of frequent classes.

    The factor is ``max over its classes of sqrt(threshold / fraction)``, at least 1, where
    ``fraction`` is the fraction of the images that have the class (Gupta et al. 2019, LVIS).

    Parameters
    ----------
    store
        Store of the masks.
    positions
        (n,) of the samples.
    threshold
        Fraction of the images below which a class is rare, 0..1.

    Returns
    -------
    numpy.ndarray
        (n,).
    """
    masks = (store.mask(int(position)) for position in positions)
    counts = [np.bincount(mask.ravel(), minlength=256)[: store.spec.num_classes] for mask in masks]
    present = np.stack(counts) > 0  # (n, K)
    factors = np.sqrt(threshold / np.maximum(present.mean(0), 1 / len(present)))
    return np.maximum(1.0, (present * factors).max(1))


class Upsample(SampleAugmenter):
    """Adds a second batch of real features, in which images of rare classes are more frequent."""

    config: UpsampleConfig

    def __init__(self, config: VariantConfig, context: Context) -> None:
        super().__init__(config, context)
        self.extra_sources = context.positions
        factors = repeat_factors(self.store, self.extra_sources, self.config.threshold)
        self.probabilities = factors / factors.sum()

    @override
    def extra_positions(self, positions: list[int], rng: torch.Generator) -> list[int]:
        drawing = np.random.default_rng([rng.initial_seed(), self.accelerator.process_index])
        chosen = drawing.choice(self.extra_sources, len(positions), p=self.probabilities)
        return sorted(chosen.tolist())
