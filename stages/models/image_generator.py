"""SPADE's generator of images, and features as a backbone's of generated images (figure 5.1)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from stages.models.blocks import autocast_dtype, one_hot, reduced_size, xavier_
from stages.models.feature_generator import FeatureGenerator
from stages.models.spade import SPADEResBlk

START = 32  # H and W over the size at which the first block works: five doublings
# Name of a block, its size as a divisor of H and W, widths in and out over ngf.
BLOCKS = (
    ("head_0", 32, 16, 16),
    ("G_middle_0", 16, 16, 16),
    ("G_middle_1", 16, 16, 16),
    ("up_0", 8, 16, 8),
    ("up_1", 4, 8, 4),
    ("up_2", 2, 4, 2),
    ("up_3", 1, 2, 1),
)


class ImageGenerator(nn.Module):
    """SPADE's generator (Park et al. 2019, appendix A), with five doublings ("normal").

    Blocks have SPADE's names. Sizes that 32 does not divide are rounded up at every block, and the
    image has exactly H x W pixels.

    Parameters
    ----------
    num_classes
        Classes of the masks, void not counted (it gets a channel of its own).
    image_size
        (H, W) of the images.
    z_dim
        Length of the noise vector; 0: none, the first map is a convolution of the mask.
    ngf
        Width of the last block; the first ones have 16 * ngf channels.
    spade_hidden, norm, init_gain
        See :class:`stages.models.spade.SPADE`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: tuple[int, int],
        z_dim: int = 256,
        ngf: int = 64,
        spade_hidden: int = 128,
        norm: str = "batch",
        init_gain: float = 0.02,
    ) -> None:
        super().__init__()
        self.num_classes, self.image_size, self.z_dim = num_classes, image_size, z_dim
        rows, columns = reduced_size(image_size, START)
        self.start = (16 * ngf, rows, columns)
        self.fc = xavier_(
            nn.Linear(z_dim, 16 * ngf * rows * columns)
            if z_dim
            else nn.Conv2d(num_classes + 1, 16 * ngf, 3, padding=1),
            init_gain,
        )
        for name, _, before, after in BLOCKS:
            block = SPADEResBlk(
                in_channels=before * ngf,
                out_channels=after * ngf,
                label_channels=num_classes + 1,
                hidden=spade_hidden,
                norm=norm,
                gain=init_gain,
            )
            self.add_module(name, block)
        self.conv_img = xavier_(nn.Conv2d(ngf, 3, 3, padding=1), init_gain)

    def forward(self, z: Tensor, masks: Tensor) -> Tensor:
        """Generate images.

        Parameters
        ----------
        z
            (k*B, z_dim) noise, k draws a mask.
        masks
            (B, H', W') uint8, 255 = void.

        Returns
        -------
        Tensor
            (k*B, 3, H, W) in -1..1; draw j of mask i is row j*B + i.
        """
        dtype = autocast_dtype(z)
        sizes = {divisor: reduced_size(self.image_size, divisor) for _, divisor, _, _ in BLOCKS}
        labels = {
            divisor: one_hot(masks, self.num_classes, dtype=dtype, size=size)
            for divisor, size in sizes.items()
        }
        if self.z_dim:
            # (k*B, 16*ngf * H/32 * W/32) -> (k*B, 16*ngf, H/32, W/32)
            x = self.fc(z).view(-1, *self.start)
        else:
            x = self.fc(labels[START]).repeat(len(z) // len(masks), 1, 1, 1)
        for name, divisor, _, _ in BLOCKS:
            if x.shape[-2:] != sizes[divisor]:
                x = F.interpolate(x, size=sizes[divisor], mode="nearest")
            x = self.get_submodule(name)(x, labels[divisor])
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))


class ImageFeatureGenerator(FeatureGenerator):
    """The features that a frozen backbone computes of generated images (thesis section 5.1).

    Parameters
    ----------
    network
        Noise and masks to images.
    backbone
        Images (B, 3, H, W) in 0..255 to feature maps (B, C, h, w); its parameters are not trained.
    bf16
        Whether the backbone computes in bfloat16, as it did for the stored features; otherwise
        float32, in whatever precision ``network`` is trained.
    nonnegative, feature_scale
        See :class:`stages.models.feature_generator.FeatureGenerator`; the scale is (C,).
    """

    def __init__(
        self,
        *,
        network: ImageGenerator,
        backbone: nn.Module,
        bf16: bool,
        nonnegative: bool,
        feature_scale: Tensor,
    ) -> None:
        super().__init__()
        self.network, self.backbone = network, backbone
        self.bf16, self.nonnegative, self.z_dim = bf16, nonnegative, network.z_dim
        self.register_buffer("feature_scale", feature_scale.reshape(1, -1, 1, 1).float())

    @override
    def forward(self, z: Tensor, masks: Tensor) -> Tensor:
        return self.features(self.network(z, masks))

    def features(self, images: Tensor) -> Tensor:
        """Compute scaled features (B, C, h, w) of images (B, 3, H, W) in -1..1."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            maps = cast(Tensor, self.backbone(as_pixels(images)))
        return maps.float() / self.feature_scale


def as_pixels(images: Tensor) -> Tensor:
    """Turn images in -1..1 into pixel values in 0..255, not rounded."""
    return (images.float() + 1) * 127.5


def from_pixels(pixels: Tensor) -> Tensor:
    """Turn pixel values in 0..255 into images in -1..1."""
    return pixels.float() / 127.5 - 1
