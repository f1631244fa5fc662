"""Segmentation decoders: features in, class logits for every pixel out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.aspp import ASPP
from stages.models.blocks import autocast_dtype, xavier_
from stages.models.deeplabv3plus import DeepLabV3Plus

Adjust = Callable[[Tensor, Tensor, nn.Conv2d], Tensor]


class Decoder(nn.Module):
    """A head whose logits are interpolated bilinearly to the size of the masks.

    At ``width`` 256 the ``deeplab`` head has the tensors of torchvision's ``deeplabv3_resnet*``,
    named ``head`` instead of ``classifier``.

    Parameters
    ----------
    head
        ``linear`` (BatchNorm, dropout, 1 x 1 convolution: the recipe of DINOv2 and DINOv3),
        ``deeplab`` (atrous spatial pyramid pooling, Chen et al. 2017), ``fcn``, or
        ``deeplabv3plus`` (Chen et al. 2018), whose logits have the size of the finest layer.
    in_channels
        C.
    num_classes
        K.
    width
        A, channels of the ASPP's branches; ``deeplab`` and ``deeplabv3plus`` only.
    atrous_rates
        Dilations of the ASPP's 3 x 3 branches; ``deeplab`` and ``deeplabv3plus`` only.
    dropout
        Probability of dropout. Default: 0.1 in ``linear`` and ``fcn``, 0.5 after the ASPP.
    folds
        (c, r) of each layer of the map, see :attr:`featurestore.StoreSpec.folds`; read by
        ``deeplabv3plus``. Default: one layer.

    Raises
    ------
    ValueError
        When ``deeplabv3plus`` has no fine layer.
    """

    def __init__(
        self,
        *,
        head: str,
        in_channels: int,
        num_classes: int,
        width: int = 256,
        atrous_rates: Sequence[int] = (12, 24, 36),
        dropout: float | None = None,
        folds: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        if head == "fcn":  # imported here because the import takes a second
            from torchvision.models.segmentation.fcn import FCNHead

            self.head: nn.Sequential = FCNHead(in_channels, num_classes)
        elif head == "linear":
            self.head = nn.Sequential(
                nn.BatchNorm2d(in_channels), nn.Dropout(0.1), nn.Conv2d(in_channels, num_classes, 1)
            )
        elif head == "deeplabv3plus":
            self.head = nn.Sequential(
                DeepLabV3Plus(folds or [(in_channels, 1)], width, atrous_rates),
                nn.Conv2d(width, num_classes, 1),
            )
        else:
            self.head = nn.Sequential(
                ASPP(in_channels, width, atrous_rates),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, num_classes, 1),
            )
        for layer in self.modules():
            if dropout is not None and isinstance(layer, nn.Dropout):
                layer.p = dropout
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
            (H, W) of the masks. Default: the head's own size (h, w).
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
