"""The same real features once more: the control for every augmenter, because the decoder sees as many samples as theirs."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, Part, SourceConfig, VariantConfig


class DuplicateConfig(SourceConfig):
    """Variants ``duplicate*``."""

    augmenter: Literal["duplicate"]
    ratio: int = Field(default=1, ge=1, le=16)  # copies of the batch

    @property
    def added_batches(self) -> int:
        """The copies."""
        return self.ratio


class Duplicate(Augmenter):
    """Real features again."""

    def __init__(self, config: DuplicateConfig, context: Context) -> None:
        super().__init__(config, context)
        self.ratio, self.weight = config.ratio, config.weight

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """The batch itself, ``ratio`` times."""
        return Augmented([Part(batch.features, [(batch.masks, 1.0)], self.weight)] * self.ratio)


def in_place_of(config: VariantConfig, context: Context) -> Duplicate:
    """What a variant trains with from its ``until`` on: as many real batches as it added until then, with the same weight."""
    weight = getattr(config, "weight", 1.0)  # members of a combined variant have one each
    return Duplicate(DuplicateConfig(augmenter="duplicate", ratio=max(1, config.added_batches), weight=weight), context)
