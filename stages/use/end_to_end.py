"""Backbone and decoder as one network, from images to scores, in a form that tracers take."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from stages.backbones.backbone import Backbone
from stages.backbones.resnet import RESNETS
from stages.models.decoder import Decoder


class EndToEnd(nn.Module):
    """A frozen backbone and a trained decoder in one, in evaluation mode.

    Parameters
    ----------
    backbone, decoder
        They are copied, and stay as they are.
    """

    def __init__(self, *, backbone: Backbone, decoder: Decoder) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.decoder = copy.deepcopy(decoder)
        if backbone.name not in RESNETS:
            _make_padding_traceable(self.backbone.network)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 images, red green blue -> (B, K, H, W) unnormalised scores."""
        return self.decoder(self.backbone(images), size=(images.shape[-2], images.shape[-1]))


class _SameConv2d(nn.Module):
    """TensorFlow's ``SAME`` convolution: as many output pixels as input pixels, divided by the stride and rounded up.

    The values are those of timm's ``Conv2dSame``. That one rounds in floating point and takes a maximum, which a tracer
    carries along as ever longer formulas of the picture's size: minutes instead of seconds, and a slow graph.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))."""
        conv, pads = self.conv, []
        for axis in (1, 0):  # F.pad wants the width first
            size, stride = x.shape[2 + axis], conv.stride[axis]
            wanted = (size + stride - 1) // stride  # of output pixels
            total = (
                (wanted - 1) * stride
                + conv.dilation[axis] * (conv.kernel_size[axis] - 1)
                + 1
                - size
            )
            pads += [total // 2, total - total // 2]
        return F.conv2d(
            F.pad(x, pads), conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups
        )


def _make_padding_traceable(network: nn.Module) -> None:
    """Replace timm's ``SAME`` convolutions whose kernel covers their stride (else its padding is not the formula above)."""
    from timm.layers import Conv2dSame

    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv2dSame):
                covered = zip(child.kernel_size, child.dilation, child.stride, strict=True)
                if all(
                    dilation * (kernel - 1) + 1 >= stride for kernel, dilation, stride in covered
                ):
                    setattr(parent, name, _SameConv2d(child))
