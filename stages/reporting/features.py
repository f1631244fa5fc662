"""Features for the eye: UMAP (thesis figure 4.1) and grids of maps (thesis section 4.2.2)."""

from __future__ import annotations

import warnings

import numpy as np


def sample_vectors(
    features: np.ndarray, masks: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sample feature vectors at random positions, each with its mask's class.

    Parameters
    ----------
    features
        (B, C, h, w).
    masks
        (B, H, W) uint8.
    count
        Number of vectors; fewer where there are fewer positions.
    rng
        Draws the positions.

    Returns
    -------
    vectors (n, C) float32, classes (n,) uint8
    """
    _, channels, height, width = features.shape
    rows = (np.arange(height) * masks.shape[1]) // height  # nearest neighbours
    columns = (np.arange(width) * masks.shape[2]) // width
    classes = masks[:, rows][:, :, columns].reshape(-1)  # (B, h, w) -> (B*h*w)
    vectors = features.transpose(0, 2, 3, 1).reshape(-1, channels)  # (B, C, h, w) -> (B*h*w, C)
    chosen = rng.choice(len(vectors), size=min(count, len(vectors)), replace=False)
    return vectors[chosen].astype(np.float32), classes[chosen]


def project(
    groups: list[np.ndarray], *, neighbors: int, min_dist: float, seed: int
) -> list[np.ndarray]:
    """Embed all groups of vectors (n_i, C) together as (n_i, 2), so that they share axes.

    The nearest neighbors are exact: the search of UMAP's own is approximate, and compiling it
    takes longer than the exact one of some thousand vectors.
    """
    import umap  # numba compiles on import; only the report needs it
    from sklearn.neighbors import NearestNeighbors

    vectors = np.concatenate(groups)
    neighbors = min(neighbors, len(vectors) - 1)
    distances, indices = NearestNeighbors(n_neighbors=neighbors).fit(vectors).kneighbors(vectors)
    with warnings.catch_warnings():  # it says that it cannot embed new vectors
        warnings.filterwarnings("ignore", "precomputed_knn", UserWarning)
        reducer = umap.UMAP(
            n_neighbors=neighbors,
            min_dist=min_dist,
            random_state=seed,
            n_jobs=1,
            precomputed_knn=(indices, distances.astype(np.float32)),
        )
        points = reducer.fit_transform(vectors)
    return np.split(points, np.cumsum([len(group) for group in groups])[:-1])


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
