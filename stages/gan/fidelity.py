"""How near generated feature vectors are to real ones, as distributions.

All measures take vectors (n, C) of both sides. Distances between clouds of points say little in thousands of dimensions
and need more points than dimensions, so callers reduce C first (:data:`DIMENSIONS`).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn

DIMENSIONS = 64  # random orthonormal mixtures of the channels; a covariance of so many needs thousands of vectors, not millions
NEIGHBOURS = 5  # Naeem et al. 2020


class _Identity(nn.Identity):
    """Stands where torchmetrics expects an Inception network: the vectors are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of the two sides' Gaussians (Heusel et al. 2017); 0 for equal moments.

    Parameters
    ----------
    real, fake
        (n, C) and (m, C); more vectors than dimensions on both sides.
    """
    from torchmetrics.image.fid import (
        FrechetInceptionDistance,  # seconds to import, which only a measurement pays for
    )

    metric = FrechetInceptionDistance(_Identity(real.shape[1]), sync_on_compute=False)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return float(metric.compute())


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int = 10, subset_size: int = 500
) -> float:
    """Kernel distance (KID, Bińkowski et al. 2018), unbiased, so about 0, and below it by chance, for equal distributions.

    Parameters
    ----------
    real, fake
        (n, C) and (m, C).
    subsets, subset_size
        It is averaged over so many random subsets of at most so many vectors.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(real), len(fake))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        metric = KernelInceptionDistance(
            _Identity(real.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(real, real=True)
    metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # which subsets
        return float(metric.compute()[0])


def coverage(real: Tensor, fake: Tensor, *, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A vector's ball reaches to its ``neighbours``-th nearest of its own side. Precision: share of generated vectors inside
    some real ball; recall: share of real ones inside some generated ball; density: real balls around a generated vector, over
    ``neighbours`` (may exceed 1); coverage: share of real balls with a generated vector inside.

    Parameters
    ----------
    real, fake
        (n, C) and (m, C), n and m above ``neighbours``.
    """
    across = torch.cdist(real, fake)  # (n, m)
    # The nearest of one's own side is oneself, at distance 0.
    real_reach = torch.cdist(real, real).kthvalue(neighbours + 1, dim=1).values  # (n,)
    fake_reach = torch.cdist(fake, fake).kthvalue(neighbours + 1, dim=1).values  # (m,)
    in_real_ball = across < real_reach[:, None]
    return {
        "precision": float(in_real_ball.any(0).float().mean()),
        "recall": float((across < fake_reach[None, :]).any(1).float().mean()),
        "density": float(in_real_ball.float().sum(0).mean() / neighbours),
        "coverage": float((across.min(1).values < real_reach).float().mean()),
    }


def two_sample_accuracy(real: Tensor, fake: Tensor) -> float:
    """Classifier two-sample test (Lopez-Paz and Oquab 2017): held-out accuracy of a logistic regression, real against generated.

    0.5: it cannot tell them apart; 1: it always can. Every second vector of each side is held out.
    """
    from sklearn.linear_model import LogisticRegression

    values = torch.cat([real, fake]).cpu().numpy()
    labels = np.repeat([0, 1], [len(real), len(fake)])
    training = np.concatenate([np.arange(len(real)), np.arange(len(fake))]) % 2 == 0
    centre, spread = values[training].mean(0), values[training].std(0) + 1e-6
    values = (values - centre) / spread
    classifier = LogisticRegression(C=0.01, max_iter=200).fit(values[training], labels[training])
    return float(classifier.score(values[~training], labels[~training]))
