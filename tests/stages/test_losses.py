"""The losses equal their equations, worked out by hand or in the plainest code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stages import losses


def test_hinge_discriminator_by_hand() -> None:
    real, fake = losses.hinge_discriminator(torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0]))
    assert real == pytest.approx((0 + 0.5 + 2) / 3)
    assert fake == pytest.approx((0 + 1) / 2)


def test_generator_and_wasserstein_by_hand() -> None:
    assert losses.generator_adversarial(torch.tensor([1.0, 3.0])) == -2
    assert losses.wasserstein_discriminator(torch.tensor([1.0, 3.0]), torch.tensor([5.0])) == (-2, 5)


def test_feature_matching_sums_layer_means_and_repeats_the_real_side() -> None:
    real = [torch.zeros(1, 2, 1, 1, requires_grad=True), torch.ones(1, 1, 2, 2)]
    fake = [torch.tensor([1.0, 3.0, 2.0, 2.0]).view(2, 2, 1, 1).requires_grad_(), torch.full((2, 1, 2, 2), 1.5)]
    loss = losses.feature_matching(real, fake)
    assert loss.item() == pytest.approx(2.0 + 0.5)
    loss.backward()
    assert real[0].grad is None  # the real side is a constant
    assert fake[0].grad is not None


def test_kl_divergence_is_torchs() -> None:
    mu, logvar = torch.randn(5, 3), torch.randn(5, 3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, (0.5 * logvar).exp()), normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(losses.kl_divergence(mu, logvar), expected)


def test_cross_entropy_is_torchs_and_zero_without_labels() -> None:
    logits = torch.randn(2, 4, 3, 3)
    masks = torch.randint(0, 4, (2, 3, 3), dtype=torch.uint8)
    masks[0, 0] = 255
    torch.testing.assert_close(losses.cross_entropy(logits, masks), F.cross_entropy(logits, masks.long(), ignore_index=255))
    assert losses.cross_entropy(logits, torch.full_like(masks, 255)) == 0


def test_gradient_penalty_of_a_linear_critic() -> None:
    weights = torch.randn(3, 4, 4)
    penalty = losses.gradient_penalty(
        lambda x: (x * weights).sum((1, 2, 3), keepdim=True), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(2)
    )
    torch.testing.assert_close(penalty, (weights.norm() - 1) ** 2)
