"""Linear delta: the difference of two samples of a class added to a third (Kumar et al. 2019; thesis section 2.2.1)."""

from __future__ import annotations

from typing import Literal

import torch

from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, Labelled, SourceConfig
from stages.segmentation.regions import Regions


class LinearDeltaConfig(SourceConfig):
    """Variant ``linear-delta``."""

    augmenter: Literal["linear-delta"]


class LinearDelta(Augmenter):
    """``x + (m_j - m_k)`` with the centres m of two other regions of x's class in the batch; x where there are fewer."""

    def __init__(self, config: LinearDeltaConfig, context: Context) -> None:
        super().__init__(config, context)
        self.weight = config.weight
        self.num_classes, self.nonnegative = (
            context.store.spec.num_classes,
            context.store.spec.nonnegative,
        )

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """One copy with every region moved."""
        regions = Regions.of(batch.features, batch.masks, self.num_classes)
        pairs, found = regions.others(2, rng)  # (B, K, 2), (B, K)
        classes = torch.arange(self.num_classes, device=pairs.device)
        first, second = (
            regions.centres[pairs[..., number], classes] for number in range(2)
        )  # (B, K, C)
        moved = regions.moved((first - second) * found[..., None], nonnegative=self.nonnegative)
        return Augmented([Labelled(moved, [(batch.masks, 1.0)], self.weight)])
