"""The thesis's method as it is written, without optimizations, for ``benchmarks/train.py``.

The networks have the project's widths. Like SPADE's code they embed the mask for every generated
sample and every pass, with separate convolutions for gamma and beta, in PyTorch's default layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

UP = {"scale_factor": 2, "mode": "nearest"}


def one_hot(masks: Tensor, num_classes: int) -> Tensor:
    """(B, H, W) uint8, 255 = void -> (B, num_classes + 1, H, W) float."""
    labels = masks.long()
    labels[labels == 255] = num_classes
    return F.one_hot(labels, num_classes + 1).permute(0, 3, 1, 2).float()


class SPADE(nn.Module):
    """Park et al. 2019, figure 2."""

    def __init__(self, channels: int, label_channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.shared = nn.Sequential(nn.Conv2d(label_channels, hidden, 3, padding=1), nn.ReLU())
        self.gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        embedded = self.shared(F.interpolate(labels, size=x.shape[2:], mode="nearest"))
        return self.norm(x) * (1 + self.gamma(embedded)) + self.beta(embedded)


class Block(nn.Module):
    """A SPADE residual block of equal widths."""

    def __init__(self, channels: int, label_channels: int, hidden: int) -> None:
        super().__init__()
        self.spades = nn.ModuleList(SPADE(channels, label_channels, hidden) for _ in range(2))
        self.convs = nn.ModuleList(
            spectral_norm(nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2)
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        out = x
        for spade, conv in zip(self.spades, self.convs, strict=True):
            out = conv(F.leaky_relu(spade(out, labels), 0.2))
        return x + out


class Generator(nn.Module):
    """Thesis figure 3.3."""

    def __init__(
        self, shape: tuple[int, int, int], num_classes: int, z_dim: int, ngf: int, hidden: int
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.start = (16 * ngf, height // 4, width // 4)
        self.noise = nn.Linear(z_dim, self.start[0] * self.start[1] * self.start[2])
        self.blocks = nn.ModuleList(Block(16 * ngf, num_classes + 1, hidden) for _ in range(4))
        self.last = nn.Conv2d(16 * ngf, channels, 3, padding=1)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        x = self.noise(z).view(-1, *self.start)
        x = F.interpolate(self.blocks[0](x, labels), **UP)
        x = F.interpolate(self.blocks[2](self.blocks[1](x, labels), labels), **UP)
        return F.relu(self.last(F.leaky_relu(self.blocks[3](x, labels), 0.2)))


class Discriminator(nn.Module):
    """Thesis figure 3.5."""

    def __init__(self, channels: int, num_classes: int, ndf: int) -> None:
        super().__init__()

        def conv(before: int, after: int, stride: int) -> nn.Module:
            return spectral_norm(
                nn.Conv2d(before, after, 4, stride, padding=1 if stride == 2 else 2)
            )

        self.mask = nn.ModuleList(
            [conv(num_classes + 1, ndf, 2), conv(ndf, ndf, 2), conv(ndf, ndf, 2)]
        )
        self.layers = nn.ModuleList(
            [conv(channels + ndf, 4 * ndf, 2), conv(4 * ndf, 8 * ndf, 2), conv(8 * ndf, 8 * ndf, 1)]
        )
        self.norms = nn.ModuleList(
            [nn.Identity(), nn.InstanceNorm2d(8 * ndf), nn.InstanceNorm2d(8 * ndf)]
        )
        self.last = conv(8 * ndf, 1, 1)

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        for layer in self.mask:
            labels = F.leaky_relu(layer(labels), 0.2)
        x, layers = torch.cat([features, labels], 1), []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.leaky_relu(norm(layer(x)), 0.2)
            layers.append(x)
        return self.last(x), layers


class Training:
    """Algorithm 1's iteration, line by line; with a decoder it is the second branch's."""

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        decoder: nn.Module | None,
        num_classes: int,
    ) -> None:
        self.generator, self.discriminator, self.decoder, self.num_classes = (
            generator,
            discriminator,
            decoder,
            num_classes,
        )
        self.generator_optimizer = torch.optim.Adam(generator.parameters(), 2e-4, (0.0, 0.9))
        self.discriminator_optimizer = torch.optim.Adam(
            discriminator.parameters(), 8e-4, (0.0, 0.9)
        )
        self.decoder_optimizer = (
            None if decoder is None else torch.optim.Adam(decoder.parameters(), 5e-4)
        )

    def step(self, features: Tensor, masks: Tensor, z: Tensor, autocast: torch.autocast) -> None:
        """One iteration on a batch; ``z`` holds as many draws a mask as its length says."""
        ratio = len(z) // len(masks)
        labels = one_hot(masks, self.num_classes)
        many = labels.repeat(ratio, 1, 1, 1)

        # Train the generator (and the segmentation model).
        with autocast:
            fake = self.generator(z, many)
            _, real_layers = self.discriminator(features, labels)
            scores, fake_layers = self.discriminator(fake, many)
            loss = -scores.float().mean()
            for real, made in zip(real_layers, fake_layers, strict=True):
                loss = loss + 7.0 * F.l1_loss(
                    made.float(), real.detach().float().repeat(ratio, 1, 1, 1)
                )
            if self.decoder is not None:
                for some in (features, *fake.chunk(ratio)):
                    loss = loss + F.cross_entropy(
                        self.decoder(some, masks.shape[-2:]).float(), masks.long(), ignore_index=255
                    )
        self.generator_optimizer.zero_grad()
        if self.decoder_optimizer is not None:
            self.decoder_optimizer.zero_grad()
        loss.backward()
        self.generator_optimizer.step()
        if self.decoder_optimizer is not None:
            self.decoder_optimizer.step()

        # Train the discriminator.
        with autocast:
            real_scores, _ = self.discriminator(features, labels)
            fake_scores, _ = self.discriminator(fake.detach(), many)
            loss = F.relu(1 - real_scores.float()).mean() + F.relu(1 + fake_scores.float()).mean()
        self.discriminator_optimizer.zero_grad()
        loss.backward()
        self.discriminator_optimizer.step()


class DecoderTraining:
    """The baseline: a decoder and Adam, with PyTorch's interpolation and cross-entropy."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        self.optimizer = torch.optim.Adam(decoder.parameters(), 5e-4)

    def step(self, features: Tensor, masks: Tensor, autocast: torch.autocast) -> None:
        """Take one step on features (B, C, h, w) float32 and masks (B, H, W) uint8."""
        with autocast:
            logits = self.decoder(features, masks.shape[-2:])
            loss = F.cross_entropy(logits.float(), masks.long(), ignore_index=255)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
