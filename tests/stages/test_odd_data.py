"""Odd training data: few images, batches without a label, absent classes, overflows of fp16."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import featurestore
from featurestore.dataset import Batch
from stages.augment.registry import AUGMENTERS
from stages.common import runtime
from stages.common.errors import ConfigError, DivergenceError
from stages.models.decoder import Decoder
from stages.training import session
from stages.training.models import OPTIMIZERS_NAME
from stages.training.update import BatchNormGuard
from tests.factories import SPEC, run_decoder, run_gan

pytestmark = pytest.mark.medium

SPLITS = {"train": 8, "val": 1, "test": 1, "unlabelled": 1}
LABELLED = (2, 5)  # of the training images; of four batches of two, two or three have no label
ABSENT = 3  # class in no training image; validation and test images have it
SMALL = {"batch_size": 2, "epochs": 1}
SMALL_GAN = {"batch_size": 2, "frozen_epochs": 1}
FROZEN = {"augmenter": "featuregan", "generator": "frozen"}

GANS: dict[str, dict[str, Any]] = {
    "gan": {},
    "segmentation": {"adversarial_loss": "segmentation"},
    "encoder": {"image_encoder": True},
    "all losses": {
        "adversarial_loss": "wasserstein-gp",
        "lambda_rec": 1.0,
        "lambda_info": 1.0,
        "r1_gamma": 1.0,
        "ema_decay": 0.9,
        "diffaugment": ["flip", "cutout"],
    },
    "concat": {"conditioning": "concat"},
    "flow": {"family": "flow", "flow_components": 4, "flow_width": 8, "flow_steps": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"augmenter": "none", "augment": ["flip", "cutout"]},
    "duplicate": {"augmenter": "duplicate", "statistics": "real"},
    "noise": {"augmenter": "noise", "deviation": "class"},
    "channel-dropout": {"augmenter": "channel-dropout"},
    "linear-delta": {"augmenter": "linear-delta"},
    "extrapolate": {"augmenter": "extrapolate"},
    "interpolate": {"augmenter": "interpolate"},
    "mixup": {"augmenter": "mixup"},
    "upsample": {"augmenter": "upsample"},
    "cvae": {"augmenter": "cvae", "fit_steps": 5},
    "isda": {"augmenter": "isda"},
    "calibration": {"augmenter": "calibration", "neighbours": 1},
    "class-transfer": {"augmenter": "class-transfer", "fraction": 0.5},
    "hflip-views": {"augmenter": "hflip-views"},
    "self-training": {"augmenter": "self-training", "rounds": 1},
    "joint": {"augmenter": "featuregan"},
    "frozen": {**FROZEN, "new_masks": ["flip", "shift", "scale", "paste", "swap"]},
    "edited": {**FROZEN, "new_masks": ["swap"], "class_swap": True, "fraction": 0.5},
    "frozen flow": {**FROZEN, "ratio": 2},
    "edited flow": {**FROZEN, "new_masks": ["swap"], "class_swap": True},
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores in which few training images have a label and none has the last of four classes."""
    root = tmp_path_factory.mktemp("odd")
    names = ("belt", "can", "paper", "rare")
    spec = dataclasses.replace(
        SPEC,
        feature_shape=(12, 8, 8),
        mask_shape=(64, 64),
        class_names=names,
        palette=tuple((60 * number, 0, 0) for number in range(len(names))),
    )
    rng = np.random.default_rng(0)
    for split, count in SPLITS.items():
        with featurestore.create(root / split, spec, fingerprint=split) as writer:
            for number in range(count):
                mask = rng.integers(0, 3, (8, 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
                if split == "unlabelled" or (split == "train" and number not in LABELLED):
                    mask[:] = 255
                elif split != "train":
                    mask[:16] = ABSENT
                features = rng.random((12, 8, 8), np.float32)
                image = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
                for view, step in (("identity", 1), ("hflip", -1)):
                    writer.append(
                        id=f"{split} {number}",
                        view=view,
                        features=features[:, :, ::step],
                        mask=mask[:, ::step],
                        image=image[:, ::step],
                    )
    return root


@pytest.fixture(scope="module")
def gans(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders of a GAN and a flow that were trained on these stores."""
    folders = {name: tmp_path_factory.mktemp("trained") for name in ("gan", "flow")}
    for name, folder in folders.items():
        run_gan(odd, folder, **SMALL_GAN, **GANS[name])
    return folders


def check_finite(folder: Path) -> None:
    """Check all weights and statistics in a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    for file in files:
        for name, tensor in load_file(file).items():
            assert tensor.isfinite().all(), (file.name, name)
    for file in folder.rglob(OPTIMIZERS_NAME):
        for optimizer in torch.load(file, weights_only=True)["optimizers"].values():
            for state in optimizer["state"].values():
                assert all(value.isfinite().all() for value in state.values())


def test_every_augmenter_is_tried() -> None:
    tried = {variant["augmenter"] for variant in VARIANTS.values()}
    assert tried == {kind.model_fields["augmenter"].annotation.__args__[0] for kind in AUGMENTERS}


@pytest.mark.parametrize("name", GANS)
def test_a_gan_learns_from_batches_without_a_label_and_an_absent_class(
    odd: Path, tmp_path: Path, name: str
) -> None:
    row = run_gan(odd, tmp_path, **SMALL_GAN, **GANS[name])
    assert all(math.isfinite(value) for key, value in row.items() if not key.startswith("monitor"))
    check_finite(tmp_path / "gan")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_decoder_learns_from_batches_without_a_label_and_an_absent_class(
    odd: Path, tmp_path: Path, gans: dict[str, Path], name: str
) -> None:
    (tmp_path / "gan").symlink_to(gans["flow" if "flow" in name else "gan"] / "gan")
    settings = {**SMALL, "class_weight_cap": 10.0}
    scores = run_decoder(odd, tmp_path, VARIANTS[name], name="odd", **settings)
    check_finite(tmp_path / "decoders")
    assert math.isfinite(scores.miou)
    assert scores.iou["rare"] is not None  # it is in the test image


@pytest.mark.parametrize(
    "train", [run_gan, partial(run_decoder, variant=VARIANTS["none"], name="x")]
)
def test_fewer_images_than_a_batch_are_refused_before_the_work(
    odd: Path, tmp_path: Path, train: Any
) -> None:
    with pytest.raises(
        ConfigError, match="batch_size: 10 is more than the 8 samples that an epoch"
    ):
        train(odd, tmp_path, batch_size=10)
    assert not (tmp_path / "gan").exists()
    assert not (tmp_path / "decoders").exists()


# -- overflows of fp16 -----------------------------------------------------------------------------


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> torch.amp.GradScaler:
    """Train in float32 with the loss scale of fp16, which accelerate allows only on a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def make_accelerator(*arguments: Any, **options: Any) -> Accelerator:
        accelerator = runtime.make_accelerator(*arguments, **options)
        accelerator.scaler = scaler
        return accelerator

    monkeypatch.setattr(session, "make_accelerator", make_accelerator)
    return scaler


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Return numbers of batches, in all epochs, whose first feature is infinite."""
    numbers: set[int] = set()
    seen = itertools.count()
    batches = session.Session.batches

    def damaged(self: session.Session, epoch: int) -> Iterator[tuple[int, Batch]]:
        for number, batch in batches(self, epoch):
            if next(seen) in numbers:
                features = batch.features.clone()
                features[0, 0, 0, 0] = math.inf
                batch = dataclasses.replace(batch, features=features)
            yield number, batch

    monkeypatch.setattr(session.Session, "batches", damaged)
    return numbers


@pytest.mark.parametrize("name", ["gan", "all losses", "flow"])
def test_a_gan_survives_an_overflow(
    odd: Path, tmp_path: Path, scaled: torch.amp.GradScaler, overflowing: set[int], name: str
) -> None:
    overflowing.add(1)
    row = run_gan(odd, tmp_path, **SMALL_GAN, **GANS[name])
    check_finite(tmp_path / "gan")
    assert all(math.isfinite(value) for key, value in row.items() if not key.startswith("monitor"))
    assert row["fp16/overflows"] == 0.25
    assert scaled.get_scale() == 2.0**9


@pytest.mark.parametrize("name", ["none", "duplicate", "isda", "joint", "frozen", "class-transfer"])
def test_a_decoder_survives_an_overflow(
    odd: Path,
    tmp_path: Path,
    gans: dict[str, Path],
    scaled: torch.amp.GradScaler,
    overflowing: set[int],
    name: str,
) -> None:
    (tmp_path / "gan").symlink_to(gans["gan"] / "gan")
    overflowing.add(1)
    run_decoder(odd, tmp_path, VARIANTS[name], name="odd", **SMALL)
    check_finite(tmp_path / "decoders")
    assert scaled.get_scale() == 2.0**9


def test_an_epoch_of_overflows_is_a_training_that_diverges(
    odd: Path, tmp_path: Path, scaled: torch.amp.GradScaler, overflowing: set[int]
) -> None:
    overflowing |= set(range(4))
    with pytest.raises(DivergenceError, match="decoder/ce_real is nan"):
        run_decoder(odd, tmp_path, VARIANTS["none"], name="odd", **SMALL)


@pytest.mark.parametrize("updated", [True, False])
def test_running_statistics_stay_as_they_were_before_an_overflow(updated: bool) -> None:
    """Also where a batch is left out of the statistics: 0 times infinity is NaN."""
    decoder = Decoder(head="linear", in_channels=3, num_classes=2).train()
    norm = decoder.head[0]
    scaler = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    statistics = BatchNormGuard(scaler, [decoder])
    features = torch.rand(2, 3, 8, 8)
    decoder(features)
    statistics.keep_finite()
    before = norm.running_mean.clone(), norm.running_var.clone()
    assert not before[0].equal(torch.zeros(3))
    with decoder.running_statistics(updated=updated):
        decoder(torch.full_like(features, math.inf))
    assert not norm.running_mean.isfinite().any()
    statistics.keep_finite()
    assert norm.running_mean.equal(before[0])
    assert norm.running_var.equal(before[1])
    without_scale = BatchNormGuard(SimpleNamespace(scaler=None), [decoder])
    decoder(torch.full_like(features, math.inf))
    without_scale.keep_finite()  # other precisions end with an error
    assert not norm.running_mean.isfinite().any()
