"""The flow: its components, its integration, what it learns, and its place beside the GAN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import featurestore
from stages.common.errors import ConfigError
from stages.common.runtime import make_accelerator
from stages.gan.flow_trainer import FlowTrainer, mean_amplitude, principal_components
from stages.gan.networks import Networks
from stages.models.flow_generator import FlowGenerator
from stages.reporting.curves import read_curves
from stages.training.models import load_generator
from tests.factories import (
    VARIANTS,
    added_by_a_frozen_generator,
    files,
    run_decoder,
    run_gan,
    stop_after,
    with_gan,
)


def flow(**changes) -> FlowGenerator:
    settings = {
        "num_classes": 3,
        "feature_shape": (12, 8, 8),
        "nonnegative": False,
        "feature_scale": torch.rand(12) + 0.5,
        "components": 12,
        "width": 8,
        "steps": 4,
    }
    return FlowGenerator(**{**settings, **changes})


MASKS = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)


def test_components_are_those_of_the_vectors_and_all_of_them_lose_nothing(features: Path) -> None:
    store = featurestore.open(features / "train")
    scale = torch.linspace(0.5, 2, 12)
    mean, basis, spread = principal_components(store, scale, 12, seed=0)
    vectors = (
        torch.from_numpy(
            np.concatenate([store.features(n).reshape(12, -1).T for n in range(len(store))]).astype(
                np.float32
            )
        )
        / scale
    )
    torch.testing.assert_close(
        mean, vectors.mean(0), rtol=1e-3, atol=1e-4
    )  # 640 vectors are all of them
    torch.testing.assert_close((vectors @ basis).var(0), spread**2, rtol=1e-3, atol=1e-5)
    assert (spread.diff() <= 0).all()
    network = flow(feature_scale=scale)
    network.set_components((mean, basis, spread))
    maps = torch.randn(2, 12, 8, 8)
    torch.testing.assert_close(network.restore(network.reduce(maps)), maps, rtol=1e-3, atol=1e-3)
    few = flow(components=4)
    few.set_components(principal_components(store, scale, 4, seed=0))
    assert few.reduce(maps).shape == (2, 4, 8, 8)
    assert few.generate(MASKS).shape == (2, 12, 8, 8)


def test_noise_has_the_spectrum_of_the_features_and_an_untrained_flow_leaves_it_alone(
    features: Path,
) -> None:
    store = featurestore.open(features / "train")
    network = flow(components=4)
    network.set_components(principal_components(store, network.feature_scale.flatten(), 4, seed=0))
    network.set_amplitude(mean_amplitude(store, network, seed=0))
    maps = torch.from_numpy(store.gather("features", np.arange(len(store)))).float()
    real = network.reduce(maps / network.feature_scale)
    noise = network.start(
        torch.randn(4000, network.z_dim, generator=torch.Generator().manual_seed(0))
    )
    assert noise.shape == (4000, 4, 8, 8)

    def power(fields: Tensor) -> Tensor:
        return torch.fft.fft2(fields).abs().square().mean(0)

    torch.testing.assert_close(
        power(noise), power(real), rtol=0.15, atol=0.05
    )  # of 4000 fields: 1.6% for each wave
    z = torch.randn(2, network.z_dim)
    network.steps = 64
    torch.testing.assert_close(
        network(z, MASKS), network.restore(network.start(z)), rtol=1e-2, atol=1e-2
    )


def test_the_velocity_of_a_gaussian_field_is_known() -> None:
    """Regression of x_1 - x_0 on x_t, for fields of one spectrum, gives the untrained velocity."""
    generator = torch.Generator().manual_seed(0)
    network = flow()
    network.set_amplitude(torch.rand(12, 8, 5, generator=generator) + 0.2)
    start, end = (
        network.start(torch.randn(500, network.z_dim, generator=generator)) for _ in range(2)
    )
    for time in (0.0, 0.3, 0.5, 0.9):
        now = torch.lerp(start, end, time)
        slope = float((now * (end - start)).sum() / now.square().sum())
        given = network.velocity(now[:2], torch.full((2,), time), MASKS)
        torch.testing.assert_close(given, slope * now[:2], rtol=0.05, atol=0.05)


def test_integration_follows_the_velocity(monkeypatch: pytest.MonkeyPatch) -> None:
    """For dx/dt = a x + b t the midpoint rule's error falls with the square of the steps."""
    errors = []
    z = torch.randn(2, 12 * 8 * 8)
    for steps in (8, 16):
        network = flow(steps=steps, components=12)
        monkeypatch.setattr(network, "velocity", lambda x, time, masks: -x + time.view(-1, 1, 1, 1))
        exact = (z.view(2, 12, 8, 8) + 1) * np.exp(-1)  # x(t) = (x(0) + 1) e^-t + t - 1
        errors.append(float((network(z, MASKS) - exact).abs().max()))
    assert errors[1] < 0.3 * errors[0] < 0.01


