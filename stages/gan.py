"""FeatureGAN as a whole: its three networks, their losses on a batch, and one update of Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from featurestore import FeatureStore
from stages import losses
from stages.models.discriminator import Discriminator
from stages.models.generator import Generator
from stages.models.image_encoder import ImageEncoder, sample_z

CLIP = 0.01  # Arjovsky et al. 2017
PENALTY = 10.0  # Gulrajani et al. 2017


@dataclass
class Networks:
    """The networks of a FeatureGAN; the image encoder is optional."""

    generator: Generator
    discriminator: Discriminator
    image_encoder: ImageEncoder | None

    def by_name(self) -> dict[str, nn.Module]:
        """Those that exist, by the names of their files."""
        named = {"generator": self.generator, "discriminator": self.discriminator, "image_encoder": self.image_encoder}
        return {name: network for name, network in named.items() if network is not None}


@dataclass(frozen=True)
class Objective:
    """What the GAN is trained for.

    Attributes
    ----------
    adversarial_loss
        ``hinge``, ``wasserstein-clip`` or ``wasserstein-gp``.
    lambda_feat, lambda_kld
        Weights of the feature matching and KLD losses.
    """

    adversarial_loss: str
    lambda_feat: float
    lambda_kld: float


def build_networks(architecture: Mapping[str, Any], feature_scale: Tensor | None = None) -> Networks:
    """Fresh networks.

    Parameters
    ----------
    architecture
        As :func:`describe` gives it.
    feature_scale
        (C,); None where a state dict will bring it.
    """
    settings = dict(architecture)
    shared = {"num_classes": settings["num_classes"], "init_gain": settings["init_gain"]}
    channels = settings["feature_shape"][0]
    scale = torch.ones(channels) if feature_scale is None else feature_scale
    generator = Generator(
        feature_shape=tuple(settings["feature_shape"]),
        nonnegative=settings["nonnegative"],
        feature_scale=scale,
        z_dim=settings["z_dim"],
        ngf=settings["ngf"],
        spade_hidden=settings["spade_hidden"],
        norm=settings["norm"],
        **shared,
    )
    discriminator = Discriminator(
        feature_channels=channels,
        output_stride=settings["output_stride"],
        ndf=settings["ndf"],
        layers=settings["discriminator_layers"],
        **shared,
    )
    encoder = None
    if settings["image_encoder"]:
        encoder = ImageEncoder(z_dim=settings["z_dim"], nef=settings["nef"], init_gain=settings["init_gain"])
    return Networks(generator, discriminator, encoder)


def feature_scale(store: FeatureStore, rule: str) -> Tensor:
    """(C,) by which features are divided before the GAN sees them.

    ``channel``: each channel's root mean square, ``global``: that over all channels, ``none``: 1. A channel that is
    always zero keeps the scale 1.
    """
    mean_square = torch.from_numpy(store.stats.mean**2 + store.stats.variance)
    if rule == "none":
        return torch.ones(len(mean_square))
    if rule == "global":
        mean_square = mean_square.mean().expand(len(mean_square))
    scale = mean_square.sqrt()
    return torch.where(scale > 0, scale, 1.0).float()


@dataclass
class Step:
    """One batch through the GAN: the generated features and the losses, not yet back-propagated.

    Attributes
    ----------
    fake
        (k*B, C, h, w) scaled features; draw j of mask i is row j*B + i.
    generator_loss, discriminator_loss
        The sums to back-propagate.
    terms
        Every single loss, detached, by its name in the logs.
    """

    fake: Tensor
    generator_loss: Tensor
    discriminator_loss: Tensor
    terms: dict[str, Tensor]


def forward(
    networks: Networks,
    objective: Objective,
    *,
    real: Tensor,
    masks: Tensor,
    images: Tensor | None,
    ratio: int,
    rng: torch.Generator,
) -> Step:
    """Generate, discriminate, and sum the losses of Algorithm 1 up to the segmentation terms.

    The discriminator runs once, over real and generated features together, and that
    pass serves both updates, as in Algorithm 1.

    Parameters
    ----------
    real
        (B, C, h, w) scaled features.
    masks
        (B, H, W) uint8.
    images
        (B, 3, H, W) uint8, where there is an image encoder.
    ratio
        Draws of z a mask.
    rng
        Source of z, on the tensors' device.
    """
    generator, discriminator = networks.generator, networks.discriminator
    batch, z_dim = len(real), networks.generator.z_dim
    terms: dict[str, Tensor] = {}

    # Noise, and features generated from it.
    z = torch.randn(ratio * batch, z_dim, generator=rng, device=real.device)
    extra = real.new_zeros(())
    if networks.image_encoder is not None:
        assert images is not None
        mu, logvar = networks.image_encoder(images)
        mu, logvar = mu.float(), logvar.float()
        z = sample_z(mu.repeat(ratio, 1), logvar.repeat(ratio, 1), z)
        terms["generator/kld"] = losses.kl_divergence(mu, logvar)
        extra = objective.lambda_kld * terms["generator/kld"]
    fake = generator(z, masks)

    # Scores of both, and each layer's activations.
    scores, layers = discriminator(torch.cat([real.to(fake.dtype), fake]), masks)
    scores = scores.float()
    terms["generator/adversarial"] = losses.generator_adversarial(scores[batch:])
    matched = losses.feature_matching([layer[:batch].float() for layer in layers], [layer[batch:].float() for layer in layers])
    terms["generator/feature_matching"] = matched
    two_terms = losses.hinge_discriminator if objective.adversarial_loss == "hinge" else losses.wasserstein_discriminator
    terms["discriminator/real"], terms["discriminator/fake"] = two_terms(scores[:batch], scores[batch:])
    discriminator_loss = terms["discriminator/real"] + terms["discriminator/fake"]
    if objective.adversarial_loss == "wasserstein-gp":
        mix = torch.rand(batch, generator=rng, device=real.device)
        penalty = losses.gradient_penalty(lambda x: discriminator(x, masks)[0], real, fake[:batch].float(), mix)
        terms["discriminator/gradient_penalty"] = penalty
        discriminator_loss = discriminator_loss + PENALTY * penalty
    generator_loss = terms["generator/adversarial"] + objective.lambda_feat * matched + extra
    return Step(fake, generator_loss, discriminator_loss, {name: term.detach() for name, term in terms.items()})


class Trainer:
    """The networks with their two Adams, on the accelerator's device.

    Parameters
    ----------
    networks
        Fresh or loaded ones.
    objective
        The losses.
    generator_lr, discriminator_lr, betas
        Of the Adams (thesis: 2e-4, 8e-4, (0, 0.9)).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        networks: Networks,
        objective: Objective,
        *,
        generator_lr: float,
        discriminator_lr: float,
        betas: tuple[float, float],
    ) -> None:
        self.accelerator = accelerator
        self.networks = networks
        self.objective = objective
        for network in networks.by_name().values():
            network.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            network.train()
        trained = [networks.generator, *([networks.image_encoder] if networks.image_encoder is not None else [])]
        self.generator_parameters = [parameter for network in trained for parameter in network.parameters()]
        self.discriminator_parameters = list(networks.discriminator.parameters())
        self.generator_optimizer = torch.optim.Adam(self.generator_parameters, generator_lr, betas)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator_parameters, discriminator_lr, betas)

    def forward(self, features: Tensor, masks: Tensor, images: Tensor | None, *, ratio: int, rng: torch.Generator) -> Step:
        """:func:`forward` on features (B, C, h, w) in the backbone's scale, under the accelerator's precision."""
        real = (features.float() / self.networks.generator.feature_scale).contiguous(memory_format=torch.channels_last)
        with self.accelerator.autocast():
            return forward(self.networks, self.objective, real=real, masks=masks, images=images, ratio=ratio, rng=rng)

    def update(self, step: Step, *, extra_loss: Tensor | None = None, also: list[Tensor] | None = None) -> None:
        """Back-propagate both losses and step both optimizers.

        Both gradients are taken before either network moves: Algorithm 1 computes all
        scores first. Each is taken for its own parameters alone, so nothing is computed
        to be thrown away.

        Parameters
        ----------
        extra_loss
            Added to the generator's loss (the segmentation terms of the second branch).
        also
            Further parameters of that loss (the decoder's), for which gradients are wanted; their optimizer is the caller's.
        """
        total = step.generator_loss if extra_loss is None else step.generator_loss + extra_loss
        self.generator_optimizer.zero_grad()
        self.discriminator_optimizer.zero_grad()
        # The discriminator's goes first: the larger graph is then freed by its own back-propagation.
        self.accelerator.backward(step.discriminator_loss, inputs=self.discriminator_parameters, retain_graph=True)
        self.accelerator.backward(total, inputs=[*self.generator_parameters, *(also or [])])
        self.generator_optimizer.step()
        self.discriminator_optimizer.step()
        if self.objective.adversarial_loss == "wasserstein-clip":
            with torch.no_grad():
                for parameter in self.discriminator_parameters:
                    parameter.clamp_(-CLIP, CLIP)

    def state(self) -> dict[str, Any]:
        """Weights and optimizer states, for a checkpoint."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.by_name().items()},
            "optimizers": self.optimizer_state(),
        }

    def optimizer_state(self) -> dict[str, Any]:
        """States of the two Adams."""
        return {"generator": self.generator_optimizer.state_dict(), "discriminator": self.discriminator_optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        for name, network in self.networks.by_name().items():
            network.load_state_dict(state["networks"][name])
        self.load_optimizer_state(state["optimizers"])

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`optimizer_state`."""
        self.generator_optimizer.load_state_dict(state["generator"])
        self.discriminator_optimizer.load_state_dict(state["discriminator"])
