"""A discriminator that segments: every pixel is one of the classes, or generated (after OASIS, Schönfeld et al. 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.spectral import SpectralConv2d


class SegmentationDiscriminator(nn.Module):
    """A small U-Net over the features: three levels down, three up, K + 1 logits a pixel.

    It does not see the mask: it has to find the classes itself, and its gradient tells the generator where a class is missing
    (OASIS, section 3.2).

    Parameters
    ----------
    num_classes
        K; class K is "generated".
    feature_channels
        C.
    ndf
        Width: 4 * ndf at the features' own resolution, 8 * ndf below.
    init_gain
        Of the Xavier initialisation.
    """

    def __init__(
        self, *, num_classes: int, feature_channels: int, ndf: int, init_gain: float
    ) -> None:
        super().__init__()

        def conv(channels: int, width: int, size: int = 3, stride: int = 1) -> SpectralConv2d:
            return SpectralConv2d(channels, width, size, stride, padding=1, gain=init_gain)

        narrow, wide = 4 * ndf, 8 * ndf
        self.first = conv(feature_channels, narrow)
        self.down = nn.ModuleList([conv(narrow, wide, 4, 2), conv(wide, wide, 4, 2)])
        self.up = nn.ModuleList([conv(2 * wide, wide), conv(wide + narrow, narrow)])
        self.last = SpectralConv2d(narrow, num_classes + 1, 1, gain=init_gain)

    def forward(self, groups: list[Tensor], masks: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        """Groups of (k*B, C, h, w) -> each group's logits (k*B, K + 1, h, w) and layers' activations; ``masks`` are not looked at."""
        sizes = [len(group) for group in groups]
        x = F.leaky_relu(self.first(torch.cat(groups)), 0.2)
        skips, layers = [x], [x]
        for layer in self.down:
            x = F.leaky_relu(layer(x), 0.2)
            skips.append(x)
            layers.append(x)
        x = skips.pop()
        # (wide, h/4) and (wide, h/2), then (wide, h/2) and (narrow, h)
        for layer in self.up:
            skip = skips.pop()
            x = torch.cat([F.interpolate(x, size=skip.shape[-2:], mode="nearest"), skip], dim=1)
            x = F.leaky_relu(layer(x), 0.2)
            layers.append(x)
        scores = self.last(x).split(sizes)
        return list(
            zip(
                scores,
                map(list, zip(*(layer.split(sizes) for layer in layers), strict=True)),
                strict=True,
            )
        )
