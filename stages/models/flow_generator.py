"""A flow from noise to features, conditioned on the mask (Lipman et al. 2023).

The thesis names diffusion as future work (chapter 6). A flow is its simplest form: a network learns
the velocity that carries noise to features along straight lines, and generating follows it. It
works on the principal components of the features, because a small network cannot learn the
velocity of 2048 channels.

Feature maps are smooth. From white noise a flow first learns to blur, and in few steps little else:
generated features are grainy and vary too little between objects. The noise here has the features'
own spectrum. The network gives the difference from the velocity that carries such noise to a
Gaussian field of the same spectrum (as Karras et al. 2022, section 5, do for diffusion). An
untrained flow generates such fields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from stages.models.blocks import autocast_dtype, one_hot, reduced_size
from stages.models.feature_generator import FeatureGenerator

GROUPS = 8  # of the normalisation


class _Block(nn.Module):
    """A residual block with the mask as further channels and the time as a shift and a scale."""

    def __init__(self, channels: int, width: int, label_channels: int, time_width: int) -> None:
        super().__init__()
        self.norm_0 = nn.GroupNorm(GROUPS if channels % GROUPS == 0 else 1, channels)
        self.conv_0 = nn.Conv2d(channels + label_channels, width, 3, padding=1)
        self.time = nn.Linear(time_width, 2 * width)
        self.norm_1 = nn.GroupNorm(GROUPS if width % GROUPS == 0 else 1, width)
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor, labels: Tensor, time: Tensor) -> Tensor:
        h = self.conv_0(torch.cat([F.silu(self.norm_0(x)), labels], dim=1))
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        return self.shortcut(x) + self.conv_1(F.silu(self.norm_1(h) * (1 + scale) + shift))


class FlowGenerator(FeatureGenerator):
    """A U-Net of three resolutions that gives the velocity, and its integration.

    The resolutions are h, h/2 and h/4, rounded up.

    Parameters
    ----------
    num_classes
        Classes of the masks, void not counted.
    feature_shape
        (C, h, w).
    nonnegative
        Whether the features are >= 0.
    feature_scale
        (C,): what a feature channel is divided by.
    components
        R, the number of principal components.
    width
        Channels of the blocks.
    steps
        Of the integration (midpoint rule: two evaluations each).
    """

    mean: Tensor
    basis: Tensor
    spread: Tensor
    amplitude: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        feature_shape: Sequence[int],
        nonnegative: bool,
        feature_scale: Tensor,
        components: int,
        width: int,
        steps: int,
    ) -> None:
        super().__init__()
        channels, height, width_ = feature_shape
        self.num_classes, self.nonnegative = num_classes, nonnegative
        self.steps, self.width = steps, width
        self.shape = (components, height, width_)
        self.z_dim = components * height * width_
        self.register_buffer("feature_scale", feature_scale.reshape(1, channels, 1, 1).float())
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("basis", torch.eye(channels, components))
        self.register_buffer("spread", torch.ones(components))
        self.register_buffer("amplitude", torch.ones(components, height, width_ // 2 + 1))
        labels = num_classes + 1

        def block(channels: int) -> _Block:
            return _Block(channels, width, labels, width)

        self.time = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.first = nn.Conv2d(components, width, 3, padding=1)
        self.down = nn.ModuleList([block(width), block(width)])
        self.middle = nn.ModuleList([block(width), block(width)])
        self.up = nn.ModuleList([block(2 * width), block(2 * width)])
        self.last = nn.Conv2d(width, components, 3, padding=1)
        nn.init.zeros_(self.last.weight)  # the velocity starts as a Gaussian field's
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def set_components(self, components: tuple[Tensor, Tensor, Tensor]) -> None:
        """Set the principal components of scaled features.

        They are the mean (C,), directions (C, R) and standard deviations (R,).
        """
        for buffer, value in zip((self.mean, self.basis, self.spread), components, strict=True):
            buffer.copy_(value)

    def set_amplitude(self, amplitude: Tensor) -> None:
        """Set the root mean squared spectrum (R, h, w // 2 + 1) of the components."""
        self.amplitude.copy_(amplitude)

    def start(self, z: Tensor) -> Tensor:
        """Turn white noise (B, z_dim) into noise (B, R, h, w) with the components' spectrum."""
        waves = torch.fft.rfft2(z.view(-1, *self.shape).float(), norm="ortho") * self.amplitude
        return torch.fft.irfft2(waves, s=self.shape[1:], norm="ortho")

    def reduce(self, features: Tensor) -> Tensor:
        """Project scaled features (B, C, h, w) to components (B, R, h, w) of unit variance."""
        centred = features - self.mean.view(1, -1, 1, 1)
        return torch.einsum("bchw,cr->brhw", centred, self.basis / self.spread)

    def restore(self, components: Tensor) -> Tensor:
        """Invert :meth:`reduce`, up to what R components do not hold."""
        features = torch.einsum(
            "brhw,cr->bchw", components, self.basis * self.spread
        ) + self.mean.view(1, -1, 1, 1)
        return F.relu(features) if self.nonnegative else features

    def velocity(self, x: Tensor, time: Tensor, masks: Tensor) -> Tensor:
        """Compute the velocity of components (B, R, h, w) at times (B,) in 0..1 under masks.

        For two Gaussian fields of one spectrum and x_t = (1 - t) x_0 + t x_1, the mean of x_1 - x_0
        given x_t is (2 t - 1) / (t^2 + (1 - t)^2) x_t; the network adds to it.
        """
        gaussian = ((2 * time - 1) / (time.square() + (1 - time).square())).view(
            -1, 1, 1, 1
        ) * x.float()
        half = self.width // 2
        frequencies = torch.exp(-math.log(1000) * torch.arange(half, device=x.device) / half)
        angles = 1000 * time[:, None] * frequencies
        embedded = self.time(
            F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, self.width % 2))
        )
        dtype = autocast_dtype(x)
        sizes = [reduced_size(self.shape[1:], divisor) for divisor in (1, 2, 4)]
        labels = [one_hot(masks, self.num_classes, dtype=dtype, size=size) for size in sizes]
        x = self.first(x)
        skips = []
        for block, label in zip(self.down, labels, strict=False):
            x = block(x, label, embedded)
            skips.append(x)
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        for block in self.middle:
            x = block(x, labels[2], embedded)
        for block, label in zip(self.up, reversed(labels[:2]), strict=True):
            x = F.interpolate(x, size=label.shape[-2:], mode="nearest")
            x = block(torch.cat([x, skips.pop()], dim=1), label, embedded)
        return gaussian + self.last(x).float()

    @override
    def forward(self, z: Tensor, masks: Tensor) -> Tensor:
        x = self.start(z)
        return self.restore(self._integrate(x, masks.repeat(len(x) // len(masks), 1, 1)))

    def _integrate(
        self, x: Tensor, masks: Tensor, start: float = 0.0, end: float = 1.0, count: int = 0
    ) -> Tensor:
        """Carry components (B, R, h, w) from time ``start`` to ``end`` by the midpoint rule.

        It takes ``count`` steps; 0: steps of about 1 / ``steps``.
        """
        count = count or max(1, round(self.steps * abs(end - start)))
        step = (end - start) / count
        for number in range(count):
            now = torch.full((len(x),), start + number * step, device=x.device)
            middle = x + step / 2 * self.velocity(x, now, masks)
            x = x + step * self.velocity(middle, now + step / 2, masks)
        return x

    @override
    @torch.no_grad()
    def vary(self, features: Tensor, masks: Tensor, *, z: Tensor, strength: float) -> Tensor:
        # Noise replaces a fraction of the components, and the flow carries them forwards under the
        # masks. SDEdit (Meng et al. 2022, section 3) does it to images; DA-Fusion (Trabucco et al.
        # 2024) augments with it. What the principal components do not hold stays as it is.
        old = self.reduce(features / self.feature_scale).float()
        new = self._integrate(torch.lerp(old, self.start(z), strength), masks, start=1 - strength)
        return self._changed(features, new - old)

    @override
    @torch.no_grad()
    def swap_classes(
        self, features: Tensor, old: Tensor, new: Tensor, *, z: Tensor | None = None
    ) -> Tensor:
        # Back to the noise that the flow makes of the features under the old mask, and forwards
        # under the new one (Su et al. 2023, dual diffusion implicit bridges). Features have their
        # own noise: z is not read, and their swap has one result. Either way takes half as many
        # steps as generating, at least two; there and back under one mask, two steps lose 0.1% of
        # the features' variance. What the principal components do not hold stays as it is.
        times = len(features) // len(old)
        steps = max(2, math.ceil(self.steps / 2))
        before = self.reduce(features / self.feature_scale).float()
        noise = self._integrate(before, old.repeat(times, 1, 1), start=1.0, end=0.0, count=steps)
        return self._changed(
            features, self._integrate(noise, new.repeat(times, 1, 1), count=steps) - before
        )

    def _changed(self, features: Tensor, change: Tensor) -> Tensor:
        """Change features (B, C, h, w) by a change (B, R, h, w) of their components."""
        moved = (
            features
            + torch.einsum("brhw,cr->bchw", change, self.basis * self.spread).float()
            * self.feature_scale
        )
        return F.relu(moved) if self.nonnegative else moved
