"""A GAN that also learns from unlabelled images: masks, weights, exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import featurestore
from featurestore import SpecMismatchError
from featurestore.dataset import Batch, FeatureLoader
from stages.training.pseudo_masks import PseudoMasks, SampleSource
from tests.factories import files, run_gan, stop_after

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def fitted(features: Path) -> PseudoMasks:
    store = featurestore.open(features / "train")
    source = PseudoMasks(store.spec, CPU)
    source.fit_unless_restored(FeatureLoader(store, 5, seed=0, drop_last=True, workers=0), seed=0)
    return source


def batch_of(features: Path, split: str, count: int = 4) -> Batch:
    loader = FeatureLoader(
        featurestore.open(features / split), count, seed=0, drop_last=True, workers=0
    )
    return next(iter(loader.epoch(0)))


def test_the_decoder_predicts_the_classes_of_unseen_features(
    features: Path, fitted: PseudoMasks
) -> None:
    batch = batch_of(features, "test")
    masks, confidence = fitted.label(batch.features, (64, 64))
    labelled = batch.masks != 255
    assert (masks == batch.masks)[labelled].float().mean() > 0.8
    probability = fitted.decoder(batch.features.float(), (64, 64)).softmax(1).amax(1)
    torch.testing.assert_close(confidence, probability.mean((1, 2)))


def test_an_unlabelled_sample_is_behind_a_labelled_one_and_weighs_its_confidence(
    features: Path, fitted: PseudoMasks
) -> None:
    batch, other = batch_of(features, "train"), batch_of(features, "unlabelled")
    batch.unlabelled = other
    samples = fitted.take(batch)
    masks, confidence = fitted.label(other.features, (64, 64))
    assert torch.equal(samples.features[0::2], batch.features)
    assert torch.equal(samples.features[1::2], other.features)
    assert torch.equal(samples.masks[0::2], batch.masks)
    assert torch.equal(samples.masks[1::2], masks)
    assert samples.weights is not None
    assert torch.equal(samples.weights[0::2], torch.ones(4))
    assert torch.equal(samples.weights[1::2], confidence)


def test_without_unlabelled_samples_a_batch_is_unchanged(features: Path) -> None:
    batch = batch_of(features, "train")
    samples = SampleSource().take(batch)
    assert samples.features is batch.features
    assert samples.weights is None


@pytest.mark.medium
@pytest.mark.parametrize("family", ["gan", "flow"])
def test_a_killed_training_resumes_to_the_same_bits(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    row = run_gan(features, whole, unlabelled=True, family=family)
    assert 1 / 3 < row["pseudo_masks/confidence"] <= 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        run_gan(features, killed, unlabelled=True, family=family)
    with monkeypatch.context() as patch:  # the saved state has the decoder
        patch.setattr(torch.optim.AdamW, "step", None)
        run_gan(features, killed, unlabelled=True, family=family)
    assert files(killed / "gan") == files(whole / "gan")


def test_a_store_without_images_is_refused(features: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(features / split)
    spec = featurestore.open(features / "train").spec
    with featurestore.create(tmp_path / "unlabelled", spec, fingerprint="none") as writer:
        writer.resume(0)
    with pytest.raises(SpecMismatchError) as error:
        run_gan(tmp_path, tmp_path, unlabelled=True)
    assert str(error.value) == (
        f"{tmp_path / 'unlabelled'}: holds no image; set prepare.unlabelled, or remove what reads"
        " it: train_gan.unlabelled or the variant"
    )
