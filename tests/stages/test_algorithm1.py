"""One training step of each branch equals a literal transcription of the thesis's Algorithm 1."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featurestore.dataset import Batch
from stages.augment.base import Labelled
from stages.augment.featuregan import FeatureGANConfig, JointFeatureGAN
from stages.common.runtime import make_accelerator
from stages.gan.gan_trainer import GanTrainer
from stages.gan.networks import Networks, build_networks
from stages.gan.objective import Objective
from stages.models.decoder import Decoder
from stages.models.spectral import SpectralConv2d
from stages.train_decoder import decoder_loss
from stages.training.update import backward, step_and_zero_grad

BATCH, CLASSES, CHANNELS, SIDE = 3, 4, 12, 8
LAMBDA_FEAT, LAMBDA_KLD = 7.0, 0.05
LR = {"generator": 2e-4, "discriminator": 8e-4, "decoder": 5e-4}


def architecture(*, image_encoder: bool, **more: object) -> dict:
    return {
        "num_classes": CLASSES,
        "feature_shape": [CHANNELS, SIDE, SIDE],
        "output_stride": 8,
        "nonnegative": True,
        "family": "gan",
        "z_dim": 6,
        "noise": "vector",
        "prior": "none",
        "ngf": 1,
        "spade_hidden": 8,
        "norm": "batch",
        "ndf": 4,
        "discriminator_layers": 3,
        "discriminator_scales": 1,
        "projection_channels": 0,
        "adversarial_loss": "hinge",
        "image_encoder": image_encoder,
        "nef": 2,
        "init_gain": 0.5,
        **more,
    }


def still(network: nn.Module) -> None:
    """Spectral norm's power iteration moves once a step, however many passes there are."""
    for layer in network.modules():
        if isinstance(layer, SpectralConv2d):
            layer.eval()


def literal_step(
    networks: Networks,
    decoder: nn.Module | None,
    optimizers: dict[str, torch.optim.Adam],
    *,
    features: Tensor,
    masks: Tensor,
    images: Tensor,
    rng: torch.Generator,
    ratio: int,
    lambda_info: float,
    kld_reduction: str,
) -> None:
    """Algorithm 1, line by line; ``decoder`` None is its first branch.

    Both networks' losses have InfoGAN's term (Chen et al. 2016), which trains their parameters.
    """
    generator, encoder = networks.generator, networks.image_encoder

    def discriminator(features: Tensor, masks: Tensor) -> tuple[Tensor, list[Tensor]]:
        (judgement,) = networks.discriminator([features], masks)
        return judgement.scores[0], judgement.layers

    def l_info(z: Tensor, d_fake: list[Tensor]) -> Tensor | float:
        if not lambda_info:
            return 0.0
        linear = networks.discriminator.info.linear
        pooled = torch.cat([layer.mean((2, 3)) for layer in d_fake], dim=1)
        return lambda_info * (linear(pooled) - z.detach()).pow(2).mean()

    scale = generator.feature_scale
    f_real = features / scale
    noise = torch.randn(ratio * len(masks), generator.z_dim, generator=rng)
    many = masks.repeat(ratio, 1, 1)
    if encoder is not None:
        mu, logvar = encoder(images)
        z = torch.cat([mu] * ratio) + noise * torch.exp(torch.cat([logvar] * ratio) / 2)
    else:
        z = noise
    f_fake = generator(z, many)
    p_real, d_real = discriminator(f_real, masks)
    still(networks.discriminator)
    p_fake, d_fake = discriminator(f_fake, many)

    # train generator (and segmentation model)
    l_kld = (
        LAMBDA_KLD
        * (-0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum())
        / (len(mu) if kld_reduction == "mean" else 1)
        if encoder is not None
        else 0.0
    )
    l_g = -p_fake.mean()
    l_fm = sum(
        (torch.cat([real.detach()] * ratio) - fake).abs().mean()
        for real, fake in zip(d_real, d_fake, strict=True)
    )
    l_tot = l_kld + l_g + LAMBDA_FEAT * l_fm + l_info(z, d_fake)
    if decoder is not None:
        labels = masks.long()
        size = masks.shape[-2:]
        l_tot = l_tot + F.cross_entropy(decoder(f_real * scale, size), labels, ignore_index=255)
        for f in f_fake.chunk(ratio):
            l_tot = l_tot + F.cross_entropy(decoder(f * scale, size), labels, ignore_index=255)
    for name in ("generator", *(["decoder"] if decoder is not None else [])):
        optimizers[name].zero_grad()
    l_tot.backward(retain_graph=True)
    optimizers["generator"].step()
    if decoder is not None:
        optimizers["decoder"].step()

    # train discriminator, on the features generated above
    p_real, _ = discriminator(f_real, masks)
    p_fake, d_fake = discriminator(f_fake.detach(), many)
    l_d_real = -torch.clamp(-1 + p_real, max=0).mean()
    l_d_fake = -torch.clamp(-1 - p_fake, max=0).mean()
    optimizers["discriminator"].zero_grad()
    (l_d_real + l_d_fake + l_info(z, d_fake)).backward()
    optimizers["discriminator"].step()
    networks.discriminator.train()


