"""Distribution calibration of rare classes (Yang et al. 2021; thesis section 2.2.1)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from featurestore import VOID
from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, Labelled, SourceConfig
from stages.common.errors import ConfigError
from stages.segmentation.class_statistics import ClassStatistics
from stages.segmentation.regions import Regions


class CalibrationConfig(SourceConfig):
    """Variant ``calibration``."""

    augmenter: Literal["calibration"]
    rare: float = Field(default=0.1, gt=0, lt=1)  # share of the images, below which a class is rare
    neighbours: int = Field(default=2, ge=1)  # k
    spread: float = Field(default=0.0, ge=0)  # alpha, added to every element of the covariance


class Calibration(Augmenter):
    """Regions of rare classes get a centre from ``N((x + sum of mu_i) / (k + 1), mean of S_i + alpha)`` (eqs 5 and 6).

    x is the region's centre, mu_i and S_i are the mean and the covariance of the centres of the k frequent classes that are
    nearest to it. The paper's power transformation is left out (its lambda is 1): features may be negative.
    """

    def __init__(self, config: CalibrationConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config = config
        self.num_classes, self.nonnegative = (
            context.store.spec.num_classes,
            context.store.spec.nonnegative,
        )
        statistics = ClassStatistics.of(
            context.store, context.positions, context.accelerator.device
        )
        frequent = statistics.images >= max(2.0, config.rare * len(context.positions))
        self.is_rare = ~frequent
        if int(frequent.sum()) < config.neighbours:
            message = f"{config.neighbours} is more than the {int(frequent.sum())} frequent classes; lower it, or rare"
            raise ConfigError(context.key("neighbours"), message)
        centres = [rows for rows, often in zip(statistics.centres, frequent, strict=True) if often]
        self.means = torch.stack([rows.mean(0) for rows in centres])  # (F, C)
        # A covariance is the product of its centred samples, so that drawing needs no C x C matrix.
        self.roots = [(rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in centres]

    def draw(self, centre: Tensor, rng: torch.Generator) -> Tensor:
        """(C,) -> (C,) a sample around one region's centre."""
        nearest = (
            (self.means - centre).norm(dim=1).topk(self.config.neighbours, largest=False).indices
        )
        mean = (centre + self.means[nearest].sum(0)) / (self.config.neighbours + 1)
        sample = mean + self.config.spread**0.5 * torch.randn(
            1, generator=rng, device=centre.device
        )
        for number in nearest.tolist():
            root = self.roots[number]
            sample = (
                sample
                + torch.randn(len(root), generator=rng, device=centre.device)
                @ root
                / self.config.neighbours**0.5
            )
        return sample

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """One copy with the regions of rare classes moved; images without one are left out of its loss."""
        regions = Regions.of(batch.features, batch.masks, self.num_classes)
        rare = (regions.present & self.is_rare).nonzero().tolist()
        found = torch.tensor(len(rare), device=batch.features.device)
        if not int(
            self.accelerator.reduce(found, "sum")
        ):  # in any process, because all of them must call the decoder equally often
            return Augmented()
        moves = torch.zeros_like(regions.centres)
        for sample, number in rare:
            centre = regions.centres[sample, number]
            moves[sample, number] = self.draw(centre, rng) - centre
        masks = batch.masks.clone()
        masks[~(regions.present & self.is_rare).any(1)] = VOID
        return Augmented(
            [
                Labelled(
                    regions.moved(moves, nonnegative=self.nonnegative),
                    [(masks, 1.0)],
                    self.config.weight,
                )
            ]
        )
