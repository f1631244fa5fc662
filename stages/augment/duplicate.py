"""The same real features once more: the control for every augmenter, because the decoder sees as many samples as theirs."""

from __future__ import annotations

from typing import Literal

import torch

from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, Part, SourceConfig


class DuplicateConfig(SourceConfig):
    """Variant ``duplicate``."""

    augmenter: Literal["duplicate"]


class Duplicate(Augmenter):
    """Real features again."""

    def __init__(self, config: DuplicateConfig, context: Context) -> None:
        super().__init__(config, context)
        self.weight = config.weight

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """The batch itself."""
        return Augmented([Part(batch.features, [(batch.masks, 1.0)], self.weight)])
