"""Channel dropout: a copy of which each sample lacks some channels (Tompson et al. 2015, spatial dropout)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, Labelled, SourceConfig


class ChannelDropoutConfig(SourceConfig):
    """Variant ``channel-dropout``."""

    augmenter: Literal["channel-dropout"]
    share: float = Field(default=0.3, gt=0, lt=1)


class ChannelDropout(Augmenter):
    """``x * k / (1 - p)`` with k from Bernoulli(1 - p), one a channel and sample."""

    def __init__(self, config: ChannelDropoutConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config = config

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """One copy with channels left out."""
        size = (*batch.features.shape[:2], 1, 1)
        kept = torch.rand(size, generator=rng, device=batch.features.device) >= self.config.share
        return Augmented(
            [
                Labelled(
                    batch.features * kept / (1 - self.config.share),
                    [(batch.masks, 1.0)],
                    self.config.weight,
                )
            ]
        )
