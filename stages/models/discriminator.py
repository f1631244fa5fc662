"""The FeatureGAN discriminator: judges features for a mask, at one or two scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import RandomProjection, autocast_dtype, one_hot
from stages.models.info_head import InfoHead
from stages.models.spectral import PlainConv2d, SpectralConv2d

CONVOLUTIONS: dict[str, type[PlainConv2d]] = {"spectral": SpectralConv2d, "none": PlainConv2d}


class Judgement(NamedTuple):
    """The discriminator's output for one group of features.

    Attributes
    ----------
    scores
        One tensor a scale. Patch discriminator: (B, 1, h', w'), unbounded, higher is more real.
        Segmentation discriminator: (B, K + 1, h, w) logits of the classes; the last is "generated".
    layers
        Activations of every scale and layer, for the feature matching loss (eq. 3.5).
    z
        (B, z_dim), the z that the features seem to be generated from; None without a head for it.
    """

    scores: list[Tensor]
    layers: list[Tensor]
    z: Tensor | None = None


class Discriminator(nn.Module):
    """One discriminator a scale, after an optional projection of the features.

    Parameters
    ----------
    num_classes
        Classes of the masks, void not counted.
    feature_channels
        C.
    output_stride
        Nominal H / h.
    ndf
        Width.
    layers
        Layers of a patch discriminator before its last; the first two have stride 2.
    kind
        ``patch`` (thesis, section 3.1.1) or ``segmentation`` (OASIS).
    scales
        1, or 2: a second patch discriminator sees features and mask at half the resolution (Wang et
        al. 2018, section 3.1).
    projection_channels
        If above 0, discriminators see this number of fixed random mixtures of the channels.
    norm
        ``spectral``: all convolutions are spectrally normalised; ``none``: no convolution is.
    estimated_z
        Length of z where a head estimates it (:class:`stages.models.info_head.InfoHead`); 0: none.
    init_gain
        Gain of the Xavier initialisation.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        feature_channels: int,
        output_stride: int = 8,
        ndf: int = 64,
        layers: int = 3,
        kind: str = "patch",
        scales: int = 1,
        projection_channels: int = 0,
        norm: str = "spectral",
        estimated_z: int = 0,
        init_gain: float = 0.02,
    ) -> None:
        super().__init__()
        self.projection = (
            RandomProjection(feature_channels, projection_channels)
            if projection_channels
            else nn.Identity()
        )
        kinds: dict[str, Callable[..., nn.Module]] = {
            "patch": partial(PatchDiscriminator, output_stride=output_stride, layers=layers),
            "segmentation": SegmentationDiscriminator,
        }
        self.scales = nn.ModuleList(
            kinds[kind](
                num_classes=num_classes,
                feature_channels=projection_channels or feature_channels,
                ndf=ndf,
                norm=norm,
                init_gain=init_gain,
            )
            for _ in range(scales)
        )
        self.info = None
        if estimated_z:
            discriminators = cast(list[PatchDiscriminator], list(self.scales))
            widths = [width for scale in discriminators for width in scale.widths]
            self.info = InfoHead(widths, estimated_z)

    def forward(self, groups: Sequence[Tensor], masks: Tensor) -> list[Judgement]:
        """Judge several groups of features of the same masks, for example real and generated ones.

        One call for all groups normalises weights and embeds masks once. Each group is convolved
        separately: back-propagation for the generator does not pass through the real features.

        Parameters
        ----------
        groups
            Each (k*B, C, h, w) scaled features, k draws of B masks.
        masks
            (B, H, W) uint8, 255 = void.

        Returns
        -------
        list of Judgement
            One a group.
        """
        groups = [self.projection(group) for group in groups]
        judged = [Judgement([], []) for _ in groups]
        for number, scale in enumerate(self.scales):
            if number:
                masks = masks[:, ::2, ::2]
                groups = [
                    F.avg_pool2d(group, 3, stride=2, padding=1, count_include_pad=False)
                    for group in groups
                ]
            for judgement, (scores, layers) in zip(judged, scale(groups, masks), strict=True):
                judgement.scores.append(scores)
                judgement.layers.extend(layers)
        if self.info is not None:
            judged = [judgement._replace(z=self.info(judgement.layers)) for judgement in judged]
        return judged


