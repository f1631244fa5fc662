"""Stores that several training tests read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import featurestore
from tests.factories import SPEC


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy features that tell the classes apart: 10, 4, 4 and 6 samples of 12 x 8 x 8."""
    root = tmp_path_factory.mktemp("features")
    spec = dataclasses.replace(SPEC, feature_shape=(12, 8, 8), mask_shape=(64, 64))
    rng = np.random.default_rng(0)
    centres = rng.random((3, 12)) * 3
    for split, count in (("train", 10), ("val", 4), ("test", 4), ("unlabelled", 6)):
        with featurestore.create(
            root / split, spec, fingerprint=split, samples_per_shard=4
        ) as writer:
            for number in range(count):
                labels = rng.integers(0, 3, (8, 8))
                values = np.maximum(
                    centres[labels].transpose(2, 0, 1) + 0.3 * rng.standard_normal((12, 8, 8)), 0
                )
                mask = labels.repeat(8, 0).repeat(8, 1).astype(np.uint8)
                mask[: None if split == "unlabelled" else 2] = 255
                writer.append(
                    id=f"{split} {number}",
                    features=values.astype(np.float32),
                    mask=mask,
                    image=rng.integers(0, 256, (64, 64, 3)).astype(np.uint8),
                )
    return root
