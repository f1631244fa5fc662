"""How near generated feature vectors are to real ones, as distributions.

All measures take vectors (n, C) of both sides. In thousands of dimensions distances between sets of
vectors say little, and need more vectors than dimensions: callers reduce C to :data:`DIMENSIONS`
first.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn

DIMENSIONS = 64  # random orthonormal mixtures of the channels: a covariance needs few vectors
NEIGHBOURS = 5  # Naeem et al. 2020


class _Identity(nn.Identity):
    """Takes the place of torchmetrics' Inception network: the vectors are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Compute the Fréchet distance of the two sides' Gaussians (Heusel et al. 2017).

    It is 0 for equal moments.

    Parameters
    ----------
    real, fake
        (n, C) and (m, C); more vectors than dimensions on both sides.
    """
    # Seconds to import, and only a monitored training needs it.
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = _Identity(real.shape[1])
    metric = FrechetInceptionDistance(network, sync_on_compute=False).to(real.device)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return float(metric.compute())


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int = 10, subset_size: int = 500
) -> float:
    """Compute the kernel distance (KID, Bińkowski et al. 2018).

    The estimate is unbiased: for equal distributions it is near 0, and may be below 0.

    Parameters
    ----------
    real, fake
        (n, C) and (m, C).
    subsets, subset_size
        Number of random subsets that are averaged, and the largest number of vectors in each.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    network, size = _Identity(real.shape[1]), min(subset_size, len(real), len(fake))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        metric = KernelInceptionDistance(network, subsets, size, sync_on_compute=False)
    metric = metric.to(real.device)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the subsets
        return float(metric.compute()[0])


def coverage(real: Tensor, fake: Tensor, *, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """Compute precision and recall (Kynkäänniemi et al. 2019), density and coverage.

    Density and coverage are those of Naeem et al. 2020. The ball of a vector reaches to its
    ``neighbours``-th nearest vector of the same side.

    Parameters
    ----------
    real, fake
        (n, C) and (m, C), n and m above ``neighbours``.

    Returns
    -------
    precision
        Fraction of generated vectors inside a real ball.
    recall
        Fraction of real vectors inside a generated ball.
    density
        Mean number of real balls around a generated vector, over ``neighbours``; may exceed 1.
    coverage
        Fraction of real balls with a generated vector inside.
    """
    across = torch.cdist(real, fake)  # (n, m)
    # A vector's nearest of its side is itself, at distance 0.
    real_reach, fake_reach = (
        torch.cdist(side, side).kthvalue(neighbours + 1, dim=1).values for side in (real, fake)
    )  # (n,), (m,)
    in_real_ball = across < real_reach[:, None]
    return {
        "precision": float(in_real_ball.any(0).float().mean()),
        "recall": float((across < fake_reach[None, :]).any(1).float().mean()),
        "density": float(in_real_ball.float().sum(0).mean() / neighbours),
        "coverage": float((across.min(1).values < real_reach).float().mean()),
    }


def two_sample_accuracy(real: Tensor, fake: Tensor) -> float:
    """Compute the accuracy of a classifier of real against generated vectors.

    Classifier two-sample test (Lopez-Paz and Oquab 2017): a logistic regression learns from every
    second vector of each side and is tested on the others. 0.5: it cannot tell the sides apart;
    1: it always can.
    """
    from sklearn.linear_model import LogisticRegression

    values = torch.cat([real, fake]).cpu().numpy()
    labels = np.repeat([0, 1], [len(real), len(fake)])
    training = np.concatenate([np.arange(len(real)), np.arange(len(fake))]) % 2 == 0
    centre, spread = values[training].mean(0), values[training].std(0) + 1e-6
    values = (values - centre) / spread
    classifier = LogisticRegression(C=0.01, max_iter=200).fit(values[training], labels[training])
    return float(classifier.score(values[~training], labels[~training]))
