"""What FeatureGAN is trained for: one batch through its networks, and the losses of Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.gan import losses
from stages.models.image_encoder import sample_z
from stages.segmentation.regions import labels_at
from stages.segmentation.transforms import augment

PENALTY = 10.0  # Gulrajani et al. 2017


@dataclass(frozen=True)
class Objective:
    """The losses and their weights.

    Attributes
    ----------
    adversarial_loss
        A name in :data:`stages.gan.losses.ADVERSARIAL`.
    lambda_feat, lambda_kld
        Weights of the feature matching and KLD losses.
    lambda_rec
        Weight of the mean squared difference between generated features and the real ones of the same mask; 0: none.
    r1_gamma, r1_every
        Weight of R1, which is added every so many steps with so many times its weight (Karras et al. 2020, appendix B); 0: never.
    diffaugment
        Names in :data:`stages.segmentation.transforms.TRANSFORMS`: what is done to features and masks in front of the discriminator.
    """

    adversarial_loss: str = "hinge"
    lambda_feat: float = 7.0
    lambda_kld: float = 0.05
    lambda_rec: float = 0.0
    r1_gamma: float = 0.0
    r1_every: int = 16
    diffaugment: tuple[str, ...] = ()


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
    objective: Objective,
    *,
    generator: nn.Module,
    discriminator: nn.Module,
    image_encoder: nn.Module | None,
    real: Tensor,
    masks: Tensor,
    images: Tensor | None,
    noise: Tensor,
    rng: torch.Generator,
    step: int,
) -> Step:
    """Generate, discriminate, and sum the losses of Algorithm 1 up to the segmentation terms.

    The discriminator is called once, and that call serves both updates, as in Algorithm 1.

    Parameters
    ----------
    generator, discriminator, image_encoder
        The networks, as the accelerator wraps them.
    real
        (B, C, h, w) scaled features.
    masks
        (B, H, W) uint8.
    images
        (B, 3, H, W) uint8, where there is an image encoder.
    noise
        (k*B, z_dim) from N(0, I), k draws a mask.
    rng
        Source of all other random numbers, on the tensors' device.
    step
        Number of the step, for what is done every so many.
    """
    terms: dict[str, Tensor] = {}

    # Features generated from noise.
    z, extra = noise, real.new_zeros(())
    if image_encoder is not None:
        mu, logvar = (part.float() for part in image_encoder(images))
        ratio = len(noise) // len(real)
        z = sample_z(mu.repeat(ratio, 1), logvar.repeat(ratio, 1), noise)
        terms["generator/kld"] = losses.kl_divergence(mu, logvar)
        extra = objective.lambda_kld * terms["generator/kld"]
    fake = generator(z, masks)
    if objective.lambda_rec:
        terms["generator/reconstruction"] = losses.reconstruction(real, fake)
        extra = extra + objective.lambda_rec * terms["generator/reconstruction"]

    # Scores of both, and each layer's activations; averaged over the discriminator's scales.
    (real_seen, fake_seen), masks_seen = augment([real, fake], masks, objective.diffaugment, rng)
    of_real, of_fake = discriminator([real_seen, fake_seen], masks_seen)
    labels = labels_at(masks_seen, (real.shape[2], real.shape[3]))
    discriminator_terms, generator_term = losses.ADVERSARIAL[objective.adversarial_loss]
    pairs = list(zip(of_real.scores, of_fake.scores, strict=True))
    by_scale = [discriminator_terms(ours.float(), theirs.float(), labels) for ours, theirs in pairs]
    terms["discriminator/real"], terms["discriminator/fake"] = (
        torch.stack(term).mean() for term in zip(*by_scale, strict=True)
    )
    terms["generator/adversarial"] = torch.stack(
        [generator_term(theirs.float(), labels) for _, theirs in pairs]
    ).mean()
    layers = [[layer.float() for layer in side.layers] for side in (of_real, of_fake)]
    terms["generator/feature_matching"] = losses.feature_matching(*layers) / len(pairs)
    terms.update(_accuracies(objective, pairs, labels))

    # Penalties on the discriminator's gradient.
    discriminator_loss = terms["discriminator/real"] + terms["discriminator/fake"]

    def score(features: Tensor) -> Tensor:
        (judgement,) = discriminator([features], masks_seen)
        return torch.cat([scores.flatten(1) for scores in judgement.scores], dim=1)

    if objective.adversarial_loss == "wasserstein-gp":
        mix = torch.rand(len(real), generator=rng, device=real.device)
        terms["discriminator/gradient_penalty"] = losses.gradient_penalty(
            score, real_seen, fake_seen[: len(real)].float(), mix
        )
        discriminator_loss = discriminator_loss + PENALTY * terms["discriminator/gradient_penalty"]
    if objective.r1_gamma and step % objective.r1_every == 0:
        terms["discriminator/r1"] = losses.r1_penalty(score, real_seen)
        discriminator_loss = (
            discriminator_loss
            + objective.r1_every * objective.r1_gamma / 2 * terms["discriminator/r1"]
        )

    generator_loss = (
        terms["generator/adversarial"]
        + objective.lambda_feat * terms["generator/feature_matching"]
        + extra
    )
    return Step(
        fake,
        generator_loss,
        discriminator_loss,
        {name: term.detach() for name, term in terms.items()},
    )


def _accuracies(
    objective: Objective, pairs: list[tuple[Tensor, Tensor]], labels: Tensor
) -> dict[str, Tensor]:
    """Shares of real and of generated patches that the discriminator takes for what they are."""
    if objective.adversarial_loss == "segmentation":
        real, fake = pairs[0]
        last = real.shape[1] - 1
        return {
            "discriminator/accuracy_real": (real.argmax(1) != last).float().mean(),
            "discriminator/accuracy_fake": (fake.argmax(1) == last).float().mean(),
        }
    # A critic's scores have no zero; the middle between the two means takes its place.
    critic = objective.adversarial_loss.startswith("wasserstein")
    middles = [(real.mean() + fake.mean()) / 2 if critic else 0.0 for real, fake in pairs]
    right_real = [
        (real > middle).float().mean() for (real, _), middle in zip(pairs, middles, strict=True)
    ]
    right_fake = [
        (fake < middle).float().mean() for (_, fake), middle in zip(pairs, middles, strict=True)
    ]
    return {
        "discriminator/accuracy_real": torch.stack(right_real).mean(),
        "discriminator/accuracy_fake": torch.stack(right_fake).mean(),
    }
