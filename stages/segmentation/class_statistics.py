"""Means and deviations of each class's feature vectors over a whole training store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featurestore import FeatureStore
from stages.segmentation.regions import Regions


@dataclass(frozen=True)
class ClassStatistics:
    """Statistics by class.

    Attributes
    ----------
    means, deviations
        (K, C) of the class's pixels; 0 for a class without one.
    pixels
        (K,) how many it has.
    images
        (K,) how many have the class.
    centres
        For each class (n, C): the mean features of its regions, one a image.
    """

    means: Tensor
    deviations: Tensor
    pixels: Tensor
    images: Tensor
    centres: list[Tensor]

    @classmethod
    def of(
        cls, store: FeatureStore, positions: np.ndarray, device: torch.device
    ) -> ClassStatistics:
        """Statistics of the samples of a store at ``positions``, in one pass over them."""
        classes, channels = store.spec.num_classes, store.spec.feature_shape[0]
        sums, squares = torch.zeros(2, classes, channels, dtype=torch.float64, device=device)
        counts = torch.zeros(classes, dtype=torch.float64, device=device)
        centres: list[list[Tensor]] = [[] for _ in range(classes)]
        for start in range(0, len(positions), 16):
            part = positions[start : start + 16]
            features = torch.from_numpy(store.gather("features", part)).to(device).float()
            regions = Regions.of(
                features, torch.from_numpy(store.gather("masks", part)).to(device), classes
            )
            sizes = regions.shares.sum(2)  # (B, K)
            counts += sizes.sum(0)
            sums += (regions.centres * sizes[..., None]).sum(0)
            squares += torch.einsum("bkp,bcp->kc", regions.shares, features.flatten(2).square())
            for number in range(classes):
                centres[number].append(regions.centres[regions.present[:, number], number])
        means = sums / counts.clamp(min=1)[:, None]
        variances = squares / counts.clamp(min=1)[:, None] - means.square()
        joined = [torch.cat(parts) for parts in centres]
        images = torch.tensor([len(rows) for rows in joined], device=device)
        return cls(means.float(), variances.clamp(min=0).sqrt().float(), counts, images, joined)
