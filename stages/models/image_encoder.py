"""SPADE's image encoder: the style of an image as a distribution over z (thesis figure 3.4)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import xavier_
from stages.models.spectral import SpectralConv2d

SIDE = 256  # images are resized to SIDE x SIDE first, as in SPADE


class ImageEncoder(nn.Module):
    """Six stride-2 convolutions, then a linear layer each for mean and log-variance of z.

    Parameters
    ----------
    z_dim
        Length of z.
    nef
        Width of the first convolution; the last has 8 times as many channels.
    init_gain
        Gain of the Xavier initialisation.
    """

    def __init__(self, *, z_dim: int = 256, nef: int = 64, init_gain: float = 0.02) -> None:
        super().__init__()
        widths = [3, nef, 2 * nef, 4 * nef, 8 * nef, 8 * nef, 8 * nef]
        self.layers = nn.ModuleList(
            SpectralConv2d(before, after, 3, stride=2, padding=1, gain=init_gain)
            for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.InstanceNorm2d(width) for width in widths[1:])
        flat = widths[-1] * (SIDE // 2**6) ** 2
        self.mu, self.logvar = (xavier_(nn.Linear(flat, z_dim), init_gain) for _ in range(2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8 images -> mean and log-variance, (B, z_dim) each."""
        x = images.float() / 127.5 - 1  # 0..255 -> -1..1
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.leaky_relu(norm(layer(x)), 0.2)
        x = torch.flatten(x, 1)  # (B, 8*nef, 4, 4) -> (B, 8*nef * 16)
        return self.mu(x), self.logvar(x)


def sample_z(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Sample z ~ N(mu, sigma) from standard normal ``noise`` (Kingma and Welling 2014).

    Arguments and result are (B, z_dim).
    """
    return mu + noise * torch.exp(0.5 * logvar)