def test_variations_start_from_the_real_features_in_their_share_of_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With dx/dt = b, features from time 1 - s move by s b, the rest of them by 0."""
    network = flow(components=4, steps=8)
    directions = torch.linalg.qr(torch.randn(12, 12))[0]
    network.set_components((torch.randn(12), directions[:, :4], torch.rand(4) + 0.5))
    times: list[float] = []

    def velocity(x: Tensor, time: Tensor, masks: Tensor) -> Tensor:
        times.append(float(time[0]))
        return torch.full_like(x, 3.0)

    monkeypatch.setattr(network, "velocity", velocity)
    real, z = torch.randn(2, 12, 8, 8), torch.randn(2, network.z_dim)
    scale = network.feature_scale
    old, noise = network.reduce(real / scale), z.view(2, 4, 8, 8)
    for strength, evaluations in ((0.25, 4), (0.5, 8), (1.0, 16)):
        times.clear()
        varied = network.vary(real, MASKS, z=z, strength=strength)
        assert len(times) == evaluations
        assert times[0] == 1 - strength
        new = (1 - strength) * old + strength * noise + 3 * strength
        torch.testing.assert_close(network.reduce(varied / scale), new, rtol=1e-4, atol=1e-4)
        others = directions[:, 4:]
        rest = [torch.einsum("bchw,cr->brhw", maps / scale, others) for maps in (varied, real)]
        torch.testing.assert_close(rest[0], rest[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        network.vary(real, MASKS, z=z, strength=1e-6), real, rtol=1e-3, atol=1e-3
    )
    anew = network.generate(MASKS, z=z) + real - network.restore(old) * scale
    torch.testing.assert_close(
        network.vary(real, MASKS, z=z, strength=1.0), anew, rtol=1e-3, atol=1e-3
    )
    monkeypatch.setattr(network, "nonnegative", True)
    assert network.vary(real, MASKS, z=z, strength=0.5).min() == 0


def test_an_edit_carries_an_object_from_the_distribution_of_its_class_to_that_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between Gaussians the flow is known: of N(m, s^2) x becomes m' + s' / s (x - m).

    Pixels that keep their class, and what no component holds, stay.
    """
    network = flow(components=4, steps=64)
    directions = torch.linalg.qr(torch.randn(12, 12))[0]
    network.set_components((torch.randn(12), directions[:, :4], torch.rand(4) + 0.5))
    means, spreads = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 0.5, 1.5])

    def velocity(x: Tensor, time: Tensor, masks: Tensor) -> Tensor:
        labels = masks[:, ::8, ::8].long()[:, None]
        mean, variance, t = means[labels], spreads[labels].square(), time.view(-1, 1, 1, 1)
        return mean + (t * variance - (1 - t)) / (t.square() * variance + (1 - t).square()) * (
            x - t * mean
        )

    monkeypatch.setattr(network, "velocity", velocity)
    real, scale = torch.randn(4, 12, 8, 8), network.feature_scale
    old = MASKS.clone()
    new = torch.where(old == 1, 2, old)
    swapped = network.swap_classes(real, old, new)
    before, after = network.reduce(real / scale), network.reduce(swapped / scale)
    changed = (old[:, ::8, ::8] == 1).repeat(2, 1, 1)[:, None]
    expected = torch.where(changed, -1.0 + 1.5 / 0.5 * (before - 2.0), before)
    torch.testing.assert_close(after, expected, rtol=5e-3, atol=5e-3)
    rest = [
        torch.einsum("bchw,cr->brhw", maps / scale, directions[:, 4:]) for maps in (swapped, real)
    ]
    torch.testing.assert_close(rest[0], rest[1], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(network, "nonnegative", True)
    assert network.swap_classes(real, old, new).min() == 0


def test_loss_is_the_regression_of_straight_lines() -> None:
    network = flow()
    trainer = FlowTrainer(
        make_accelerator("cpu", "no"), Networks(network), lr=1e-3, betas=(0.9, 0.999)
    )
    maps = torch.randn(2, 12, 8, 8)
    seen: dict[str, Tensor] = {}

    def velocity(x: Tensor, time: Tensor, masks: Tensor) -> Tensor:
        seen.update(x=x, time=time)
        return torch.zeros_like(x)

    network.velocity = velocity  # type: ignore[method-assign]
    step = trainer.forward(maps, MASKS, None, ratio=1, rng=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 2, network.z_dim + 1, generator=torch.Generator().manual_seed(0))[0]
    start, end = noise[:, :-1].view(2, 12, 8, 8), network.reduce(maps / network.feature_scale)
    time = seen["time"].view(-1, 1, 1, 1)
    assert ((time > 0) & (time < 1)).all()
    torch.testing.assert_close(seen["x"], (1 - time) * start + time * end)
    torch.testing.assert_close(step.generator_loss, (end - start).square().mean())


@pytest.mark.medium
def test_a_flow_learns_and_feeds_a_decoder(features: Path, tmp_path: Path) -> None:
    settings = {
        "family": "flow",
        "flow_width": 32,
        "flow_components": 8,
        "generator_lr": 3e-3,
        "betas": [0.9, 0.99],
        "ema_decay": 0.9,
    }
    row = run_gan(features, tmp_path, {"every": 30}, frozen_epochs=60, **settings)
    assert row["monitor/consistency"] > 0.8  # of the right class
    assert row["monitor/diversity"] > 0.3  # and z matters
    assert isinstance(load_generator(tmp_path / "gan"), FlowGenerator)
    run_decoder(features, tmp_path, VARIANTS["frozen"], name="frozen", epochs=2)
    for loss in ("decoder/ce_real", "decoder/ce_added"):
        first, last = read_curves(tmp_path / "metrics" / "frozen-0")[loss]
        assert last < first
    with pytest.raises(
        ConfigError, match="train_gan.family: variant 'joint' works only with gan or image"
    ):
        run_decoder(features, tmp_path, VARIANTS["featuregan-1x"], name="joint")


@pytest.fixture(scope="module")
def flows(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained flow."""
    folder = tmp_path_factory.mktemp("flows")
    run_gan(features, folder, family="flow", frozen_epochs=5)
    return folder


@pytest.mark.parametrize("changes", [[], ["swap"]], ids=str)
def test_a_decoder_gets_the_flows_variations_of_its_batch(
    features: Path, flows: Path, changes: list[str]
) -> None:
    parts, real, _, wanted, z = added_by_a_frozen_generator(features, flows, changes, vary=0.5)
    network = load_generator(flows / "gan")
    assert isinstance(network, FlowGenerator)
    for part, noise in zip(parts, z.chunk(2), strict=True):
        torch.testing.assert_close(
            part.features, network.vary(real, wanted, z=noise, strength=0.5), rtol=1e-4, atol=1e-4
        )


def test_a_decoder_gets_the_flows_class_swaps_of_its_batch(features: Path, flows: Path) -> None:
    parts, real, masks, wanted, _ = added_by_a_frozen_generator(
        features, flows, ["swap"], class_swap=True, ratio=1
    )
    network = load_generator(flows / "gan")
    (part,) = parts
    swapped = network.swap_classes(real, masks, wanted)
    torch.testing.assert_close(part.features, swapped, rtol=1e-4, atol=1e-4)
    assert (swapped - real).abs().max() > 0.01 * real.std()
    with pytest.raises(ConfigError, match="works only with gan or image"):
        added_by_a_frozen_generator(features, flows, ["swap"], class_swap=True, ratio=2)


@pytest.mark.medium
def test_a_killed_decoder_with_variations_resumes_to_the_same_bits(
    features: Path,
    flows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    described = {"augmenter": "featuregan", "generator": "frozen", "vary": 0.5}
    whole, killed = with_gan(flows, tmp_path / "whole"), with_gan(flows, tmp_path / "killed")
    expected = run_decoder(features, whole, described, name="varied")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        run_decoder(features, killed, described, name="varied")
    assert run_decoder(features, killed, described, name="varied") == expected
    assert files(killed / "decoders") == files(whole / "decoders")


def test_a_gan_is_not_asked_for_variations(features: Path, tmp_path: Path) -> None:
    run_gan(features, tmp_path)
    with pytest.raises(
        ConfigError, match="train_gan.family: variant 'varied' works only with flow"
    ):
        run_decoder(
            features,
            tmp_path,
            {"augmenter": "featuregan", "generator": "frozen", "vary": 0.5},
            name="varied",
        )


@pytest.mark.medium
def test_a_killed_flow_training_resumes_to_the_same_bits(
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"family": "flow", "frozen_epochs": 2, "ema_decay": 0.9}
    run_gan(features, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        run_gan(features, tmp_path / "killed", **settings)
    run_gan(features, tmp_path / "killed", **settings)
    ours, undisturbed = files(tmp_path / "killed" / "gan"), files(tmp_path / "whole" / "gan")
    assert ours.keys() == undisturbed.keys()
    assert {name for name in ours if ours[name] != undisturbed[name]} <= {"optimizers.pt"}


def test_more_components_than_channels_are_refused(features: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="flow_components: 13 is more than the 12 channels"):
        run_gan(features, tmp_path, family="flow", flow_components=13)
