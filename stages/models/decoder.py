"""Segmentation decoders: features in, class scores for every pixel out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.aspp import ASPP
from stages.models.blocks import xavier_


class Decoder(nn.Module):
    """A torchvision head, its scores brought to the masks' size bilinearly.

    At ``width`` 256 the ``deeplab`` head's tensors are those of torchvision's
    ``deeplabv3_resnet*``, under the name ``head`` in place of ``classifier``.

    Parameters
    ----------
    head
        ``deeplab`` (atrous spatial pyramid pooling, Chen et al. 2017) or ``fcn``.
    in_channels
        C.
    num_classes
        Scores a pixel.
    width
        Channels of the ASPP's branches.
    atrous_rates
        Dilations of its 3 x 3 branches.
    """

    def __init__(
        self,
        *,
        head: str,
        in_channels: int,
        num_classes: int,
        width: int = 256,
        atrous_rates: tuple[int, ...] = (12, 24, 36),
    ) -> None:
        super().__init__()
        if head == "fcn":
            from torchvision.models.segmentation.fcn import (
                FCNHead,  # a second to import, for this head alone
            )

            self.head: nn.Module = FCNHead(in_channels, num_classes)
        else:
            self.head = nn.Sequential(
                ASPP(in_channels, width, atrous_rates),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, num_classes, 1),
            )
        xavier_(self, gain=1.0)

    @property
    def last(self) -> nn.Conv2d:
        """The last layer, a 1 x 1 convolution from embeddings to scores."""
        layer = self.head[-1]  # type: ignore[index]
        assert isinstance(layer, nn.Conv2d)
        return layer

    @contextmanager
    def running_statistics(self, *, kept: bool) -> Iterator[None]:
        """Let BatchNorm normalise by each batch's own statistics, as ever in training, and take them into its running ones or not."""
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms if not kept else []:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum

    def forward(
        self,
        features: Tensor,
        size: tuple[int, int] | None = None,
        adjust: Callable[[Tensor, Tensor, nn.Conv2d], Tensor] | None = None,
    ) -> Tensor:
        """Score every pixel.

        Parameters
        ----------
        features
            (B, C, h, w) in the backbone's own scale.
        size
            (H, W) of the masks; None leaves the scores at the features' (h, w).
        adjust
            Changes scores (B, K, h, w) in training, given what the last layer made them from, (B, A, h, w), and that layer.

        Returns
        -------
        Tensor
            (B, K, H, W) or (B, K, h, w) unnormalised scores.
        """
        device = features.device.type
        if torch.is_autocast_enabled(device):
            features = features.to(
                torch.get_autocast_dtype(device)
            )  # once, and not in each of the head's branches
        if adjust is None:
            scores = self.head(features)
        else:
            embeddings = features
            for layer in list(self.head.children())[:-1]:
                embeddings = layer(embeddings)
            scores = adjust(embeddings, self.last(embeddings), self.last)
        return (
            scores
            if size is None
            else F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        )
