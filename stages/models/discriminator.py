"""The FeatureGAN discriminator: judges pairs of features and mask, at one or two scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.patch_discriminator import PatchDiscriminator
from stages.models.projection import RandomProjection
from stages.models.segmentation_discriminator import SegmentationDiscriminator


class Judgement(NamedTuple):
    """What the discriminator says about one group of features.

    Attributes
    ----------
    scores
        One tensor a scale. Of a patch discriminator (B, 1, h', w'), unbounded, higher is more real; of a segmentation
        discriminator (B, K + 1, h, w), logits of the classes and, last, of being generated.
    layers
        Every scale's and layer's activations, for the feature matching loss (eq. 3.5).
    """

    scores: list[Tensor]
    layers: list[Tensor]


class Discriminator(nn.Module):
    """One discriminator a scale, behind a common view of the features.

    Parameters
    ----------
    num_classes
        Classes of the masks, void not counted.
    feature_channels
        C.
    output_stride
        H / h, a power of two.
    ndf
        Width.
    layers
        Layers of a patch discriminator before its last; the first two have stride 2.
    kind
        ``patch`` (the thesis's, section 3.1.1) or ``segmentation`` (OASIS).
    scales
        1, or 2: a second patch discriminator sees features and mask at half the resolution (Wang et al. 2018, section 3.1).
    projection_channels
        Where above 0, discriminators see this many fixed random mixtures of the channels.
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
        kind: str = "patch",
        scales: int = 1,
        projection_channels: int = 0,
        init_gain: float = 0.02,
    ) -> None:
        super().__init__()
        self.projection = (
            RandomProjection(feature_channels, projection_channels)
            if projection_channels
            else nn.Identity()
        )
        shared = {
            "num_classes": num_classes,
            "feature_channels": projection_channels or feature_channels,
            "init_gain": init_gain,
        }

        def one() -> nn.Module:
            if kind == "segmentation":
                return SegmentationDiscriminator(ndf=ndf, **shared)  # type: ignore[arg-type]
            return PatchDiscriminator(output_stride=output_stride, ndf=ndf, layers=layers, **shared)  # type: ignore[arg-type]

        self.scales = nn.ModuleList(one() for _ in range(scales))

    def forward(self, groups: Sequence[Tensor], masks: Tensor) -> list[Judgement]:
        """Judge several groups of features that belong to the same masks, real ones and generated ones for example.

        One call for all of them: weights are normalised, and masks embedded, once. Each group is
        convolved on its own, so that back-propagation for the generator leaves the real ones alone.

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
                groups = [
                    F.avg_pool2d(group, 3, stride=2, padding=1, count_include_pad=False)
                    for group in groups
                ]
                masks = masks[:, ::2, ::2]
            for judgement, (scores, layers) in zip(judged, scale(groups, masks), strict=True):
                judgement.scores.append(scores)
                judgement.layers.extend(layers)
        return judged
