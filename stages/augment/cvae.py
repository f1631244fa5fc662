"""A conditional variational auto-encoder of each class's features (Sohn et al. 2015; Kumar et al. 2019)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, Labelled, SourceConfig
from stages.common.runtime import generator as random_generator
from stages.gan.losses import kl_divergence
from stages.segmentation.class_statistics import ClassStatistics
from stages.segmentation.regions import Regions

VECTORS = 128  # a step


class CVAEConfig(SourceConfig):
    """Variant ``cvae``."""

    augmenter: Literal["cvae"]
    latent: int = Field(default=16, ge=1)
    hidden: int = Field(default=256, ge=1)
    fit_steps: int = Field(default=1000, ge=1)


class CVAE(nn.Module):
    """Vectors (n, C) with their classes (n,) to a normal distribution of (n, latent), and back."""

    def __init__(self, *, channels: int, num_classes: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.latent, self.num_classes = latent, num_classes
        self.encoder = nn.Sequential(
            nn.Linear(channels + num_classes, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent + num_classes, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )

    def encode(self, vectors: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (n, C) in units of the channels' deviations, classes (n,) -> mean and log-variance, each (n, latent)."""
        mu, logvar = self.encoder(
            torch.cat([vectors, F.one_hot(classes, self.num_classes)], 1)
        ).chunk(2, 1)
        return mu, logvar

    def decode(self, z: Tensor, classes: Tensor) -> Tensor:
        """z (n, latent), classes (n,) -> vectors (n, C) in units of the channels' deviations."""
        decoded: Tensor = self.decoder(torch.cat([z, F.one_hot(classes, self.num_classes)], 1))
        return decoded


def fit(model: CVAE, vectors: Tensor, classes: Tensor, steps: int, rng: torch.Generator) -> None:
    """Maximise the evidence lower bound with unit variance of the output: squared error / 2 + KL divergence, a vector.

    ``vectors`` (N, C) in units of the channels' deviations and ``classes`` (N,) are what it learns.
    """
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        chosen = torch.randint(
            len(vectors), (min(VECTORS, len(vectors)),), generator=rng, device=vectors.device
        )
        mu, logvar = model.encode(vectors[chosen], classes[chosen])
        z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=rng, device=mu.device)
        error = (model.decode(z, classes[chosen]) - vectors[chosen]).square().sum(1).mean() / 2
        loss = error + kl_divergence(mu, logvar)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class CVAEAugmenter(Augmenter):
    """``x - m + s`` with m the centre of x's region and s a vector drawn from the model of its class's centres.

    The model is fitted once, before the decoder's training, to the centres of all training regions in units of the
    channels' deviations; the same seed fits the same model, so that a resumed run needs no state of it.
    """

    def __init__(self, config: CVAEConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config = config
        self.num_classes, self.nonnegative = (
            context.store.spec.num_classes,
            context.store.spec.nonnegative,
        )
        device = context.accelerator.device
        statistics = ClassStatistics.of(context.store, context.positions, device)
        self.scale = torch.from_numpy(context.store.stats.std).float().clamp(min=1e-6).to(device)
        centres = torch.cat(statistics.centres) / self.scale
        classes = torch.arange(self.num_classes, device=device).repeat_interleave(statistics.images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            sizes = {"latent": config.latent, "hidden": config.hidden}
            self.model = CVAE(channels=centres.shape[1], num_classes=self.num_classes, **sizes).to(
                device
            )
        fit(
            self.model,
            centres,
            classes,
            config.fit_steps,
            random_generator(device, context.seed, 1),
        )

    @torch.no_grad()
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """One copy with every region's centre drawn anew."""
        regions = Regions.of(batch.features, batch.masks, self.num_classes)
        z = torch.randn(
            len(batch) * self.num_classes,
            self.config.latent,
            generator=rng,
            device=batch.features.device,
        )
        classes = torch.arange(self.num_classes, device=z.device).repeat(len(batch))
        drawn = (self.model.decode(z, classes) * self.scale).unflatten(
            0, (len(batch), self.num_classes)
        )  # (B, K, C)
        moved = regions.moved(drawn - regions.centres, nonnegative=self.nonnegative)
        return Augmented([Labelled(moved, [(batch.masks, 1.0)], self.config.weight)])
