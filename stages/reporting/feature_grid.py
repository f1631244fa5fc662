"""Grids of feature maps (thesis section 4.2.2)."""

from __future__ import annotations

import numpy as np


def subsample_channels(channels: int, keep: int) -> np.ndarray:
    """Choose indices of ``keep`` evenly spaced channels."""
    return np.linspace(0, channels - 1, min(keep, channels)).round().astype(int)


def feature_grid(features: np.ndarray) -> np.ndarray:
    """Arrange channels downwards and samples side by side: (B, C, h, w) -> (C*h, B*w)."""
    batch, channels, height, width = features.shape
    return features.transpose(1, 2, 0, 3).reshape(channels * height, batch * width)


def normalised_pair(real: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale both (B, C, h, w) to 0..1 by the real features' 1st and 99th percentile a channel."""
    low, high = np.percentile(real, [1, 99], axis=(0, 2, 3), keepdims=True)
    span = np.maximum(high - low, 1e-6)
    return np.clip((real - low) / span, 0, 1), np.clip((generated - low) / span, 0, 1)
