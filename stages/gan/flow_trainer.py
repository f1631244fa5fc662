"""Flow matching: training of :class:`stages.models.flow_generator.FlowGenerator`, with the interface of a GAN's trainer."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from featurestore import FeatureStore
from stages.common.distributed import draw_noise
from stages.gan.networks import Networks
from stages.gan.objective import Step
from stages.gan.trainer import Trainer
from stages.models.flow_generator import FlowGenerator

VECTORS = 20_000  # from which the principal components are computed
MAPS = 500  # from which their spectrum is


def principal_components(
    store: FeatureStore, scale: Tensor, count: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``count`` principal components of a store's scaled feature vectors, from a sample of them.

    Parameters
    ----------
    store
        The store.
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
    parts = []
    for position in samples:
        pixels = store.features(int(position)).reshape(len(scale), -1)  # (C, h*w)
        parts.append(pixels[:, rng.permutation(pixels.shape[1])[:each]].T.astype(np.float32))
    vectors = torch.from_numpy(np.concatenate(parts)) / scale.cpu()  # (n, C)
    mean = vectors.mean(0)
    values, directions = torch.linalg.eigh(
        (vectors - mean).T.double() @ (vectors - mean).double() / (len(vectors) - 1)
    )
    values, directions = values.flip(0).clamp(min=0), directions.flip(1)
    return mean, directions[:, :count].float(), values[:count].sqrt().clamp(min=1e-6).float()


def mean_amplitude(store: FeatureStore, flow: FlowGenerator, seed: int) -> Tensor:
    """(R, h, w // 2 + 1): the root of the mean squared spectrum of the components of a store's maps, from a sample of them."""
    rng = np.random.default_rng([seed, 2])
    samples = rng.permutation(len(store))[:MAPS]
    power = torch.zeros_like(flow.amplitude)
    for position in samples:
        features = torch.from_numpy(store.features(int(position)).astype(np.float32))[None].to(
            power.device
        )
        waves = torch.fft.rfft2(flow.reduce(features / flow.feature_scale), norm="ortho")
        power += waves[0].abs().square() / len(samples)
    return power.sqrt()


class FlowTrainer(Trainer):
    """A flow with its Adam: regress the velocity of straight lines from noise to features (Lipman et al. 2023, section 4.1).

    Parameters
    ----------
    networks
        Whose generator is a flow.
    lr, betas
        Of the Adam.
    ema_decay, compile_networks, sharded
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
        compile_networks: bool = False,
        sharded: bool = False,
    ) -> None:
        super().__init__(
            accelerator,
            networks,
            ema_decay=ema_decay,
            compile_networks=compile_networks,
            sharded=sharded,
        )
        assert isinstance(networks.generator, FlowGenerator)
        self.flow = networks.generator
        self.optimizers = {
            "generator": torch.optim.Adam(self.flow.parameters(), lr, betas, fused=True)
        }

    def forward(
        self,
        features: Tensor,
        masks: Tensor,
        images: Tensor | None,
        *,
        ratio: int,
        rng: torch.Generator,
    ) -> Step:
        """The loss of a batch; no features are generated, and ``ratio`` lines lead to each sample."""
        target = self.flow.reduce(features.float() / self.flow.feature_scale).repeat(ratio, 1, 1, 1)
        noise = draw_noise(rng, ratio, len(features), self.flow.z_dim + 1, target.device)
        time = torch.special.ndtr(noise[:, -1])  # uniform in 0..1
        start = self.flow.start(noise[:, :-1])
        now = torch.lerp(start, target, time.view(-1, 1, 1, 1))
        with self.accelerator.autocast():
            velocity = self.modules["generator"](now, time, masks.repeat(ratio, 1, 1))
        loss = F.mse_loss(velocity, target - start)
        return Step(target[:0], loss, torch.zeros_like(loss), {"generator/flow": loss.detach()})

    def update(self, step: Step) -> None:
        """Back-propagate and step."""
        self.accelerator.backward(step.generator_loss)
        self._step()

    def _called(self, name: str, network: nn.Module) -> nn.Module:
        """Training calls the velocity, not the integration."""
        return _Velocity(network)


class _Velocity(nn.Module):
    """The velocity of a flow as a module's forward, through which processes share its gradients."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, time: Tensor, masks: Tensor) -> Tensor:
        return self.flow.velocity(x, time, masks)  # type: ignore[operator]
