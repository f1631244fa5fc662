"""A conditional GAN's generator without SPADE: noise and mask are concatenated at the start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from stages.models.blocks import NORMS, autocast_dtype, one_hot, reduced_size, xavier_
from stages.models.feature_generator import FeatureGenerator
from stages.models.generator import DIVISORS
from stages.models.spectral import SpectralConv2d
from stages.models.winograd import WideConv2d


class ConcatGenerator(FeatureGenerator):
    """The thesis's first approach (section 5.1): the mask is read once, in the first layer.

    Sizes, widths, up-sampling and residual blocks are those of
    :class:`stages.models.generator.Generator`. The blocks normalise with a learned scale and shift
    a channel, where SPADE computes them from the mask. The first convolution sees z, equal at every
    pixel, beside the one-hot mask. The mask has h x w pixels or slightly more, and squares of 4 x 4
    of them are folded into channels: no class boundary is lost at h/4.

    Parameters
    ----------
    num_classes, feature_shape, nonnegative, feature_scale, z_dim, ngf, init_gain
        See :class:`stages.models.generator.Generator`.
    norm
        ``batch`` or ``instance``.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        feature_shape: Sequence[int],
        nonnegative: bool,
        feature_scale: Tensor,
        z_dim: int = 256,
        ngf: int = 64,
        norm: str = "batch",
        init_gain: float = 0.02,
    ) -> None:
        super().__init__()
        channels, height, width = feature_shape
        self.num_classes, self.nonnegative, self.z_dim = num_classes, nonnegative, z_dim
        self.feature_size = (height, width)
        self.register_buffer("feature_scale", feature_scale.reshape(1, channels, 1, 1).float())
        inputs = z_dim + (num_classes + 1) * DIVISORS[0] ** 2

        def block() -> _Block:
            return _Block(16 * ngf, norm=norm, gain=init_gain)

        self.first = xavier_(nn.Conv2d(inputs, 16 * ngf, 3, padding=1), init_gain)
        self.quarter, self.half_0, self.half_1, self.full = block(), block(), block(), block()
        self.to_features = xavier_(WideConv2d(16 * ngf, channels, 3, padding=1), init_gain)

    @override
    def forward(self, z: Tensor, masks: Tensor) -> Tensor:
        quarter, half, full = (reduced_size(self.feature_size, divisor) for divisor in DIVISORS)
        square = DIVISORS[0]
        size, dtype = (square * quarter[0], square * quarter[1]), autocast_dtype(z)
        labels = F.pixel_unshuffle(
            one_hot(masks, self.num_classes, dtype=dtype, size=size), square
        )  # (B, 16 * (K + 1), h/4, w/4)
        labels = labels.repeat(len(z) // len(masks), 1, 1, 1)
        everywhere = z.to(dtype)[:, :, None, None].expand(-1, -1, *quarter)
        x = self.first(torch.cat([everywhere, labels], dim=1))
        x = self.quarter(x)
        x = F.interpolate(x, size=half, mode="nearest")
        x = self.half_0(x)
        x = self.half_1(x)
        x = F.interpolate(x, size=full, mode="nearest")
        x = self.full(x)
        x = self.to_features(F.leaky_relu(x, 0.2))
        return F.relu(x) if self.nonnegative else x


class _Block(nn.Module):
    """The residual block of SPADE with normalisations that do not read the mask."""

    def __init__(self, channels: int, *, norm: str, gain: float) -> None:
        super().__init__()
        self.norm_0, self.norm_1 = (NORMS[norm](channels, affine=True) for _ in range(2))
        self.conv_0, self.conv_1 = (
            SpectralConv2d(channels, channels, 3, padding=1, gain=gain) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        residual = self.conv_0(F.leaky_relu(self.norm_0(x), 0.2))
        return x + self.conv_1(F.leaky_relu(self.norm_1(residual), 0.2))
