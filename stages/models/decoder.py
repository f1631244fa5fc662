"""Segmentation decoders: features in, class logits for every pixel out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.aspp import ASPP
from stages.models.blocks import autocast_dtype, normalised, xavier_
from stages.models.deeplabv3plus import DeepLabV3Plus

Adjust = Callable[[Tensor, Tensor, nn.Conv2d], Tensor]


Head = Literal["linear", "deeplab", "fcn", "deeplabv3plus"]
# Probability that the dropout of a head drops a value: of DINOv3's linear head, of torchvision's
# two, and of the authors' DeepLabv3+.
DROPOUT: dict[str, float] = {"linear": 0.1, "deeplab": 0.5, "fcn": 0.1, "deeplabv3plus": 0.1}


class Decoder(nn.Module):
    """A head on a map of features; its logits are upsampled bilinearly to the size of the masks.

    At ``width`` 256 the ``deeplab`` head has the tensors of torchvision's ``deeplabv3_resnet*``,
    named ``head`` instead of ``classifier``.

    Parameters
    ----------
    head
        ``linear`` (BatchNorm and a 1 x 1 convolution, as DINOv2 and DINOv3 are evaluated),
        ``deeplab`` (atrous spatial pyramid pooling, Chen et al. 2017), ``fcn`` or
        ``deeplabv3plus`` (Chen et al. 2018), which needs a layer finer than the grid.
    in_channels
        C.
    num_classes
        K.
    width
        A, channels of the ASPP's branches; ``deeplab`` and ``deeplabv3plus`` only.
    atrous_rates
        Dilations of the ASPP's 3 x 3 branches; ``deeplab`` and ``deeplabv3plus`` only.
    dropout
        Probability of dropping a value, 0 to 1. Default: the head's in :data:`DROPOUT`.
    folds
        Channels c and fold r of each layer of the map, which has c*r*r of the C channels
        (``StoreSpec.folds``). Default: one layer that is not folded.

    Raises
    ------
    ValueError
        When ``deeplabv3plus`` has no layer on the grid or none that is finer, or the layers do not
        have C channels.
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
        folds: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        usual_dropout = DROPOUT[head]  # KeyError for another name
        dropout = usual_dropout if dropout is None else dropout
        folds = ((in_channels, 1),) if folds is None else folds
        if (channels := sum(c * r**2 for c, r in folds)) != in_channels:
            raise ValueError(f"the layers have {channels} channels, the map has {in_channels}")
        if head == "linear":  # DINOv2's order; DINOv3 drops channels before BatchNorm
            embed: list[nn.Module] = [nn.BatchNorm2d(in_channels), nn.Dropout2d(dropout)]
            last = nn.Conv2d(in_channels, num_classes, 1)
        elif head == "fcn":  # imported here because the import takes a second
            from torchvision.models.segmentation.fcn import FCNHead

            *embed, last = FCNHead(in_channels, num_classes)
            embed[-1] = nn.Dropout(dropout)
        elif head == "deeplab":
            embed = [
                ASPP(in_channels, width, atrous_rates, dropout),
                *normalised(nn.Conv2d(width, width, 3, padding=1, bias=False)),
            ]
            last = nn.Conv2d(width, num_classes, 1)
        else:
            embed = [DeepLabV3Plus(folds, width, atrous_rates, dropout)]
            last = nn.Conv2d(width, num_classes, 1)
        self.head = nn.Sequential(*embed, last)
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
            (H, W) of the masks. Default: the size of the head's logits (h', w'), which is (h, w),
            or that of the finest layer for ``deeplabv3plus``.
        adjust
            Changes the logits in training. It takes the last layer's input (B, A, h', w'), its
            output (B, K, h', w') and the layer.

        Returns
        -------
        Tensor
            (B, K, H, W) or (B, K, h', w') logits.
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
