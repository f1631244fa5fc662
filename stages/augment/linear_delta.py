"""Linear delta: the difference of two samples of a class is added to a third one.

Kumar et al. 2019; thesis section 2.2.1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from featurestore.dataset import Batch
from stages.augment.base import RegionAugmenter, SourceConfig
from stages.segmentation.regions import Regions


class LinearDeltaConfig(SourceConfig):
    """Differences of regions; no keys beyond those of all added features."""

    augmenter: Literal["linear-delta"]


class LinearDelta(RegionAugmenter):
    """``x + (m_j - m_k)`` with the centres m of two other regions of x's class in the batch.

    Where there are fewer than two other regions, x stays.
    """

    config: LinearDeltaConfig

    @override
    def shifts(self, batch: Batch, regions: Regions, rng: torch.Generator) -> Tensor:
        pairs, enough = regions.others(2, rng)  # (B, K, 2), (B, K)
        classes = torch.arange(pairs.shape[1], device=pairs.device)
        first, second = (regions.centres[images, classes] for images in pairs.unbind(2))
        return (first - second) * enough[..., None]  # (B, K, C)
