"""Hard-example extrapolation: regions move away from the centre of their class.

Thesis section 2.2.1, after Cheung and Yeung 2020 (MODALS).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from featurestore.dataset import Batch
from stages.augment.base import Context, RegionAugmenter, SourceConfig, VariantConfig
from stages.segmentation.regions import Regions


class ExtrapolateConfig(SourceConfig):
    """Strength of the extrapolation."""

    augmenter: Literal["extrapolate"]
    strength: float = Field(0.5, gt=0, description="lambda")

    needs_stored_features: ClassVar[bool] = True


class Extrapolate(RegionAugmenter):
    """``x + lambda * (m - mu)`` with m the centre of x's region and mu the mean of its class."""

    config: ExtrapolateConfig

    def __init__(self, config: VariantConfig, context: Context) -> None:
        super().__init__(config, context)
        self.means = context.class_statistics().means

    @override
    def shifts(self, batch: Batch, regions: Regions, rng: torch.Generator) -> Tensor:
        return self.config.strength * (regions.centres - self.means)
