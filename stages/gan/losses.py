"""The losses of thesis section 3.2, those of its ablation (section 5.2.3), and some from elsewhere.

A mean is over the batch of all processes: each gives its share, and gradients are averaged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from featurestore import VOID
from stages.common.distributed import average_over_processes

# -- adversarial losses -------------------------------------------------------------------------------
#
# Each is a pair of functions of scores and of the masks (B, h, w), which only the segmentation loss looks at.


def hinge_discriminator(
    real: Tensor, fake: Tensor, masks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equations 3.2 and 3.3: the two terms, means of max(0, 1 - D(x)) and of max(0, 1 + D(G(z)))."""
    return F.relu(1 - real).mean(), F.relu(1 + fake).mean()


def wasserstein_discriminator(
    real: Tensor, fake: Tensor, masks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The critic's two terms, -mean D(x) and mean D(G(z)) (Arjovsky et al. 2017)."""
    return -real.mean(), fake.mean()


def critic_generator(fake: Tensor, masks: Tensor | None = None) -> Tensor:
    """Equation 3.4: -mean D(G(z)); the hinge's and Wasserstein's generators share it."""
    return -fake.mean()


def logistic_discriminator(
    real: Tensor, fake: Tensor, masks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first GAN's two terms, -mean log s(D(x)) and -mean log(1 - s(D(G(z)))), s the sigmoid (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-real).mean(), F.softplus(fake).mean()


def non_saturating_generator(fake: Tensor, masks: Tensor | None = None) -> Tensor:
    """-mean log s(D(G(z))) (Goodfellow et al. 2014, section 3): its gradient does not vanish where the discriminator is sure."""
    return F.softplus(-fake).mean()


def segmentation_discriminator(real: Tensor, fake: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """OASIS's two terms (Schönfeld et al. 2021, eq. 1): a real pixel is of its class, a generated one of the last, "generated".

    Parameters
    ----------
    real, fake
        (B, K + 1, h, w) and (k*B, K + 1, h, w) logits.
    masks
        (B, h, w) uint8; void pixels count on neither side.
    """
    generated = torch.where(masks == VOID, VOID, fake.shape[1] - 1)
    return _balanced_cross_entropy(real, masks), cross_entropy(
        fake, generated.repeat(len(fake) // len(masks), 1, 1)
    )


def segmentation_generator(fake: Tensor, masks: Tensor) -> Tensor:
    """OASIS's generator (eq. 2): its pixels should be found to be of their class."""
    return _balanced_cross_entropy(fake, masks.repeat(len(fake) // len(masks), 1, 1))


def _balanced_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy with each class weighted by the inverse of its pixels in the batch (OASIS, section 3.2).

    Weights have the mean 1 over labelled pixels.
    """
    classes = logits.shape[1] - 1
    counts = average_over_processes(
        torch.stack([(masks == number).sum() for number in range(classes)]).float()
    )
    present = counts > 0
    weights = torch.where(
        present, counts.sum() / (torch.where(present, counts, 1) * present.sum().clamp(min=1)), 0.0
    )
    losses = F.cross_entropy(
        logits,
        masks.long(),
        torch.cat([weights, weights.new_zeros(1)]),
        ignore_index=VOID,
        reduction="sum",
    )
    return losses / counts.sum().clamp(min=1)


ADVERSARIAL: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]] = {
    "hinge": (hinge_discriminator, critic_generator),
    "non-saturating": (logistic_discriminator, non_saturating_generator),
    "wasserstein-clip": (wasserstein_discriminator, critic_generator),
    "wasserstein-gp": (wasserstein_discriminator, critic_generator),
    "segmentation": (segmentation_discriminator, segmentation_generator),
}


# -- penalties on the discriminator's gradient ----------------------------------------------------------


def r1_penalty(discriminate: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """R1: mean of |grad D|^2 at real features, to be weighted by gamma / 2 (Mescheder et al. 2018, eq. 9).

    Parameters
    ----------
    discriminate
        Features to scores; a sample's score is the mean of its patches'.
    real
        (B, C, h, w).
    """
    real = real.detach().requires_grad_(True)
    total = discriminate(real).float().flatten(1).mean(1).sum()
    (gradient,) = torch.autograd.grad(total, real, create_graph=True)
    return gradient.float().flatten(1).square().sum(1).mean()


def gradient_penalty(
    discriminate: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor
) -> Tensor:
    """Mean of (|grad D| - 1)^2 on lines between real and generated features (Gulrajani et al. 2017).

    Parameters
    ----------
    discriminate
        Features to scores.
    real, fake
        (B, C, h, w).
    mix
        (B,) uniform in 0..1: where on the line.
    """
    between = torch.lerp(real, fake, mix.view(-1, 1, 1, 1)).detach().requires_grad_(True)
    # One score a sample: the gradient of each sample's mean score with respect to its own features.
    total = discriminate(between).float().flatten(1).mean(1).sum()
    (gradient,) = torch.autograd.grad(total, between, create_graph=True)
    return ((gradient.float().flatten(1).norm(dim=1) - 1) ** 2).mean()


def feature_matching(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Equation 3.5: over the discriminator's layers, the sum of mean absolute differences; the real side is a constant.

    Parameters
    ----------
    real
        Each layer's activations, (B, ...).
    fake
        The same for generated features, (k*B, ...), k draws a mask.
    """
    # (k*B, ...) -> (k, B, ...), so that the real side is broadcast and not copied
    terms = [
        (ours.unflatten(0, (-1, len(theirs))) - theirs.detach()).abs().mean()
        for theirs, ours in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).sum()


def reconstruction(real: Tensor, fake: Tensor) -> Tensor:
    """Mean squared difference of generated features (k*B, C, h, w), k draws a mask, from the real ones (B, C, h, w) of the masks."""
    return (fake.float().unflatten(0, (-1, len(real))) - real).square().mean()


# -- the others -----------------------------------------------------------------------------------------


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """Equation 3.1 in closed form for N(mu, exp(logvar)) and N(0, 1): summed over z, averaged over the batch."""
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(dim=1).mean()


def cross_entropy(logits: Tensor, masks: Tensor, void: int = VOID) -> Tensor:
    """Equation 3.7: mean over the labelled pixels of the whole batch; 0 where there is none.

    Parameters
    ----------
    logits
        (B, K, H, W).
    masks
        (B, H, W) uint8; ``void`` is left out.
    """
    total = F.cross_entropy(logits, masks.long(), ignore_index=void, reduction="sum")
    return total / average_over_processes((masks != void).sum().float()).clamp(min=1)
