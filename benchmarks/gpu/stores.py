"""Stores of drawn features, as large as those of ``extract``."""

from __future__ import annotations

from pathlib import Path

import torch

import featurestore
from benchmarks.gpu.device import Size
from benchmarks.train import draw_batch, store_spec
from featurestore import FeatureStore


def write_store(path: Path, size: Size, samples: int) -> FeatureStore:
    """Write a store of ``samples`` samples, which repeat a batch's features and masks."""
    features, masks = (each.numpy() for each in draw_batch(size.training, torch.device("cpu")))
    with featurestore.create(path, store_spec(size.training)) as writer:
        for number in range(samples):
            row = number % len(masks)
            writer.append(id=f"{number:06d}", features=features[row], mask=masks[row])
    return featurestore.open(path)
