"""Flow matching: training of :class:`stages.models.flow_generator.FlowGenerator`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from typing_extensions import Self, override

from featurestore import FeatureStore
from featurestore.dataset import gather_maps
from stages.common.distributed import draw_noise
from stages.common.runtime import Machine
from stages.gan.losses import weighted_mean
from stages.gan.networks import Networks
from stages.gan.objective import Step
from stages.gan.trainer import Trainer
from stages.models.flow_generator import FlowGenerator
from stages.segmentation.folds import Folds

VECTORS = 20_000  # number of vectors that the principal components are computed from
MAPS = 500  # number of maps that the spectrum of the components is computed from


def principal_components(
    store: FeatureStore, scale: Tensor, count: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the first ``count`` principal components of a sample of scaled feature vectors.

    Parameters
    ----------
    store
        Store of the training features.
    scale
        (C,) by which features are divided first.
    count
        R.
    seed
        Of the sample.

    Returns
    -------
    mean (C,), directions (C, R), standard deviations (R,)
    """
    rng = np.random.default_rng([seed, 1])
    samples = rng.permutation(len(store))[: min(len(store), 500)]
    each = -(-VECTORS // len(samples))
    sampled = []
    for position in samples:
        pixels = gather_maps(store, [int(position)])[0].flatten(1).numpy()  # (C, h*w)
        sampled.append(pixels[:, rng.permutation(pixels.shape[1])[:each]].T)
    vectors = torch.from_numpy(np.concatenate(sampled)) / scale.cpu()  # (n, C)
    mean = vectors.mean(0)
    values, directions = torch.linalg.eigh(
        (vectors - mean).T.double() @ (vectors - mean).double() / (len(vectors) - 1)
    )
    values, directions = values.flip(0).clamp(min=0), directions.flip(1)
    return mean, directions[:, :count].float(), values[:count].sqrt().clamp(min=1e-6).float()


def mean_amplitude(store: FeatureStore, flow: FlowGenerator, seed: int) -> Tensor:
    """Compute the root mean squared spectrum (R, h, w // 2 + 1) of a sample of maps."""
    rng = np.random.default_rng([seed, 2])
    samples = rng.permutation(len(store))[:MAPS]
    power = torch.zeros_like(flow.amplitude)
    for position in samples:
        features = gather_maps(store, [int(position)], power.device)
        waves = torch.fft.rfft2(flow.reduce(features / flow.feature_scale), norm="ortho")
        power += waves[0].abs().square() / len(samples)
    return power.sqrt()


class FlowTrainer(Trainer):
    """A flow with its Adam: regress the velocity of straight lines from noise to features.

    The loss is that of Lipman et al. 2023, section 4.1.

    Parameters
    ----------
    networks
        Networks whose generator is a flow.
    lr, betas
        Of the Adam.
    ema_decay, machine
        See :class:`stages.gan.trainer.Trainer`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        networks: Networks,
        *,
        lr: float,
        betas: tuple[float, float],
        ema_decay: float = 0.0,
        machine: Machine | None = None,
    ) -> None:
        super().__init__(accelerator, networks, ema_decay=ema_decay, machine=machine)
        self.flow = cast(FlowGenerator, networks.generator)
        adam = torch.optim.Adam(self.generator_parameters, lr, betas, fused=True)
        self.optimizers = {"generator": adam}

    @override
    @classmethod
    def of(
        cls,
        accelerator: Accelerator,
        networks: Networks,
        settings: Mapping[str, Any],
        machine: Machine,
        folds: Folds,
    ) -> Self:
        return cls(
            accelerator,
            networks,
            lr=settings["generator_lr"],
            betas=settings["betas"],
            ema_decay=settings["ema_decay"],
            machine=machine,
        )

    @override
    @staticmethod
    def fit(networks: Networks, store: FeatureStore, settings: Mapping[str, Any]) -> None:
        flow, seed = cast(FlowGenerator, networks.generator), settings["seed"]
        scale = flow.feature_scale.flatten()
        flow.set_components(principal_components(store, scale, settings["flow_components"], seed))
        flow.set_amplitude(mean_amplitude(store, flow, seed))

    @override
    def forward(
        self,
        features: Tensor,
        masks: Tensor,
        images: Tensor | None,
        *,
        weights: Tensor | None = None,
        ratio: int = 1,
        rng: torch.Generator,
    ) -> Step:
        # No features are generated; ``ratio`` lines lead to each sample.
        flow = self.flow
        target = flow.reduce(features.float() / flow.feature_scale).repeat(ratio, 1, 1, 1)
        noise = draw_noise(rng, ratio, len(features), flow.z_dim + 1, target.device)
        time = torch.special.ndtr(noise[:, -1])  # uniform in 0..1
        start = flow.start(noise[:, :-1])
        now = torch.lerp(start, target, time.view(-1, 1, 1, 1))
        with self.accelerator.autocast():
            velocity = self.modules["generator"](now, time, masks.repeat(ratio, 1, 1))
        loss = weighted_mean((velocity - (target - start)).square(), weights)
        return Step(target[:0], loss, torch.zeros_like(loss), {"generator/flow": loss.detach()})

    @override
    def _called(self, network: nn.Module) -> nn.Module:
        return _Velocity(cast(FlowGenerator, network))


class _Velocity(nn.Module):
    """The velocity of a flow as a module's forward, through which processes share gradients."""

    def __init__(self, flow: FlowGenerator) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, time: Tensor, masks: Tensor) -> Tensor:
        return self.flow.velocity(x, time, masks)
