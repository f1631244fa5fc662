"""Channel dropout: a copy with random channels of each sample at 0.

All sub-pixels of a folded channel are dropped together.

Tompson et al. 2015 call it spatial dropout.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from typing_extensions import override

from featurestore.dataset import Batch
from stages.augment.base import Augmented, FeatureAugmenter, SourceConfig
from stages.segmentation.folds import expand_channels, unfolded_channels


class ChannelDropoutConfig(SourceConfig):
    """Probability of dropping a channel."""

    augmenter: Literal["channel-dropout"]
    fraction: float = Field(0.3, gt=0, lt=1, description="probability that a channel is dropped")


class ChannelDropout(FeatureAugmenter):
    """``x * k / (1 - p)`` with k from Bernoulli(1 - p), one a channel and sample."""

    config: ChannelDropoutConfig

    @override
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        folds, dropped = self.spec.folds, self.config.fraction
        size = (len(batch.features), unfolded_channels(folds))
        kept = torch.rand(size, generator=rng, device=batch.features.device) >= dropped
        kept = expand_channels(kept, folds)[:, :, None, None]  # (B, C, 1, 1)
        return self.add(batch.masks, batch.features * kept / (1 - dropped))
