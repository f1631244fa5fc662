"""InfoGAN's loss: z is found in generated features, and draws of z differ."""

from __future__ import annotations

import pytest
import torch

from stages.common.runtime import make_accelerator
from stages.gan.gan_trainer import GanTrainer
from stages.gan.networks import Networks, build_networks
from stages.gan.objective import Objective
from stages.models.spectral import SpectralConv2d
from stages.train_gan import ARCHITECTURE
from stages.training.update import backward, step_and_zero_grad
from tests.factories import GAN

CHANNELS, SIDE, CLASSES, Z_DIM, STEPS = 12, 8, 3, 2, 30


def networks(**changes: object) -> Networks:
    """Build fresh networks; keys that ``GAN`` lacks are left to their defaults."""
    torch.manual_seed(0)
    described = {key: GAN[key] for key in ARCHITECTURE if key in GAN}
    of_store = {"num_classes": CLASSES, "feature_shape": [CHANNELS, SIDE, SIDE]}
    of_store |= {"output_stride": 8, "nonnegative": True}
    return build_networks({**described, **of_store, "z_dim": Z_DIM, **changes})


def trained(lambda_info: float) -> tuple[float, float]:
    """Train for some steps; return InfoGAN's loss and the difference of two draws of z."""
    made = networks(lambda_info=lambda_info)
    rates = {"generator_lr": 5e-4, "discriminator_lr": 5e-4, "betas": (0.0, 0.9)}
    objective, folds = Objective(lambda_info=lambda_info), ((CHANNELS, 1),)
    trainer = GanTrainer(make_accelerator("cpu", "no"), made, objective, folds=folds, **rates)
    features = torch.rand(8, CHANNELS, SIDE, SIDE)
    masks = torch.randint(0, CLASSES, (8, 8 * SIDE, 8 * SIDE), dtype=torch.uint8)
    losses = []
    for number in range(STEPS):
        step = trainer.forward(features, masks, None, rng=torch.Generator().manual_seed(number))
        backward(trainer.accelerator, *trainer.losses_with_parameters(step))
        step_and_zero_grad(trainer.accelerator, *trainer.optimizers.values())
        losses.append(float(step.terms.get("generator/info", torch.zeros(()))))
    first, second = made.generator.generate(masks, z=torch.randn(16, Z_DIM)).chunk(2)
    return sum(losses[-10:]) / 10, float((first - second).square().mean() / first.var())


@pytest.mark.medium
def test_z_is_found_in_generated_features_and_draws_differ() -> None:
    (_, without), (error, with_loss) = trained(0.0), trained(100.0)
    assert error < 0.85  # 1: nothing is found
    assert with_loss > 10 * without


@pytest.mark.parametrize("norm", ["spectral", "none"])
def test_only_the_discriminators_spectral_norm_is_a_choice(norm: str) -> None:
    found = {
        name: any(isinstance(layer, SpectralConv2d) for layer in network.modules())
        for name, network in networks(discriminator_norm=norm, image_encoder=True).by_name().items()
    }
    assert found == {"generator": True, "discriminator": norm == "spectral", "image_encoder": True}


def test_without_the_loss_networks_are_those_of_an_architecture_without_its_key() -> None:
    today, before = networks(lambda_info=0.0, discriminator_norm="spectral"), networks()
    for name, network in today.by_name().items():
        theirs = before.by_name()[name].state_dict()
        assert network.state_dict().keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in network.state_dict().items())
