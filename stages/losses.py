"""The losses of thesis section 3.2, and those of its ablation (section 5.2.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from featurestore import VOID


def hinge_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 3.2 and 3.3: the two terms, means of max(0, 1 - D(x)) and of max(0, 1 + D(G(z)))."""
    return F.relu(1 - real).mean(), F.relu(1 + fake).mean()


def wasserstein_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """The critic's two terms, -mean D(x) and mean D(G(z)) (Arjovsky et al. 2017)."""
    return -real.mean(), fake.mean()


def generator_adversarial(fake: Tensor) -> Tensor:
    """Equation 3.4: -mean D(G(z)); the hinge's and Wasserstein's generators share it."""
    return -fake.mean()


def gradient_penalty(discriminate: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
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
    terms = [F.l1_loss(ours, theirs.detach().repeat(len(ours) // len(theirs), 1, 1, 1)) for theirs, ours in zip(real, fake, strict=True)]
    return torch.stack(terms).sum()


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
    return total / (masks != void).sum().clamp(min=1)