class PatchDiscriminator(nn.Module):
    """The thesis's discriminator (section 3.1.1, figure 3.5): a PatchGAN over features and mask.

    Convolutions bring the one-hot mask near h x w. Where they do not give h x w exactly, their
    result is interpolated bilinearly. The PatchGAN sees it concatenated to the features.

    Parameters
    ----------
    num_classes, feature_channels, layers, norm, init_gain
        See :class:`Discriminator`.
    output_stride
        Nominal H / h: the mask passes round(log2(H / h)) stride-2 convolutions.
    ndf
        Width of the mask's convolutions; the PatchGAN has 4 * ndf channels, then 8 * ndf.

    Attributes
    ----------
    widths
        Channels of the layers' activations.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        feature_channels: int,
        output_stride: int,
        ndf: int,
        layers: int,
        norm: str,
        init_gain: float,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.feature_channels = feature_channels

        def conv(channels: int, width: int, stride: int) -> PlainConv2d:
            return CONVOLUTIONS[norm](
                channels, width, 4, stride, padding=1 if stride == 2 else 2, gain=init_gain
            )

        halvings = round(math.log2(output_stride))
        self.mask_layers = nn.ModuleList(
            [conv(num_classes + 1 if n == 0 else ndf, ndf, 2) for n in range(halvings)]
        )
        widths = [feature_channels + ndf, *(min(4 * 2**n, 8) * ndf for n in range(layers))]
        self.layers = nn.ModuleList(
            [conv(widths[n], widths[n + 1], 2 if n < 2 else 1) for n in range(layers)]
        )
        self.last = conv(widths[-1], 1, 1)
        self.widths = widths[1:]

    def forward(self, groups: list[Tensor], masks: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        """Judge groups (k*B, C, h, w) with masks (B, H, W).

        Returns
        -------
        list of tuple
            For each group, scores (k*B, 1, h', w') and the layers' activations.
        """
        embedded = one_hot(masks, self.num_classes, dtype=autocast_dtype(groups[0]))
        for layer in self.mask_layers:
            embedded = F.leaky_relu(layer(embedded), 0.2)
        if embedded.shape[-2:] != (size := groups[0].shape[-2:]):
            embedded = F.interpolate(embedded, size=size, mode="bilinear", align_corners=False)

        # The first layer over [features, mask] is the sum of a convolution of the features and one
        # of the mask. All groups share the latter; nothing is concatenated, and each gradient is
        # computed only where it is needed.
        first, *rest = cast(list[PlainConv2d], list(self.layers))
        scale = first.scale()
        sizes = [self.feature_channels, first.in_channels - self.feature_channels]
        convolve = partial(F.conv2d, stride=first.stride, padding=first.padding)
        weight_features, weight_mask = first.weight.split(sizes, dim=1)
        of_mask = first.rescale(convolve(embedded, weight_mask), scale)
        xs = [convolve(group, weight_features).unflatten(0, (-1, len(masks))) for group in groups]
        xs = [
            F.leaky_relu(torch.addcmul(of_mask, x, scale.to(x.dtype)).flatten(0, 1), 0.2)
            for x in xs
        ]
        activations = [xs]
        for layer in rest:
            scale = layer.scale()  # once for all groups
            xs = [layer.convolve(x, scale) for x in xs]
            # Group normalisation of single channels keeps channels last in memory.
            xs = [F.leaky_relu(F.group_norm(x, x.shape[1]), 0.2) for x in xs]
            activations.append(xs)
        scale = self.last.scale()
        scores = [self.last.convolve(x, scale) for x in xs]
        return list(zip(scores, map(list, zip(*activations, strict=True)), strict=True))


class SegmentationDiscriminator(nn.Module):
    """A discriminator that segments: each pixel is of a class or generated (after OASIS).

    A small U-Net over the features: three levels down, three up, K + 1 logits a pixel. It does not
    see the mask. It must recognise the classes, and its gradient tells the generator where a class
    is missing (Schönfeld et al. 2021, section 3.2).

    Parameters
    ----------
    num_classes
        K; class K is "generated".
    feature_channels, norm, init_gain
        See :class:`Discriminator`.
    ndf
        Width: 4 * ndf at the features' resolution, 8 * ndf below.

    Attributes
    ----------
    widths
        Channels of the layers' activations.
    """

    def __init__(
        self, *, num_classes: int, feature_channels: int, ndf: int, norm: str, init_gain: float
    ) -> None:
        super().__init__()
        conv = partial(CONVOLUTIONS[norm], padding=1, gain=init_gain)
        narrow, wide = 4 * ndf, 8 * ndf
        self.widths = [narrow, wide, wide, wide, narrow]
        self.first = conv(feature_channels, narrow, 3)
        self.down = nn.ModuleList([conv(narrow, wide, 4, 2), conv(wide, wide, 4, 2)])
        self.up = nn.ModuleList([conv(2 * wide, wide, 3), conv(wide + narrow, narrow, 3)])
        self.last = CONVOLUTIONS[norm](narrow, num_classes + 1, 1, gain=init_gain)

    def forward(self, groups: list[Tensor], masks: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        """Segment groups (k*B, C, h, w); ``masks`` are not read.

        Returns
        -------
        list of tuple
            For each group, logits (k*B, K + 1, h, w) and the layers' activations.
        """
        sizes = [len(group) for group in groups]
        x = F.leaky_relu(self.first(torch.cat(groups)), 0.2)
        layers = [x]
        for layer in self.down:
            x = F.leaky_relu(layer(x), 0.2)
            layers.append(x)
        # Skips: (wide, h/2), then (narrow, h).
        for layer, skip in zip(self.up, (layers[1], layers[0]), strict=True):
            x = torch.cat([F.interpolate(x, size=skip.shape[-2:], mode="nearest"), skip], dim=1)
            x = F.leaky_relu(layer(x), 0.2)
            layers.append(x)
        activations = zip(*(layer.split(sizes) for layer in layers), strict=True)
        return list(zip(self.last(x).split(sizes), map(list, activations), strict=True))
