"""The FeatureGAN generator: noise and a mask to backbone features (thesis figure 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from stages.models.blocks import autocast_dtype, nearest_pixels, one_hot, reduced_size, xavier_
from stages.models.feature_generator import FeatureGenerator
from stages.models.spade import SPADEResBlk
from stages.models.winograd import WideConv2d

DIVISORS = (4, 2, 1)  # of h and w, at which the blocks work


class Generator(FeatureGenerator):
    """SPADE blocks at h/4, h/2, h/2 and h with nearest up-sampling, then a convolution.

    h/4 and h/2 are rounded up.

    Parameters
    ----------
    num_classes
        Classes of the masks, void not counted (it gets a channel of its own).
    feature_shape
        (C, h, w) of the features.
    nonnegative
        Whether the features are >= 0, so that the last layer is a ReLU.
    feature_scale
        (C,) > 0: what a feature channel is divided by before the GAN sees it.
    z_dim
        Length of the noise vector; 0: none, features are a function of the mask alone.
    noise
        ``vector``: z becomes the first feature map (SPADE). ``spatial``: z is concatenated to the
        mask's classes at every pixel, in the first and every SPADE layer (OASIS, section 3.3).
    ngf
        Width: every block has 16 * ngf channels (1024 at the thesis's 64).
    spade_hidden
        Channels of SPADE's mask embedding.
    norm
        ``batch`` or ``instance``.
    init_gain
        Of the Xavier initialisation.
    class_means
        (num_classes + 1, C) mean scaled features of each class, void's last; the network adds the
        difference from them. None: the network generates the whole features.
    """

    class_means: Tensor | None

    def __init__(
        self,
        *,
        num_classes: int,
        feature_shape: tuple[int, int, int],
        nonnegative: bool,
        feature_scale: Tensor,
        z_dim: int = 256,
        noise: str = "vector",
        ngf: int = 64,
        spade_hidden: int = 128,
        norm: str = "batch",
        init_gain: float = 0.02,
        class_means: Tensor | None = None,
    ) -> None:
        super().__init__()
        channels, height, width = feature_shape
        self.num_classes = num_classes
        self.feature_size = (height, width)
        self.nonnegative = nonnegative
        self.z_dim = z_dim
        self.spatial = noise == "spatial" and z_dim > 0
        label_channels = num_classes + 1 + (z_dim if self.spatial else 0)
        self.start = (16 * ngf, *reduced_size(self.feature_size, DIVISORS[0]))
        self.register_buffer("feature_scale", feature_scale.reshape(1, channels, 1, 1).float())
        self.register_buffer("class_means", class_means)

        def block() -> SPADEResBlk:
            return SPADEResBlk(
                in_channels=16 * ngf,
                out_channels=16 * ngf,
                label_channels=label_channels,
                hidden=spade_hidden,
                norm=norm,
                gain=init_gain,
            )

        if z_dim and not self.spatial:
            self.noise = xavier_(
                nn.Linear(z_dim, self.start[0] * self.start[1] * self.start[2]), init_gain
            )
        else:  # SPADE's generator without an image encoder starts from the mask
            self.first = xavier_(nn.Conv2d(label_channels, self.start[0], 3, padding=1), init_gain)
        self.quarter, self.half_0, self.half_1, self.full = block(), block(), block(), block()
        self.to_features = xavier_(WideConv2d(16 * ngf, channels, 3, padding=1), init_gain)

    @override
    def forward(self, z: Tensor, masks: Tensor) -> Tensor:
        # Spatial noise may also be (k*B, z_dim, h, w): another z at every pixel.
        sizes = {divisor: reduced_size(self.feature_size, divisor) for divisor in DIVISORS}
        dtype = autocast_dtype(z)
        labels = {
            divisor: one_hot(masks, self.num_classes, dtype=dtype, size=size)
            for divisor, size in sizes.items()
        }
        if self.spatial:
            z = z.to(dtype)
            if z.ndim == 2:
                z = z[:, :, None, None].expand(-1, -1, *self.feature_size)
            labels = {
                divisor: torch.cat(
                    [
                        label.repeat(len(z) // len(masks), 1, 1, 1),
                        nearest_pixels(z, sizes[divisor]),
                    ],
                    dim=1,
                )
                for divisor, label in labels.items()
            }
        if self.z_dim and not self.spatial:
            # (k*B, 16*ngf * h/4 * w/4) -> (k*B, 16*ngf, h/4, w/4)
            x = self.noise(z).view(-1, *self.start)
        else:
            x = self.first(labels[4])
            x = x.repeat(len(z) // len(x), 1, 1, 1)
        x = self.quarter(x, labels[4])
        x = F.interpolate(x, size=sizes[2], mode="nearest")
        x = self.half_0(x, labels[2])
        x = self.half_1(x, labels[2])
        x = F.interpolate(x, size=sizes[1], mode="nearest")
        x = self.full(x, labels[1])
        x = self.to_features(F.leaky_relu(x, 0.2))
        if self.class_means is not None:
            means = self._means(masks)
            x = x + means.repeat(len(x) // len(means), 1, 1, 1).to(x.dtype)
        return F.relu(x) if self.nonnegative else x

    def _means(self, masks: Tensor) -> Tensor:
        """Compute (B, C, h, w) class means, averaged where a feature pixel has several classes."""
        assert self.class_means is not None
        labels = one_hot(masks, self.num_classes, dtype=self.class_means.dtype)
        fractions = F.adaptive_avg_pool2d(labels, self.feature_size)
        return torch.einsum("bkhw,kc->bchw", fractions, self.class_means).contiguous(
            memory_format=torch.channels_last
        )
