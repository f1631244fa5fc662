"""The thesis's discriminator (section 3.1.1, figure 3.5): a PatchGAN over features and embedded mask."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import autocast_dtype, instance_norm, one_hot
from stages.models.spectral import SpectralConv2d


class PatchDiscriminator(nn.Module):
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
        output_stride: int,
        ndf: int,
        layers: int,
        init_gain: float,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.feature_channels = feature_channels

        def conv(channels: int, width: int, stride: int) -> SpectralConv2d:
            return SpectralConv2d(
                channels, width, 4, stride, padding=1 if stride == 2 else 2, gain=init_gain
            )

        halvings = output_stride.bit_length() - 1
        self.mask_layers = nn.ModuleList(
            [conv(num_classes + 1 if n == 0 else ndf, ndf, 2) for n in range(halvings)]
        )
        widths = [min(4 * 2**n, 8) * ndf for n in range(layers)]
        inputs = [feature_channels + ndf, *widths]
        self.layers = nn.ModuleList(
            [conv(inputs[n], widths[n], 2 if n < 2 else 1) for n in range(layers)]
        )
        self.last = conv(widths[-1], 1, 1)

    def forward(self, groups: list[Tensor], masks: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        """Groups of (k*B, C, h, w) and masks (B, H, W) -> each group's scores (k*B, 1, h', w') and layers' activations."""
        embedded = one_hot(masks, self.num_classes, dtype=autocast_dtype(groups[0]))
        for layer in self.mask_layers:
            embedded = F.leaky_relu(layer(embedded), 0.2)

        # The first layer over [features, mask] is the sum of one over the features and one over the mask, which all groups
        # share: nothing is concatenated, and neither part's gradient is computed where only the other's is wanted.
        first = cast(SpectralConv2d, self.layers[0])
        scale = first.scale()
        of_features, of_mask = first.weight.split(
            [self.feature_channels, first.in_channels - self.feature_channels], dim=1
        )
        mask_part = first.rescale(
            F.conv2d(embedded, of_mask, None, first.stride, first.padding), scale
        )
        xs = [
            F.conv2d(group, of_features, None, first.stride, first.padding).unflatten(
                0, (-1, len(masks))
            )
            for group in groups
        ]
        xs = [
            F.leaky_relu(torch.addcmul(mask_part, x, scale.to(x.dtype)).flatten(0, 1), 0.2)
            for x in xs
        ]
        layers = [[x] for x in xs]
        for layer in (cast(SpectralConv2d, layer) for layer in self.layers[1:]):
            scale = layer.scale()  # once for all groups
            xs = [F.leaky_relu(instance_norm(layer.convolve(x, scale)), 0.2) for x in xs]
            for group, x in zip(layers, xs, strict=True):
                group.append(x)
        scale = self.last.scale()
        return [(self.last.convolve(x, scale), group) for x, group in zip(xs, layers, strict=True)]
