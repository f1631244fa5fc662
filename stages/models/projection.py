"""A fixed random mixture of the feature channels in front of the discriminator (after Sauer et al. 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RandomProjection(nn.Module):
    """C channels -> P orthonormal mixtures of them, never trained.

    A discriminator that sees few mixtures cannot single out the few channels that give a generator away, and its first
    layer shrinks with P / C. Sauer et al. (Projected GANs, section 3.2) mix with random 1 x 1 convolutions, too;
    rows are orthonormal here, so that no direction counts twice, and P features have the variance of C on average.

    Parameters
    ----------
    channels, mixtures
        C, and P <= C.
    """

    weight: Tensor

    def __init__(self, channels: int, mixtures: int) -> None:
        super().__init__()
        rows = nn.init.orthogonal_(torch.empty(mixtures, channels))
        self.register_buffer("weight", rows.view(mixtures, channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, P, h, w)."""
        return F.conv2d(features, self.weight)
