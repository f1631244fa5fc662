"""The measures of generated features, and the monitor on generators with known faults."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import featurestore
from stages.common.errors import CollapseError, ConfigError
from stages.common.runtime import make_accelerator
from stages.gan.diversity import class_variances, draw_diversity, variance_ratios
from stages.gan.fidelity import coverage, frechet_distance, kernel_distance, two_sample_accuracy
from stages.gan.monitor import Monitor, MonitorConfig
from stages.training.checkpoint import Checkpoint
from tests.factories import MONITOR, run_gan

# -- measures ------------------------------------------------------------------------------------


def gaussian(count: int, mean: float = 0.0, spread: float = 1.0, seed: int = 0) -> Tensor:
    return mean + spread * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    # |difference of means|^2 + the sum of squared differences of deviations, in four dimensions
    assert frechet_distance(gaussian(20_000), gaussian(20_000, mean=1, seed=1)) == pytest.approx(
        4, rel=0.05
    )
    assert frechet_distance(gaussian(20_000), gaussian(20_000, spread=3, seed=1)) == pytest.approx(
        4 * 2**2, rel=0.05
    )
    same = gaussian(500)
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-3)


def test_kernel_distance_is_about_zero_for_equal_distributions_only() -> None:
    assert kernel_distance(gaussian(2000), gaussian(2000, seed=1)) == pytest.approx(0, abs=0.02)
    assert kernel_distance(gaussian(2000), gaussian(2000, mean=1, seed=1)) > 0.5


def test_coverage_by_counting() -> None:
    real, fake = gaussian(40), gaussian(30, mean=0.5, seed=1)
    measured = coverage(real, fake, neighbours=3)
    reach = [sorted(float((x - y).norm()) for y in real)[3] for x in real]
    fake_reach = [sorted(float((x - y).norm()) for y in fake)[3] for x in fake]
    inside = np.array(
        [[float((x - y).norm()) < reach[i] for y in fake] for i, x in enumerate(real)]
    )
    inside_fake = np.array(
        [[float((x - y).norm()) < fake_reach[j] for j, y in enumerate(fake)] for x in real]
    )
    assert measured["precision"] == pytest.approx(inside.any(0).mean())
    assert measured["density"] == pytest.approx(inside.sum() / 3 / 30)
    assert measured["coverage"] == pytest.approx(inside.any(1).mean())
    assert measured["recall"] == pytest.approx(inside_fake.any(1).mean())


def test_a_collapsed_generator_covers_little_and_a_good_one_nearly_all() -> None:
    real = gaussian(500)
    assert coverage(real, gaussian(500, seed=1))["coverage"] > 0.9
    collapsed = coverage(real, gaussian(500, spread=0.01, seed=1))
    assert collapsed["coverage"] < 0.1
    assert (
        collapsed["precision"] > 0.9
    )  # each of its vectors looks real: that is why coverage is needed


def test_two_sample_accuracy() -> None:
    assert two_sample_accuracy(gaussian(2000), gaussian(2000, seed=1)) == pytest.approx(
        0.5, abs=0.05
    )
    assert two_sample_accuracy(gaussian(2000), gaussian(2000, mean=4, seed=1)) > 0.98


def test_variances_and_diversity_by_hand() -> None:
    labels = torch.tensor([0] * 5000 + [1] * 5000 + [2] * 5)
    real = torch.cat(
        [gaussian(5000), gaussian(5000, mean=9, spread=2, seed=1), gaussian(5, seed=2)]
    )
    variances = class_variances(real, labels, 4)
    assert variances[0].item() == pytest.approx(4, rel=0.05)
    assert variances[1].item() == pytest.approx(16, rel=0.05)
    assert variances[2:].isnan().all()  # too few, and none
    halved = torch.cat([0.5 * real[:5000], real[5000:]])
    torch.testing.assert_close(
        variance_ratios(real, halved, labels, 4)[:2], torch.tensor([0.25, 1.0])
    )
    shuffled = torch.cat(
        [gaussian(5000, seed=3), gaussian(5000, mean=9, spread=2, seed=4), real[10_000:]]
    )
    assert draw_diversity(real, shuffled, labels, variances) == pytest.approx(1, rel=0.05)
    assert draw_diversity(real, real, labels, variances) == 0


# -- the monitor ---------------------------------------------------------------------------------


class Recall(nn.Module):
    """A generator that returns the stored features of a mask, changed by a function."""

    z_dim = 3

    def __init__(self, store: featurestore.FeatureStore, change=lambda x, z: x) -> None:
        super().__init__()
        self.known = {
            sample.mask.tobytes(): torch.from_numpy(sample.features.copy()).float()
            for sample in store
        }
        self.change = change

    def forward(self, z: Tensor, masks: Tensor) -> Tensor:
        stored = torch.stack([self.known[mask.numpy().tobytes()] for mask in masks])
        return self.change(stored.repeat(len(z) // len(masks), 1, 1, 1), z)


def monitor(features: Path, **changes) -> Monitor:
    stores = {
        name: featurestore.open(features / split)
        for name, split in (("train", "train"), ("held_out", "val"))
    }
    config = MonitorConfig(
        **{
            **MONITOR,
            "min_variance_ratio": 0.1,
            "min_coverage": 0.02,
            "min_consistency": 0.25,
            "max_frechet": 1.5,
            "max_accuracy": 0.99,
            **changes,
        }
    )
    return Monitor(
        config,
        make_accelerator("cpu", "no"),
        **stores,
        feature_scale=torch.ones(1, 12, 1, 1),
        seed=0,
    )


@pytest.fixture
def held_out(features: Path) -> featurestore.FeatureStore:
    return featurestore.open(features / "val")


CALM = {"discriminator/accuracy_real": 0.7, "discriminator/accuracy_fake": 0.9}


def test_a_perfect_generator_measures_like_real_features(
    features: Path, held_out: featurestore.FeatureStore
) -> None:
    watching = monitor(features)
    row = watching.measure(Recall(held_out))
    assert row["monitor/frechet"] == pytest.approx(0, abs=1e-2)
    watching = monitor(features)
    watching.measure(Recall(held_out, lambda x, z: x + 1))  # what it was at the start
    row = watching.measure(Recall(held_out))
    assert row["monitor/frechet_start"] > 1
    assert row["monitor/coverage"] == row["monitor/precision"] == 1
    assert row["monitor/variance_ratio"] == pytest.approx(1)
    assert row["monitor/two_sample_accuracy"] <= 0.55
    assert row["monitor/consistency"] == pytest.approx(row["monitor/consistency_real"], abs=0.05)
    assert row["monitor/consistency"] > 0.9  # the classes of this store are easy to tell apart
    assert row["monitor/diversity"] == 0  # z is not looked at
    assert 0 < row["monitor/frechet_floor"] < 1
    assert watching.collapse({**CALM, **row}) is None


def test_each_fault_shows_in_its_measure(
    features: Path, held_out: featurestore.FeatureStore
) -> None:
    watching = monitor(features)
    good = watching.measure(Recall(held_out))
    shifted = watching.measure(Recall(held_out, lambda x, z: x + 1))
    assert shifted["monitor/frechet"] > 10 * good["monitor/frechet"] + 1
    assert shifted["monitor/two_sample_accuracy"] > 0.95
    swapped = watching.measure(
        Recall(held_out, lambda x, z: x.flip(-1))
    )  # right features in wrong places
    assert swapped["monitor/consistency"] < 0.5
    assert swapped["monitor/frechet"] < 0.1 * shifted["monitor/frechet"]
    noisy = watching.measure(Recall(held_out, lambda x, z: x + 0.3 * z.mean(1).view(-1, 1, 1, 1)))
    assert noisy["monitor/diversity"] > 0.1


def test_a_collapse_is_one_warning_with_its_figure(
    features: Path,
    held_out: featurestore.FeatureStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    constant = Recall(held_out, lambda x, z: x.mean((0, 2, 3), keepdim=True).expand_as(x))
    watching = monitor(features)
    row = {**CALM, **watching.measure(constant)}
    with caplog.at_level(logging.WARNING):
        watching.check(row, 4)
        watching.check(row, 5)
    assert len(caplog.records) == 1
    assert (
        "epoch 5: the GAN collapses: generated features of a class vary 0.000 times as much as real"
        in caplog.text
    )
    stopping = monitor(features, on_collapse="stop").check(row, 4)
    assert "set monitor.on_collapse to warn" in str(stopping)
    assert monitor(features, on_collapse="stop", patience=5).check(row, 4) is None  # not yet
    won = {"discriminator/accuracy_real": 0.999, "discriminator/accuracy_fake": 1.0}
    assert "the discriminator is right about 99.9%" in (monitor(features).collapse(won) or "")
    fine = {**CALM, **watching.measure(Recall(held_out))}
    assert watching.collapse(fine) is None
    reasons = {
        "near 1.0% of the real ones": {"monitor/coverage": 0.01},
        "a probe recognises the classes of generated features 0.10 times as well": {
            "monitor/consistency": 0.1 * fine["monitor/consistency_real"]
        },
        "2.00 times as far from real ones as at the start": {
            "monitor/frechet": 2 * fine["monitor/frechet_start"]
        },
    }
    for reason, fault in reasons.items():
        assert reason in (watching.collapse({**fine, **fault}) or "")


def test_measuring_does_not_change_training(features: Path, tmp_path: Path) -> None:
    for every in (0, 1):
        run_gan(features, tmp_path / str(every), {"every": every})
    unwatched, watched = (
        (tmp_path / every / "gan" / "generator.safetensors").read_bytes() for every in ("0", "1")
    )
    assert unwatched == watched


def unlabelled(store: featurestore.FeatureStore, path: Path, labelled: int, pixels: int) -> None:
    """Copy a store; only the first ``labelled`` samples keep labels, in a square."""
    with featurestore.create(path, store.spec, fingerprint=str(path)) as writer:
        for number, sample in enumerate(store):
            mask = np.full_like(sample.mask, 255)
            if number < labelled:
                mask[8 : 8 + pixels, :pixels] = number % 3
            writer.append(id=sample.id, features=sample.features, mask=mask, image=sample.image)


def test_masks_with_few_labels_are_measured_or_refused(features: Path, tmp_path: Path) -> None:
    for split, labelled, pixels in (("train", 3, 48), ("val", 1, 64)):
        unlabelled(featurestore.open(features / split), tmp_path / "few" / split, labelled, pixels)
    watching = monitor(
        tmp_path / "few", samples=1
    )  # the sample that has labels, whichever is drawn first
    row = watching.measure(Recall(featurestore.open(tmp_path / "few" / "val")))
    assert row["monitor/consistency_real"] >= 0
    for name, labelled, pixels, message in (
        (
            "none",
            0,
            0,
            r"monitor\.every: .*val: the masks have no labelled pixel at the features' resolution",
        ),
        (
            "dots",
            2,
            8,
            r"monitor\.samples: .*val: 2 labelled feature pixels are too few to watch the GAN by",
        ),
    ):
        for split in ("train", "val"):
            unlabelled(
                featurestore.open(features / split), tmp_path / name / split, labelled, pixels
            )
        with pytest.raises(ConfigError, match=message):
            monitor(tmp_path / name)
        assert not monitor(tmp_path / name, every=0).due(0, 1)  # switched off, it asks for none


@pytest.mark.medium
def test_a_stopped_training_resumes_with_on_collapse_warn(
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Checkpoint, "due", lambda checkpoint: False)  # the minutes are not over yet
    watching = {"every": 1, "min_variance_ratio": 1.0}
    for _ in range(2):  # the same command stops again
        with pytest.raises(CollapseError, match="epoch 1"):
            run_gan(features, tmp_path / "stopped", {**watching, "on_collapse": "stop"})
    (state,) = (tmp_path / "stopped" / "scratch" / "train-gan").glob("*/checkpoint.pt")
    assert len(torch.load(state, weights_only=True)["history"]) == 1
    for root in ("stopped", "undisturbed"):
        run_gan(features, tmp_path / root, watching)
    stopped, undisturbed = (
        tmp_path / root / "gan" / "generator.safetensors" for root in ("stopped", "undisturbed")
    )
    assert stopped.read_bytes() == undisturbed.read_bytes()


def test_features_that_are_not_finite_are_a_collapse(
    features: Path, held_out: featurestore.FeatureStore
) -> None:
    watching = monitor(features)
    watching.measure(Recall(held_out))
    row = watching.measure(Recall(held_out, lambda x, z: x / 0))
    assert watching.collapse({**CALM, **row}) == "generated features are no finite numbers"
