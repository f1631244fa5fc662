"""Channel dropout: a copy with random channels of each sample at 0.

Tompson et al. 2015 call it spatial dropout.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from typing_extensions import override

from featurestore.dataset import Batch
from stages.augment.base import Augmented, FeatureAugmenter, SourceConfig


class ChannelDropoutConfig(SourceConfig):
    """Probability of dropping a channel."""

    augmenter: Literal["channel-dropout"]
    fraction: float = Field(0.3, gt=0, lt=1, description="probability that a channel is dropped")


class ChannelDropout(FeatureAugmenter):
    """``x * k / (1 - p)`` with k from Bernoulli(1 - p), one a channel and sample."""

    config: ChannelDropoutConfig

    @override
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        size, dropped = (*batch.features.shape[:2], 1, 1), self.config.fraction
        kept = torch.rand(size, generator=rng, device=batch.features.device) >= dropped
        return self.add(batch.masks, batch.features * kept / (1 - dropped))