def assert_same_parameters(
    ours: nn.Module, literal: nn.Module, start: nn.Module, lr: float
) -> None:
    """Compare parameters; Adam's first step is lr * sign(gradient), also of rounding noise."""
    theirs, before = dict(literal.named_parameters()), dict(start.named_parameters())
    noise = 1e-5 * max(
        float(parameter.grad.abs().max()) for parameter in literal.parameters()
    )  # float32 sums in another order
    compared = 0
    for name, parameter in ours.named_parameters():
        gradient = theirs[name].grad
        torch.testing.assert_close(
            parameter.grad,
            gradient,
            rtol=1e-3,
            atol=noise,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        certain = gradient.abs() > 20 * noise
        compared += int(certain.sum())
        torch.testing.assert_close(parameter[certain], theirs[name][certain], rtol=1e-5, atol=1e-6)
        assert (parameter - before[name]).abs().max() <= 1.01 * lr
    assert compared > 0.3 * sum(parameter.numel() for parameter in ours.parameters())


@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("image_encoder", [False, True])
@pytest.mark.parametrize("branch", ["gan", "joint"])
def test_a_step_equals_algorithm_1(
    monkeypatch: pytest.MonkeyPatch, branch: str, image_encoder: bool, ratio: int
) -> None:
    check_step(monkeypatch, branch, ratio, architecture(image_encoder=image_encoder))


@pytest.mark.parametrize(
    ("branch", "ratio", "image_encoder", "norm"),
    [
        ("gan", 2, False, "spectral"),
        ("gan", 1, True, "none"),
        ("joint", 1, False, "none"),
        ("joint", 2, True, "spectral"),
    ],
)
def test_a_step_with_infogans_loss_and_spades_sum_equals_its_transcription(
    monkeypatch: pytest.MonkeyPatch, branch: str, ratio: int, image_encoder: bool, norm: str
) -> None:
    more = {"lambda_info": 3.0, "discriminator_norm": norm}
    described = architecture(image_encoder=image_encoder, **more)
    check_step(monkeypatch, branch, ratio, described, lambda_info=3.0, kld_reduction="sum")


def check_step(
    monkeypatch: pytest.MonkeyPatch,
    branch: str,
    ratio: int,
    described: dict,
    *,
    lambda_info: float = 0.0,
    kld_reduction: str = "mean",
) -> None:
    """Compare one step of the networks that ``described`` gives with the literal one."""
    torch.manual_seed(0)
    scale = torch.rand(CHANNELS) + 0.5
    networks = build_networks(described, scale)
    decoder = Decoder(
        head="deeplab", in_channels=CHANNELS, num_classes=CLASSES, width=8, atrous_rates=(2, 3)
    )
    decoder.head[0].project[3].p = 0.0  # dropout draws from the global generator, once a pass
    features = torch.rand(BATCH, CHANNELS, SIDE, SIDE)
    masks = torch.randint(0, CLASSES, (BATCH, 8 * SIDE, 8 * SIDE), dtype=torch.uint8)
    masks[:, :5] = 255
    images = torch.randint(0, 256, (BATCH, 3, 8 * SIDE, 8 * SIDE), dtype=torch.uint8)

    literal, literal_decoder = copy.deepcopy(networks), copy.deepcopy(decoder)
    start, start_decoder = copy.deepcopy(networks), copy.deepcopy(decoder)
    trained = [
        *literal.generator.parameters(),
        *(literal.image_encoder.parameters() if literal.image_encoder else []),
    ]
    optimizers = {
        "generator": torch.optim.Adam(trained, LR["generator"], (0.0, 0.9)),
        "discriminator": torch.optim.Adam(
            literal.discriminator.parameters(), LR["discriminator"], (0.0, 0.9)
        ),
        "decoder": torch.optim.Adam(literal_decoder.parameters(), LR["decoder"]),
    }
    literal_step(
        literal,
        literal_decoder if branch == "joint" else None,
        optimizers,
        features=features,
        masks=masks,
        images=images,
        rng=torch.Generator().manual_seed(7),
        ratio=ratio,
        lambda_info=lambda_info,
        kld_reduction=kld_reduction,
    )

    objective = Objective(
        "hinge", LAMBDA_FEAT, LAMBDA_KLD, lambda_info=lambda_info, kld_reduction=kld_reduction
    )
    trainer = GanTrainer(
        make_accelerator("cpu", "no"),
        networks,
        objective,
        folds=((features.shape[1], 1),),
        generator_lr=LR["generator"],
        discriminator_lr=LR["discriminator"],
        betas=(0.0, 0.9),
    )
    for kept in trainer.optimizers.values():
        monkeypatch.setattr(kept, "zero_grad", lambda: None)  # gradients are compared below
    rng = torch.Generator().manual_seed(7)
    if branch == "gan":
        step = trainer.forward(features, masks, images, ratio=ratio, rng=rng)
        backward(trainer.accelerator, *trainer.losses_with_parameters(step))
        step_and_zero_grad(trainer.accelerator, *trainer.optimizers.values())
    else:
        optimizer = torch.optim.Adam(decoder.parameters(), LR["decoder"])
        variant = FeatureGANConfig(augmenter="featuregan", ratio=ratio)
        augmenter = JointFeatureGAN(variant, trainer, Path())
        batch = Batch(torch.arange(len(masks)), features, masks, images)
        added = augmenter.augment(batch, rng)
        assert added.generator_loss is not None
        loss = added.generator_loss + decoder_loss(decoder, Labelled.of(batch))
        for generated in added.batches:
            loss = loss + generated.weight * decoder_loss(decoder, generated)
        monkeypatch.setattr(optimizer, "zero_grad", lambda: None)
        parameters = [*decoder.parameters(), *added.generator_parameters]
        backward(trainer.accelerator, *added.discriminator_losses, (loss, parameters))
        step_and_zero_grad(trainer.accelerator, optimizer, *added.optimizers)
        assert_same_parameters(decoder, literal_decoder, start_decoder, LR["decoder"])
    assert_same_parameters(networks.generator, literal.generator, start.generator, LR["generator"])
    assert_same_parameters(
        networks.discriminator, literal.discriminator, start.discriminator, LR["discriminator"]
    )
    if networks.image_encoder is not None:
        assert_same_parameters(
            networks.image_encoder, literal.image_encoder, start.image_encoder, LR["generator"]
        )
