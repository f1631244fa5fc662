"""A conditional VAE of each class's features (Sohn et al. 2015; Kumar et al. 2019)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from featurestore.dataset import Batch
from stages.augment.base import Context, RegionAugmenter, SourceConfig, VariantConfig
from stages.common.runtime import generator as random_generator
from stages.gan.losses import kl_divergence
from stages.segmentation.regions import Regions

VECTORS = 128  # a step


class CVAEConfig(SourceConfig):
    """Size and training of the conditional VAE."""

    augmenter: Literal["cvae"]
    latent: int = Field(16, ge=1, description="latent dimensions")
    hidden: int = Field(256, ge=1, description="hidden units")
    fit_steps: int = Field(1000, ge=1, description="training steps before the decoder's")

    needs_stored_features: ClassVar[bool] = True


class CVAE(nn.Module):
    """Encoder of vectors (n, C) and classes (n,) to z (n, latent), and decoder back.

    Vectors are in units of the channels' standard deviations.
    """

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
        """Compute mean and log-variance, each (n, latent), of vectors (n, C), classes (n,)."""
        inputs = torch.cat([vectors, F.one_hot(classes, self.num_classes)], 1)
        return self.encoder(inputs).chunk(2, 1)

    def decode(self, z: Tensor, classes: Tensor) -> Tensor:
        """Compute vectors (n, C) of z (n, latent) and classes (n,)."""
        return self.decoder(torch.cat([z, F.one_hot(classes, self.num_classes)], 1))


def fit(model: CVAE, vectors: Tensor, classes: Tensor, steps: int, rng: torch.Generator) -> None:
    """Maximise the evidence lower bound with unit variance of the output.

    The loss is squared error / 2 + KL divergence, averaged over vectors.

    Parameters
    ----------
    model
        Is trained in place.
    vectors, classes
        Training samples (N, C) and (N,).
    steps
        Number of steps of Adam.
    rng
        Source of all random numbers, on the vectors' device.
    """
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    size = (min(VECTORS, len(vectors)),)
    for _ in range(steps):
        chosen = torch.randint(len(vectors), size, generator=rng, device=vectors.device)
        mu, logvar = model.encode(vectors[chosen], classes[chosen])
        z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=rng, device=mu.device)
        error = (model.decode(z, classes[chosen]) - vectors[chosen]).square().sum(1).mean() / 2
        loss = error + kl_divergence(mu, logvar)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class CVAEAugmenter(RegionAugmenter):
    """``x - m + s`` with m the centre of x's region and s drawn from the model of its class.

    The model is fitted to the centres of all training regions before the decoder's training. A seed
    always fits the same model: a resumed run needs no state of it.
    """

    config: CVAEConfig

    def __init__(self, config: VariantConfig, context: Context) -> None:
        super().__init__(config, context)
        device, classes = self.accelerator.device, self.spec.num_classes
        statistics = context.class_statistics()
        self.scale = torch.from_numpy(self.store.stats.std).float().clamp(min=1e-6).to(device)
        centres = torch.cat(statistics.centres) / self.scale
        labels = torch.arange(classes, device=device).repeat_interleave(statistics.images)
        sizes = {"latent": self.config.latent, "hidden": self.config.hidden}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            model = CVAE(channels=centres.shape[1], num_classes=classes, **sizes)
        self.model = model.to(device)
        rng = random_generator(device, context.seed, 1)
        fit(self.model, centres, labels, self.config.fit_steps, rng)

    @override
    def shifts(self, batch: Batch, regions: Regions, rng: torch.Generator) -> Tensor:
        device, size = batch.features.device, regions.present.shape  # (B, K)
        z = torch.randn(size.numel(), self.config.latent, generator=rng, device=device)
        classes = torch.arange(size[1], device=device).repeat(size[0])
        drawn = (self.model.decode(z, classes) * self.scale).unflatten(0, size)  # (B, K, C)
        return drawn - regions.centres
