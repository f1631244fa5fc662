"""The FeatureGAN discriminator: judges pairs of features and mask, patch by patch (thesis section 3.1.1, figure 3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import one_hot, spectral


class Discriminator(nn.Module):
    """Convolutions bring the one-hot mask to h x w; it is concatenated to the features; a PatchGAN judges the whole.

    Parameters
    ----------
    num_classes
        Classes of the masks, void not counted.
    feature_channels
        C.
    output_stride
        H / h, a power of two: one stride-2 convolution of the mask a factor of two.
    ndf
        Width of the mask's convolutions; the PatchGAN starts at 4 * ndf and ends at no more than 8 * ndf.
    layers
        Layers of the PatchGAN before its last; the first two have stride 2.
    init_gain
        Of the Xavier initialisation.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        feature_channels: int,
        output_stride: int = 8,
        ndf: int = 64,
        layers: int = 3,
        init_gain: float = 0.02,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes

        def conv(channels: int, width: int, stride: int) -> nn.Module:
            return spectral(nn.Conv2d(channels, width, 4, stride, padding=1 if stride == 2 else 2), init_gain)

        halvings = output_stride.bit_length() - 1
        self.mask_layers = nn.ModuleList([conv(num_classes + 1 if n == 0 else ndf, ndf, 2) for n in range(halvings)])
        widths = [min(4 * 2**n, 8) * ndf for n in range(layers)]
        inputs = [feature_channels + ndf, *widths]
        self.layers = nn.ModuleList([conv(inputs[n], widths[n], 2 if n < 2 else 1) for n in range(layers)])
        self.norms = nn.ModuleList([nn.Identity() if n == 0 else nn.InstanceNorm2d(widths[n]) for n in range(layers)])
        self.last = conv(widths[-1], 1, 1)

    def forward(self, features: Tensor, masks: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Judge.

        Parameters
        ----------
        features
            (k*B, C, h, w) scaled features, k groups that share B masks (real ones and any number of generated ones).
        masks
            (B, H, W) uint8, 255 = void.

        Returns
        -------
        scores
            (k*B, 1, h', w'), unbounded: higher is more real.
        intermediates
            Each layer's activations, for the feature matching loss (eq. 3.5).
        """
        embedded = one_hot(masks, self.num_classes, dtype=features.dtype)
        for layer in self.mask_layers:
            embedded = F.leaky_relu(layer(embedded), 0.2)
        embedded = embedded.repeat(len(features) // len(masks), 1, 1, 1)  # embedded once a mask, not once a group
        x = torch.cat([features, embedded], dim=1)
        intermediates = []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.leaky_relu(norm(layer(x)), 0.2)
            intermediates.append(x)
        return self.last(x), intermediates
