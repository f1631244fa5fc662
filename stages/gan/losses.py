"""The losses of thesis section 3.2, those of its ablation (section 5.2.3), and others.

A mean is over the batch of all processes: each process computes its fraction, and gradients are
averaged. With weights, the mean is of each sample's value times its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featurestore import VOID
from stages.common.distributed import average_over_processes


def weighted_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Average values (k*B, ...), k draws of B samples, each times its sample's weight.

    ``weights`` are (B,), 0 to 1; None: all weigh 1.
    """
    if weights is None:
        return values.mean()
    by_draw = values.flatten(1).mean(1).unflatten(0, (-1, len(weights)))
    return (by_draw * weights).mean()


# -- adversarial losses --------------------------------------------------------------------------


@dataclass(frozen=True)
class Adversarial:
    """The terms of an adversarial loss: functions of scores (k*B, ...), and of masks (B, h, w).

    They return values (k*B, ...) whose mean is the term. Only the segmentation loss reads masks.

    Attributes
    ----------
    real, fake
        The discriminator's terms, of the scores of real and of generated features.
    generator
        The generator's term, of the scores of generated features.
    """

    real: Callable[[Tensor, Tensor], Tensor]
    fake: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]


def _balanced_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Compute OASIS's loss of pixels that should be of their class (Schönfeld et al. 2021).

    Each class is weighted by the inverse of its pixels in the batch (section 3.2); weights have the
    mean 1 over labelled pixels.

    Parameters
    ----------
    logits
        (k*B, K + 1, h, w), k draws of each mask; the last class is "generated".
    masks
        (B, h, w) uint8; void pixels do not count.
    """
    masks = masks.repeat(len(logits) // len(masks), 1, 1)
    pixels = [(masks == number).sum() for number in range(logits.shape[1] - 1)]
    counts = average_over_processes(torch.stack(pixels).float())
    present = counts > 0
    balanced = counts.sum() / (torch.where(present, counts, 1) * present.sum().clamp(min=1))
    weights = F.pad(torch.where(present, balanced, 0.0), (0, 1))
    return _cross_entropies(logits, masks, counts.sum(), weights)


def _generated_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Compute OASIS's loss of pixels that should be of the last class, "generated"."""
    generated = torch.where(masks == VOID, VOID, logits.shape[1] - 1)
    return cross_entropy(logits, generated.repeat(len(logits) // len(masks), 1, 1))


# Arjovsky et al. 2017.
_WASSERSTEIN = Adversarial(
    real=lambda scores, masks: -scores,
    fake=lambda scores, masks: scores,
    generator=lambda scores, masks: -scores,
)
ADVERSARIAL = {
    # Equations 3.2 to 3.4.
    "hinge": Adversarial(
        real=lambda scores, masks: F.relu(1 - scores),
        fake=lambda scores, masks: F.relu(1 + scores),
        generator=lambda scores, masks: -scores,
    ),
    # -log of the sigmoid (Goodfellow et al. 2014, eq. 1). The generator's gradient does not vanish
    # where the discriminator is sure (section 3).
    "non-saturating": Adversarial(
        real=lambda scores, masks: F.softplus(-scores),
        fake=lambda scores, masks: F.softplus(scores),
        generator=lambda scores, masks: F.softplus(-scores),
    ),
    "wasserstein-clip": _WASSERSTEIN,
    "wasserstein-gp": _WASSERSTEIN,
    # OASIS, Schönfeld et al. 2021, eqs 1 and 2.
    "segmentation": Adversarial(
        real=_balanced_cross_entropy,
        fake=_generated_cross_entropy,
        generator=_balanced_cross_entropy,
    ),
}


# -- penalties on the discriminator's gradient ---------------------------------------------------


def _gradient(discriminate: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Differentiate each sample's mean score by its features (B, C, h, w): (B, C*h*w)."""
    features = features.detach().requires_grad_(True)
    total = discriminate(features).float().flatten(1).mean(1).sum()
    (gradient,) = torch.autograd.grad(total, features, create_graph=True)
    return gradient.float().flatten(1)


def r1_penalty(discriminate: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Compute R1, the mean of |grad D|^2 at real features (Mescheder et al. 2018, eq. 9).

    It is to be weighted by gamma / 2.

    Parameters
    ----------
    discriminate
        Features to scores; a sample's score is the mean of its patches' scores.
    real
        (B, C, h, w).
    """
    return _gradient(discriminate, real).square().sum(1).mean()


def gradient_penalty(
    discriminate: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor
) -> Tensor:
    """Compute the mean of (|grad D| - 1)^2 between real and generated features.

    Gulrajani et al. 2017.

    Parameters
    ----------
    discriminate
        Features to scores; a sample's score is the mean of its patches' scores.
    real, fake
        (B, C, h, w).
    mix
        (B,) uniform in 0..1: position on the line from real to generated features.
    """
    between = torch.lerp(real, fake, mix.view(-1, 1, 1, 1))
    return ((_gradient(discriminate, between).norm(dim=1) - 1) ** 2).mean()


# -- other losses --------------------------------------------------------------------------------


def feature_matching(
    real: list[Tensor], fake: list[Tensor], weights: Tensor | None = None
) -> Tensor:
    """Compute equation 3.5: the sum over the discriminator's layers of mean absolute differences.

    The real side is a constant.

    Parameters
    ----------
    real
        Each layer's activations, (B, ...).
    fake
        Those of generated features, (k*B, ...), k draws a mask.
    weights
        (B,) weights of the samples; None: all weigh 1.
    """
    terms = [
        weighted_mean((_by_draw(of_fake, of_real) - of_real.detach()).abs().flatten(0, 1), weights)
        for of_real, of_fake in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).sum()


def reconstruction(real: Tensor, fake: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the mean squared difference of generated features from real ones.

    Parameters
    ----------
    real
        (B, C, h, w).
    fake
        (k*B, C, h, w), k draws of each mask.
    weights
        (B,) weights of the samples; None: all weigh 1.
    """
    squares = (_by_draw(fake.float(), real) - real).square()
    return weighted_mean(squares.flatten(0, 1), weights)


def _by_draw(fake: Tensor, real: Tensor) -> Tensor:
    """View (k*B, ...) as (k, B, ...): the real side is then broadcast, and not copied."""
    return fake.unflatten(0, (-1, len(real)))


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """Compute equation 3.1 in closed form for N(mu, exp(logvar)) and N(0, 1).

    It is summed over z and averaged over the batch.
    """
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(dim=1).mean()


def information(estimate: Tensor, z: Tensor) -> Tensor:
    """Compute InfoGAN's loss, the mean squared error of an estimate of z (Chen et al. 2016, eq. 5).

    Up to constants it is the negative lower bound of the mutual information of z and generated
    features, where the estimate is the mean of a Gaussian of fixed variance. 1: nothing of a
    standard normal z is found; 0: all of it. z is a constant: an image encoder must not learn to
    give a z that is easy to estimate.

    Parameters
    ----------
    estimate, z
        (k*B, z_dim).
    """
    return F.mse_loss(estimate, z.detach())


def cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Compute values (B, H, W) whose mean is equation 3.7, over the labelled pixels of the batch.

    They are 0 if no pixel is labelled.

    Parameters
    ----------
    logits
        (B, K, H, W).
    masks
        (B, H, W) uint8; 255 is left out.
    """
    labelled = average_over_processes((masks != VOID).sum().float())
    return _cross_entropies(logits, masks, labelled)


def _cross_entropies(
    logits: Tensor, masks: Tensor, labelled: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Compute cross-entropies (B, H, W); their mean is their sum over ``labelled`` pixels.

    ``weights`` (K,) weigh the classes.
    """
    each = F.cross_entropy(logits, masks.long(), weights, ignore_index=VOID, reduction="none")
    return each * (each.numel() / labelled.clamp(min=1))
