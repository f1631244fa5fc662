"""The losses equal their equations, worked out by hand or in the plainest code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stages.gan import losses
from stages.gan.losses import ADVERSARIAL

MASKS = torch.zeros(1, 1, 1, dtype=torch.uint8)  # only the segmentation loss reads the masks


def test_hinge_by_hand() -> None:
    hinge = ADVERSARIAL["hinge"]
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0])
    assert hinge.real(real, MASKS).mean() == pytest.approx((0 + 0.5 + 2) / 3)
    assert hinge.fake(fake, MASKS).mean() == pytest.approx((0 + 1) / 2)
    assert hinge.generator(torch.tensor([1.0, 3.0]), MASKS).mean() == -2


def test_weights_multiply_each_draw_of_a_sample() -> None:
    values = torch.tensor([[1.0, 3.0], [10.0, 30.0], [2.0, 2.0], [20.0, 20.0]])  # 2 draws of 2
    weights = torch.tensor([1.0, 0.5])
    assert losses.weighted_mean(values, weights) == (2 + 2 + 0.5 * (20 + 20)) / 4
    assert losses.weighted_mean(values) == losses.weighted_mean(values, torch.ones(2))


def test_a_weight_of_zero_takes_a_sample_out_of_every_loss() -> None:
    real, fake = torch.randn(2, 3, 4, 4), torch.randn(4, 3, 4, 4)  # 2 draws of 2
    masks = torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    weights, first = torch.tensor([1.0, 0.0]), slice(None, None, 2)
    for loss in (losses.reconstruction, lambda r, f, w=None: losses.feature_matching([r], [f], w)):
        alone = loss(real[:1], fake[first])
        torch.testing.assert_close(loss(real, fake, weights), alone / 2)
    for name, loss in ADVERSARIAL.items():
        if name == "segmentation":
            continue  # its classes are balanced over the batch
        alone = loss.fake(fake[first], masks[:1]).mean()
        found = losses.weighted_mean(loss.fake(fake, masks), weights)
        torch.testing.assert_close(found, alone / 2)


@pytest.mark.parametrize("name", ["wasserstein-clip", "wasserstein-gp"])
def test_wasserstein_by_hand(name: str) -> None:
    critic, scores = ADVERSARIAL[name], torch.tensor([1.0, 3.0])
    assert critic.real(scores, MASKS).mean() == critic.generator(scores, MASKS).mean() == -2
    assert critic.fake(torch.tensor([5.0]), MASKS).mean() == 5


def test_feature_matching_sums_layer_means_and_repeats_the_real_side() -> None:
    real = [torch.zeros(1, 2, 1, 1, requires_grad=True), torch.ones(1, 1, 2, 2)]
    fake = [
        torch.tensor([1.0, 3.0, 2.0, 2.0]).view(2, 2, 1, 1).requires_grad_(),
        torch.full((2, 1, 2, 2), 1.5),
    ]
    loss = losses.feature_matching(real, fake)
    assert loss.item() == pytest.approx(2.0 + 0.5)
    loss.backward()
    assert real[0].grad is None  # the real side is a constant
    assert fake[0].grad is not None


def test_reconstruction_is_the_squared_distance_of_every_draw() -> None:
    real, fake = torch.randn(2, 3, 4, 4), torch.randn(4, 3, 4, 4)
    expected = (F.mse_loss(fake[:2], real) + F.mse_loss(fake[2:], real)) / 2
    torch.testing.assert_close(losses.reconstruction(real, fake), expected)


def test_kl_divergence_is_torchs() -> None:
    mu, logvar = torch.randn(5, 3), torch.randn(5, 3)
    normal = torch.distributions.Normal
    expected = (
        torch.distributions.kl_divergence(normal(mu, (0.5 * logvar).exp()), normal(0.0, 1.0))
        .sum(1)
        .mean()
    )
    torch.testing.assert_close(losses.kl_divergence(mu, logvar), expected)


def test_the_error_of_an_estimated_z_is_its_gaussians_likelihood_and_trains_no_z() -> None:
    estimate, z = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    loss = losses.information(estimate, z)
    density = torch.distributions.Normal(estimate, 1.0).log_prob(z).mean()
    constant = torch.distributions.Normal(0.0, 1.0).log_prob(torch.zeros(()))
    torch.testing.assert_close(loss, 2 * (constant - density))
    loss.backward()
    assert z.grad is None
    assert estimate.grad is not None


def test_cross_entropy_is_torchs_and_zero_without_labels() -> None:
    logits = torch.randn(2, 4, 3, 3)
    masks = torch.randint(0, 4, (2, 3, 3), dtype=torch.uint8)
    masks[0, 0] = 255
    torch.testing.assert_close(
        losses.cross_entropy(logits, masks).mean(),
        F.cross_entropy(logits, masks.long(), ignore_index=255),
    )
    assert losses.cross_entropy(logits, torch.full_like(masks, 255)).mean() == 0


def test_gradient_penalty_of_a_linear_critic() -> None:
    weights = torch.randn(3, 4, 4)
    penalty = losses.gradient_penalty(
        lambda x: (x * weights).sum((1, 2, 3), keepdim=True),
        torch.randn(2, 3, 4, 4),
        torch.randn(2, 3, 4, 4),
        torch.rand(2),
    )
    torch.testing.assert_close(penalty, (weights.norm() - 1) ** 2)


def test_non_saturating_is_binary_cross_entropy() -> None:
    scores, loss = torch.randn(7), ADVERSARIAL["non-saturating"]
    entropy = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(loss.real(scores, MASKS).mean(), entropy(scores, torch.ones(7)))
    torch.testing.assert_close(loss.fake(scores, MASKS).mean(), entropy(scores, torch.zeros(7)))
    torch.testing.assert_close(loss.generator(scores, MASKS).mean(), entropy(scores, torch.ones(7)))


def test_r1_of_a_quadratic_discriminator_by_hand() -> None:
    weights = torch.randn(3, 4, 4, requires_grad=True)
    real = torch.randn(2, 3, 4, 4)
    penalty = losses.r1_penalty(lambda x: (x**2 * weights).sum((1, 2, 3), keepdim=True), real)
    torch.testing.assert_close(
        penalty, (2 * real * weights).square().sum((1, 2, 3)).mean()
    )  # the gradient is 2 w x
    (gradient,) = torch.autograd.grad(penalty, weights)
    torch.testing.assert_close(gradient, (8 * real**2 * weights).mean(0))


def test_segmentation_losses_in_plain_code() -> None:
    # Class 2 is absent; 4 pixels of class 0, 3 of class 1.
    masks = torch.tensor([[[0, 0, 0, 1]], [[0, 255, 1, 1]]], dtype=torch.uint8)
    # Three classes and "generated"; two draws a mask.
    real, fake = torch.randn(2, 4, 1, 4), torch.randn(4, 4, 1, 4)
    weight = {0: 7 / 4 / 2, 1: 7 / 3 / 2}

    def balanced(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        terms = [
            weight[int(label)] * F.cross_entropy(logits[b, :, y, x], label.long())
            for b, mask in enumerate(rows)
            for y, line in enumerate(mask)
            for x, label in enumerate(line)
            if label != 255
        ]
        return torch.stack(terms).mean()

    loss = ADVERSARIAL["segmentation"]
    torch.testing.assert_close(loss.real(real, masks).mean(), balanced(real, masks))
    generated = torch.full_like(masks, 3).masked_fill(masks == 255, 255).repeat(2, 1, 1).long()
    expected = F.cross_entropy(fake, generated, ignore_index=255)
    torch.testing.assert_close(loss.fake(fake, masks).mean(), expected)
    expected = balanced(fake, masks.repeat(2, 1, 1))
    torch.testing.assert_close(loss.generator(fake, masks).mean(), expected)
