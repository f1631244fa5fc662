"""Self-training: labels of a teacher, rounds, exact resume, and stores without images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import featurestore
from featurestore import SpecMismatchError
from stages.augment.self_training import SelfTraining, draw_labels
from stages.training.models import load_decoder
from tests.factories import SPEC, files, run_decoder, stop_after

VOID = 255
SMALL = dataclasses.replace(SPEC, feature_shape=(6, 8, 8), mask_shape=(32, 32), has_images=False)
BASELINE = {"augmenter": "none"}
STUDENT = {"augmenter": "self-training", "rounds": 2, "augment": ["flip", "cutout"]}
EMA = {"augmenter": "self-training", "teacher": "ema"}
SWAPS = {
    "augmenter": "combined",
    "of": [{"augmenter": "self-training", "rounds": 1}, {"augmenter": "upsample"}],
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of three classes; those of ``unlabelled`` have only void in their masks."""
    root, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    centres = 2 * rng.random((3, 6))
    for split, count in (("train", 8), ("val", 4), ("test", 8), ("unlabelled", 10)):
        with featurestore.create(root / split, SMALL, fingerprint=split) as writer:
            for number in range(count):
                labels = rng.choice(3, (4, 4)).repeat(2, 0).repeat(2, 1)
                noise = 0.5 * rng.standard_normal((6, 8, 8))
                features = np.maximum(centres[labels].transpose(2, 0, 1) + noise, 0)
                mask = labels.repeat(4, 0).repeat(4, 1).astype(np.uint8)
                if split == "unlabelled":
                    mask[:] = VOID
                writer.append(
                    id=f"{split} {number}", features=features.astype(np.float32), mask=mask
                )
    return root


def sources(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]


def test_drawn_labels_have_the_teachers_distribution() -> None:
    logits = torch.randn(2, 4, 3, 5)
    size = (3, 5)
    draws = [draw_labels(logits, size, sources(seed, 2)) for seed in range(0, 4000, 2)]
    assert draws[0].dtype == torch.uint8
    counts = torch.stack([torch.stack(draws).eq(k).float().mean(0) for k in range(4)], 1)
    # Standard deviation of a fraction of 2,000 draws: at most 0.011.
    torch.testing.assert_close(counts, logits.softmax(1), rtol=0, atol=0.06)


def test_a_certain_teacher_gives_its_prediction_at_the_masks_size() -> None:
    logits = 1e4 * torch.eye(3)[torch.tensor([[0, 1], [2, 1]])].permute(2, 0, 1)[None]
    labels = draw_labels(logits, (4, 4), sources(0, 1))
    assert labels[0, 0, 0] == 0
    assert labels[0, 0, 3] == labels[0, 3, 3] == 1
    assert labels[0, 3, 0] == 2


@pytest.mark.medium
@pytest.mark.parametrize("variant", [STUDENT, EMA, SWAPS], ids=["rounds", "ema", "combined"])
@pytest.mark.parametrize("saves", [1, 4, 5])  # in the first round, at its end, in the second
def test_a_killed_training_resumes_to_the_same_bits(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: dict, saves: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_decoder(stores, whole, variant, name="s", epochs=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, min(saves, 3) if variant is EMA else saves)
        run_decoder(stores, killed, variant, name="s", epochs=2)
    run_decoder(stores, killed, variant, name="s", epochs=2)
    assert files(killed / "decoders") == files(whole / "decoders")
    assert files(killed / "metrics") == files(whole / "metrics")


@pytest.mark.medium
def test_the_first_teacher_is_the_decoder_without_unlabelled_images(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[dict[str, torch.Tensor]] = []
    start = SelfTraining.start_round

    def look(self: SelfTraining) -> None:
        taught.append({key: value.clone() for key, value in self.decoder.state_dict().items()})
        start(self)

    monkeypatch.setattr(SelfTraining, "start_round", look)
    run_decoder(stores, tmp_path, STUDENT, name="s", epochs=2)
    run_decoder(stores, tmp_path, {**BASELINE, "augment": STUDENT["augment"]}, name="b", epochs=2)
    assert len(taught) == 2
    baseline = load_decoder(tmp_path / "decoders" / "b-0").state_dict()
    for key, value in baseline.items():
        assert torch.equal(taught[0][key], value), key
    assert any(not torch.equal(taught[1][key], value) for key, value in baseline.items())


@pytest.mark.medium
def test_unlabelled_images_without_labels_of_their_own_improve_the_decoder(
    stores: Path, tmp_path: Path
) -> None:
    settings = {"decoder": "linear", "epochs": 3, "lr": 1e-2}
    baseline = run_decoder(stores, tmp_path, BASELINE, name="b", **settings)
    student = run_decoder(stores, tmp_path, {**STUDENT, "augment": []}, name="s", **settings)
    assert student.miou > baseline.miou


def test_a_variant_that_needs_unlabelled_images_refuses_a_store_without(
    stores: Path, tmp_path: Path
) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / split).symlink_to(stores / split)
    writer = featurestore.create(tmp_path / "unlabelled", SMALL, fingerprint="none")
    with writer:
        assert writer.resume(0) == []
    empty = featurestore.open(tmp_path / "unlabelled")
    assert (len(empty), empty.ids, empty.stats.count) == (0, [], 0)
    empty.verify()
    with pytest.raises(SpecMismatchError) as error:
        run_decoder(tmp_path, tmp_path, STUDENT, name="s")
    assert str(error.value) == (
        f"{tmp_path / 'unlabelled'}: holds no image; set prepare.unlabelled, or remove what"
        " reads it: train_gan.unlabelled or the variant"
    )
