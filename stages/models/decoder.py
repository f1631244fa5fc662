"""Segmentation decoders: features in, class logits for every pixel out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.aspp import ASPP
from stages.models.blocks import autocast_dtype, xavier_

Adjust = Callable[[Tensor, Tensor, nn.Conv2d], Tensor]


class Decoder(nn.Module):
    """A torchvision head whose logits are interpolated bilinearly to the size of the masks.

    At ``width`` 256 the ``deeplab`` head has the tensors of torchvision's ``deeplabv3_resnet*``,
    named ``head`` instead of ``classifier``.

    Parameters
    ----------
    head
        ``deeplab`` (atrous spatial pyramid pooling, Chen et al. 2017) or ``fcn``.
    in_channels
        C.
    num_classes
        K.
    width
        A, channels of the ASPP's branches; ``deeplab`` only.
    atrous_rates
        Dilations of the ASPP's 3 x 3 branches; ``deeplab`` only.
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
        if head == "fcn":  # imported here because the import takes a second
            from torchvision.models.segmentation.fcn import FCNHead

            self.head: nn.Sequential = FCNHead(in_channels, num_classes)
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
        """The last layer, a 1 x 1 convolution from embeddings (A channels) to logits."""
        return cast(nn.Conv2d, self.head[-1])

    @contextmanager
    def running_statistics(self, *, updated: bool) -> Iterator[None]:
        """Choose whether training batches update the running statistics of BatchNorm.

        In training BatchNorm normalises by each batch's statistics either way.

        Parameters
        ----------
        updated
            Whether to update them.
        """
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d) and not updated]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum

    def forward(
        self, features: Tensor, size: tuple[int, int] | None = None, adjust: Adjust | None = None
    ) -> Tensor:
        """Compute the logits of every pixel.

        Parameters
        ----------
        features
            (B, C, h, w) in the scale of the backbone.
        size
            (H, W) of the masks. Default: the features' (h, w).
        adjust
            Changes the logits in training. It takes the last layer's input (B, A, h, w), its output
            (B, K, h, w) and the layer.

        Returns
        -------
        Tensor
            (B, K, H, W) or (B, K, h, w) logits.
        """
        embeddings = features.to(autocast_dtype(features))  # once for all branches of the head
        for layer in list(self.head)[:-1]:
            embeddings = layer(embeddings)
        logits = self.last(embeddings)
        if adjust is not None:
            logits = adjust(embeddings, logits, self.last)
        if size is None:
            return logits
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
