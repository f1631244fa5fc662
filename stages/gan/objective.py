"""One batch through FeatureGAN's networks, and the losses of Algorithm 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.gan import losses
from stages.models.image_encoder import sample_z
from stages.segmentation.folds import Folds
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
        Weight of the mean squared difference of generated features from the real ones of the same
        mask; 0: none.
    lambda_info
        Weight of InfoGAN's loss, which trains generator and discriminator; 0: none.
    kld_reduction
        ``mean`` or ``sum``: the KLD loss is averaged or summed over the batch (SPADE: summed).
    r1_gamma, r1_every
        Weight of R1, and N: R1 is applied every N steps, scaled by N (lazy R1, Karras et al. 2020,
        appendix B). Weight 0: never.
    diffaugment
        Names in :data:`stages.segmentation.transforms.TRANSFORMS`: transformations of features and
        masks in front of the discriminator.
    """

    adversarial_loss: str = "hinge"
    lambda_feat: float = 7.0
    lambda_kld: float = 0.05
    lambda_rec: float = 0.0
    lambda_info: float = 0.0
    kld_reduction: str = "mean"
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
        Each loss, detached, by its name in the logs.
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
    weights: Tensor | None,
    folds: Folds,
    noise: Tensor,
    rng: torch.Generator,
    step: int,
    batch_size: int,
) -> Step:
    """Generate, discriminate, and sum the losses of Algorithm 1 up to the segmentation terms.

    One call of the discriminator serves both updates, as in Algorithm 1.

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
    weights
        (B,) of the samples in all losses but the divergence, InfoGAN's and the penalties; None:
        all weigh 1.
    folds
        Layers of the features, for the transforms.
    noise
        (k*B, z_dim) from N(0, I), k draws a mask.
    rng
        Source of all other random numbers, on the tensors' device.
    step
        Number of the step, for the lazy R1.
    batch_size
        Samples of all micro-batches of all processes, over which gradients are averaged.
    """
    terms: dict[str, Tensor] = {}

    # Features generated from noise.
    z, regularisation = noise, real.new_zeros(())
    if image_encoder is not None:
        mu, logvar = (output.float() for output in image_encoder(images))
        ratio = len(noise) // len(real)
        z = sample_z(mu.repeat(ratio, 1), logvar.repeat(ratio, 1), noise)
        samples = batch_size if objective.kld_reduction == "sum" else 1
        terms["generator/kld"] = samples * losses.kl_divergence(mu, logvar)
        regularisation = objective.lambda_kld * terms["generator/kld"]
    fake = generator(z, masks)
    if objective.lambda_rec:
        terms["generator/reconstruction"] = losses.reconstruction(real, fake, weights)
        regularisation = regularisation + objective.lambda_rec * terms["generator/reconstruction"]

    # Scores of both and activations of the discriminator; means over its scales.
    seen, masks_seen = augment([real, fake], masks, objective.diffaugment, rng, folds)
    of_real, of_fake = discriminator(seen, masks_seen)
    labels = labels_at(masks_seen, real.shape[2:])
    adversarial = losses.ADVERSARIAL[objective.adversarial_loss]
    for name, loss, scores in (
        ("discriminator/real", adversarial.real, of_real.scores),
        ("discriminator/fake", adversarial.fake, of_fake.scores),
        ("generator/adversarial", adversarial.generator, of_fake.scores),
    ):
        values = [loss(each.float(), labels) for each in scores]
        terms[name] = torch.stack([losses.weighted_mean(each, weights) for each in values]).mean()
    layers_real, layers_fake = (
        [layer.float() for layer in side.layers] for side in (of_real, of_fake)
    )
    matching = losses.feature_matching(layers_real, layers_fake, weights) / len(of_real.scores)
    terms["generator/feature_matching"] = matching
    terms |= _accuracies(objective, of_real.scores, of_fake.scores)
    discriminator_loss = terms["discriminator/real"] + terms["discriminator/fake"]

    # InfoGAN's loss is in both sums, and each back-propagation reaches only its own parameters.
    if objective.lambda_info:
        terms["generator/info"] = losses.information(of_fake.z.float(), z)
        discriminator_loss = discriminator_loss + objective.lambda_info * terms["generator/info"]
        regularisation = regularisation + objective.lambda_info * terms["generator/info"]

    due = _penalties(objective, discriminator, seen, masks_seen, rng, step)
    for name, weight, penalty in due:
        terms[name] = penalty
        discriminator_loss = discriminator_loss + weight * penalty

    generator_loss = (
        terms["generator/adversarial"] + objective.lambda_feat * matching + regularisation
    )
    detached = {name: term.detach() for name, term in terms.items()}
    return Step(fake, generator_loss, discriminator_loss, detached)


def _penalties(
    objective: Objective,
    discriminator: nn.Module,
    seen: list[Tensor],
    masks: Tensor,
    rng: torch.Generator,
    step: int,
) -> Iterator[tuple[str, float, Tensor]]:
    """Compute the due penalties on the discriminator's gradient: name, weight and value.

    ``seen`` are the real and the generated features in front of the discriminator.
    """
    real, fake = seen

    def discriminate(features: Tensor) -> Tensor:
        (judgement,) = discriminator([features], masks)
        return torch.cat([scores.flatten(1) for scores in judgement.scores], dim=1)

    if objective.adversarial_loss == "wasserstein-gp":
        mix = torch.rand(len(real), generator=rng, device=real.device)
        penalty = losses.gradient_penalty(discriminate, real, fake[: len(real)].float(), mix)
        yield "discriminator/gradient_penalty", PENALTY, penalty
    if objective.r1_gamma and step % objective.r1_every == 0:
        weight = objective.r1_every * objective.r1_gamma / 2
        yield "discriminator/r1", weight, losses.r1_penalty(discriminate, real)


def _accuracies(objective: Objective, real: list[Tensor], fake: list[Tensor]) -> dict[str, Tensor]:
    """Compute the fractions of real and of generated patches that the discriminator recognises.

    ``real`` and ``fake`` are its scores, one tensor a scale.
    """
    if objective.adversarial_loss == "segmentation":  # the last class is "generated"
        real_correct = [scores.argmax(1) != scores.shape[1] - 1 for scores in real]
        fake_correct = [scores.argmax(1) == scores.shape[1] - 1 for scores in fake]
    else:
        # A critic's scores have no zero: the middle between the two means takes its place.
        critic = objective.adversarial_loss.startswith("wasserstein")
        pairs = zip(real, fake, strict=True)
        middles = [(one.mean() + other.mean()) / 2 if critic else 0.0 for one, other in pairs]
        real_correct = [scores > middle for scores, middle in zip(real, middles, strict=True)]
        fake_correct = [scores < middle for scores, middle in zip(fake, middles, strict=True)]
    return {
        f"discriminator/accuracy_{side}": torch.stack([x.float().mean() for x in correct]).mean()
        for side, correct in (("real", real_correct), ("fake", fake_correct))
    }
