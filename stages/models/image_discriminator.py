"""SPADE's discriminator: judges images for a mask, at two scales (Park et al. 2019, appendix A)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import autocast_dtype, one_hot, xavier_
from stages.models.discriminator import Judgement
from stages.models.spectral import SpectralConv2d

SCALES, LAYERS = 2, 4  # as in SPADE's code
WIDEST = 8  # times ndf


class ImageDiscriminator(nn.Module):
    """PatchGANs over images and their one-hot masks, the second one at half the resolution.

    Parameters
    ----------
    num_classes
        Classes of the masks, void not counted.
    ndf
        Width of the first layer; each further one has twice as many channels, up to 8 * ndf.
    init_gain
        Gain of the Xavier initialisation.
    """

    def __init__(self, *, num_classes: int, ndf: int = 64, init_gain: float = 0.02) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.scales = nn.ModuleList(
            _PatchGAN(num_classes + 4, ndf=ndf, gain=init_gain) for _ in range(SCALES)
        )

    def forward(self, groups: Sequence[Tensor], masks: Tensor) -> list[Judgement]:
        """Judge several groups of images of the same masks, for example real and generated ones.

        Parameters
        ----------
        groups
            Each (k*B, 3, H, W) in -1..1, k draws of B masks.
        masks
            (B, H, W) uint8, 255 = void.

        Returns
        -------
        list of Judgement
            One a group.
        """
        labels = one_hot(masks, self.num_classes, dtype=autocast_dtype(groups[0]))
        xs = [
            torch.cat([labels.repeat(len(group) // len(masks), 1, 1, 1), group], dim=1)
            for group in groups
        ]
        judged = [Judgement([], []) for _ in groups]
        for number, scale in enumerate(self.scales):
            if number:
                xs = [F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False) for x in xs]
            for judgement, (scores, layers) in zip(judged, scale(xs), strict=True):
                judgement.scores.append(scores)
                judgement.layers.extend(layers)
        return judged


class _PatchGAN(nn.Module):
    """Convolutions of 4 x 4, all but the last two of stride 2, with instance normalisation.

    As in SPADE, the first and the last convolution are not spectrally normalised, and those in
    front of an instance normalisation have no bias.
    """

    def __init__(self, channels: int, *, ndf: int, gain: float) -> None:
        super().__init__()
        widths = [min(2**number, WIDEST) * ndf for number in range(LAYERS)]
        self.first = xavier_(nn.Conv2d(channels, widths[0], 4, stride=2, padding=2), gain)
        middle = partial(SpectralConv2d, kernel_size=4, padding=2, bias=False, gain=gain)
        self.layers = nn.ModuleList(
            middle(widths[n - 1], widths[n], stride=2 if n < LAYERS - 1 else 1)
            for n in range(1, LAYERS)
        )
        self.last = xavier_(nn.Conv2d(widths[-1], 1, 4, padding=2), gain)

    def forward(self, xs: list[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
        """Return scores (B, 1, h', w') and activations of each input (B, channels, H, W)."""
        xs = [F.leaky_relu(self.first(x), 0.2) for x in xs]
        activations = [xs]
        for layer in cast(list[SpectralConv2d], list(self.layers)):
            scale = layer.scale()  # once for all groups
            xs = [layer.convolve(x, scale) for x in xs]
            # Group normalisation of single channels keeps channels last in memory.
            xs = [F.leaky_relu(F.group_norm(x, x.shape[1]), 0.2) for x in xs]
            activations.append(xs)
        scores = [self.last(x) for x in xs]
        return list(zip(scores, map(list, zip(*activations, strict=True)), strict=True))
