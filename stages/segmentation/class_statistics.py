"""Means and deviations of each class's feature vectors over a whole training store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featurestore import FeatureStore
from featurestore.dataset import gather_maps
from stages.segmentation.regions import Regions

SAMPLES = 16  # read at a time


@dataclass(frozen=True)
class ClassStatistics:
    """Statistics by class.

    Attributes
    ----------
    means, deviations
        (K, C) of the vectors of each class; 0 for a class without feature pixels.
    pixels
        (K,) number of feature pixels of each class.
    images
        (K,) number of images with feature pixels of each class.
    centres
        For each class (n, C): the mean features of its regions, one an image.
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
        """Compute the statistics of the samples of a store at ``positions``, in one pass."""
        classes, channels = store.spec.num_classes, store.spec.feature_shape[0]
        sums, squares = torch.zeros(2, classes, channels, dtype=torch.float64, device=device)
        counts = torch.zeros(classes, dtype=torch.float64, device=device)
        by_batch: list[list[Tensor]] = []
        for start in range(0, len(positions), SAMPLES):
            rows = positions[start : start + SAMPLES]
            features = gather_maps(store, rows, device)
            masks = torch.from_numpy(store.gather("masks", rows)).to(device)
            regions = Regions.of(features, masks, classes)
            sizes = regions.one_hot.sum(2)  # (B, K)
            counts += sizes.sum(0)
            sums += (regions.centres * sizes[..., None]).sum(0)
            squares += torch.einsum("bkp,bcp->kc", regions.one_hot, features.flatten(2).square())
            by_class = zip(regions.centres.unbind(1), regions.present.unbind(1), strict=True)
            by_batch.append([rows[present] for rows, present in by_class])
        means = sums / counts.clamp(min=1)[:, None]
        variances = squares / counts.clamp(min=1)[:, None] - means.square()
        centres = [torch.cat(batches) for batches in zip(*by_batch, strict=True)]
        images = torch.tensor([len(rows) for rows in centres], device=device)
        return cls(means.float(), variances.clamp(min=0).sqrt().float(), counts, images, centres)
