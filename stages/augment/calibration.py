"""Distribution calibration of rare classes (Yang et al. 2021; thesis section 2.2.1)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from featurestore import VOID
from featurestore.dataset import Batch
from stages.augment.base import Augmented, Context, FeatureAugmenter, SourceConfig, VariantConfig
from stages.common.errors import ConfigError
from stages.segmentation.regions import Regions


class CalibrationConfig(SourceConfig):
    """Which classes are rare, and how far their calibrated features spread."""

    augmenter: Literal["calibration"]
    rare: float = Field(
        0.1, gt=0, lt=1, description="fraction of the images below which a class is rare"
    )
    neighbours: int = Field(2, ge=1, description="k, the nearest frequent classes")
    spread: float = Field(0.0, ge=0, description="alpha, added to every element of the covariance")

    needs_stored_features: ClassVar[bool] = True


class Calibration(FeatureAugmenter):
    """Draw centres of rare classes' regions from calibrated normal distributions (eqs 5 and 6).

    The distribution of a region is ``N((x + sum of mu_i) / (k + 1), mean of S_i + alpha)``. x is
    the region's centre; mu_i and S_i are mean and covariance of the centres of the k nearest
    frequent classes. The paper's power transformation is left out (its lambda is 1), because
    features may be negative.
    """

    config: CalibrationConfig

    def __init__(self, config: VariantConfig, context: Context) -> None:
        super().__init__(config, context)
        statistics, neighbours = context.class_statistics(), self.config.neighbours
        least = max(2.0, self.config.rare * len(context.positions))
        is_rare = statistics.images < least
        self.rare = is_rare.nonzero().flatten()  # (R,) classes
        frequent = [
            rows for rows, rare in zip(statistics.centres, is_rare, strict=True) if not rare
        ]
        if len(frequent) < neighbours:
            message = (
                f"{neighbours} is more than the {len(frequent)} frequent classes; lower it, or rare"
            )
            raise ConfigError(f"variants.{context.variant}.neighbours", message)
        self.means = torch.stack([rows.mean(0) for rows in frequent])  # (F, C)
        # A covariance is the product of its centred samples: drawing needs no C x C matrix.
        self.roots = [(rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in frequent]

    def draw(self, centres: Tensor, rng: torch.Generator) -> Tensor:
        """Draw a new centre for each of n regions with these centres (n, C)."""
        count, k, device = len(centres), self.config.neighbours, centres.device
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(centres, self.means, compute_mode=exact)  # (n, F)
        nearest = distances.topk(k, largest=False).indices  # (n, k)
        drawn = (centres + self.means[nearest].sum(1)) / (k + 1)
        noise = torch.randn(count, 1, generator=rng, device=device)
        drawn = drawn + self.config.spread**0.5 * noise
        is_near = torch.zeros_like(distances).scatter_(1, nearest, 1.0)
        for number, root in enumerate(self.roots):  # all of them: no loop waits for values
            noise = torch.randn(count, len(root), generator=rng, device=device)
            drawn = drawn + is_near[:, number, None] * (noise @ root) / k**0.5
        return drawn

    @override
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        if not len(self.rare):
            return Augmented()
        regions = Regions.of(batch.features, batch.masks, self.spec.num_classes)
        present, centres = regions.present[:, self.rare], regions.centres[:, self.rare]
        drawn = self.draw(centres.flatten(0, 1), rng).view_as(centres)  # (B, R, C)
        moved = (drawn - centres) * present[..., None]
        shifts = torch.zeros_like(regions.centres).index_copy(1, self.rare, moved)  # (B, K, C)
        # Images without a rare class are left out of the loss.
        masks = torch.where(present.any(1)[:, None, None], batch.masks, VOID)
        return self.add(masks, self.clamp(regions.shifted(shifts)))
