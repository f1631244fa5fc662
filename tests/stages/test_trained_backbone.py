"""train-decoder with an unfrozen backbone (thesis section 5.2.4), and the use of what it trains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import featurestore
from featurestore import SpecMismatchError
from stages.augment.registry import VARIANTS, check_variant
from stages.backbones.map_network import MapNetwork, load_map_network
from stages.commands.params import Params
from stages.common.errors import ConfigError
from stages.common.runtime import seed_everything
from stages.reporting.curves import read_curves
from stages.segmentation.image_transforms import build_transform
from stages.training.feature_source import TrainedBackbone
from stages.training.models import load_backbone, load_decoder
from stages.use import evaluate, export
from stages.use.segmenter import Segmenter
from tests.factories import (
    extract,
    extract_config,
    prepare,
    prepare_config,
    run,
    run_decoder,
    run_gan,
    stop_after,
    write_photos,
)
from tests.imports import ROOT

LAYERS = ["blocks.1", "blocks.2", "blocks.4"]  # of strides 4, 8 and 16
BASELINE = {"augmenter": "none"}
TRAINED = {"backbone": "trained", "image_augment": [], "decoder": "linear", "dropout": 0.0}


@pytest.fixture(scope="module")
def photo_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of float32 stores of two layers, with images."""
    root = tmp_path_factory.mktemp("trained")
    write_photos(root / "photos", {"train": 8, "val": 4, "test": 4}, size=64)
    prepare(prepare_config(root / "photos"), root)
    extract(extract_config(layers=LAYERS, dilate=False, feature_dtype="float32"), root)
    return root / "features"


def pretrained(features: Path) -> MapNetwork:
    return load_map_network(featurestore.open(features / "train").spec, "default")


def weights_of(network: MapNetwork) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.backbone.network.state_dict().items()}


@pytest.mark.medium
def test_with_rate_0_the_scores_are_those_of_the_frozen_backbone(
    photo_features: Path, tmp_path: Path
) -> None:
    changes = {"decoder": "linear", "dropout": 0.0, "epochs": 2}
    frozen = run_decoder(photo_features, tmp_path, BASELINE, name="f", **changes)
    trained = run_decoder(
        photo_features, tmp_path, BASELINE, name="t", **{**TRAINED, **changes}, backbone_lr=0.0
    )
    assert trained.pixel_accuracy == pytest.approx(frozen.pixel_accuracy, abs=2e-3)
    assert trained.iou == pytest.approx(frozen.iou, abs=5e-3)
    first, second = (load_decoder(tmp_path / "decoders" / f"{name}-0") for name in "ft")
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)
    before = weights_of(pretrained(photo_features))
    after = weights_of(load_backbone(tmp_path / "decoders" / "t-0"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_step_is_that_of_a_literal_transcription(photo_features: Path, tmp_path: Path) -> None:
    store = featurestore.open(photo_features / "train")
    options = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "backbone_lr": 1e-4}
    options |= {"weight_decay": 0.1, "lr_schedule": "poly"}
    run_decoder(photo_features, tmp_path, BASELINE, name="t", **{**TRAINED, **options})
    folder = tmp_path / "decoders" / "t-0"

    network, decoder = pretrained(photo_features), load_decoder(folder)
    seed_everything(0)
    fresh = type(decoder)(**_architecture(folder))
    rows = np.arange(8)
    images = torch.from_numpy(store.gather("images", rows)).movedim(-1, 1)
    masks = torch.from_numpy(store.gather("masks", rows)).long()
    body = network.backbone.network.requires_grad_(True).eval()
    mean, deviation = (
        torch.tensor(values).view(1, 3, 1, 1)
        for values in (store.spec.normalization_mean, store.spec.normalization_std)
    )
    fine, grid, coarse = body((images / 255 - mean) / deviation)
    coarse = F.interpolate(coarse, (8, 8), mode="bilinear", align_corners=False)
    features = torch.cat([F.pixel_unshuffle(fine, 2), grid, coarse], 1)
    logits = F.interpolate(fresh.train()(features), (64, 64), mode="bilinear", align_corners=False)
    optimizers = []
    for module, rate in ((fresh, 1e-3), (body, 1e-4)):
        decayed = [each for each in module.parameters() if each.ndim > 1]
        others = [each for each in module.parameters() if each.ndim == 1]
        optimizers.append(torch.optim.AdamW(decayed, rate, weight_decay=0.1))
        optimizers.append(torch.optim.AdamW(others, rate, weight_decay=0.0))
    F.cross_entropy(logits, masks, ignore_index=255).backward()
    for optimizer in optimizers:
        optimizer.step()

    moved = 0.0
    pairs = [(load_backbone(folder).backbone.network, body), (decoder, fresh)]
    before = weights_of(pretrained(photo_features))
    for ours, literal in pairs:
        for (name, one), other in zip(ours.named_parameters(), literal.parameters(), strict=True):
            # Adam's first step is the sign of a gradient, so tiny gradients may differ in sign.
            close = torch.isclose(one, other.detach(), atol=2e-6, rtol=1e-4).float().mean()
            assert close > 0.75, name
            if ours is pairs[0][0]:
                moved = max(moved, float((one - before[name]).abs().max()))
    assert moved == pytest.approx(1e-4, rel=0.5)  # Adam's first step is the rate


def _architecture(folder: Path) -> dict[str, Any]:
    from stages.training.models import read_config

    return read_config(folder)["architecture"]


@pytest.mark.medium
@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_batchnorm_keeps_or_trains_its_statistics(
    photo_features: Path, tmp_path: Path, batchnorm: str
) -> None:
    changes = {**TRAINED, "backbone_batchnorm": batchnorm, "epochs": 1}
    run_decoder(photo_features, tmp_path, BASELINE, name="t", **changes)
    before = weights_of(pretrained(photo_features))
    after = weights_of(load_backbone(tmp_path / "decoders" / "t-0"))
    equal = [torch.equal(before[name], after[name]) for name in before if "running_mean" in name]
    assert all(equal) if batchnorm == "eval" else not any(equal)
    assert not torch.equal(before["conv_stem.weight"], after["conv_stem.weight"])


@pytest.mark.medium
def test_a_killed_training_resumes_to_the_same_bits(
    photo_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**TRAINED, "image_augment": ["flip", "crop", "colour"], "dropout": 0.1}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_decoder(photo_features, whole, BASELINE, name="t", **changes)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        run_decoder(photo_features, killed, BASELINE, name="t", **changes)
    run_decoder(photo_features, killed, BASELINE, name="t", **changes)
    for file in ("decoder", "backbone", "decoder-best", "backbone-best"):
        resumed, undisturbed = (
            (root / "decoders" / "t-0" / f"{file}.safetensors").read_bytes()
            for root in (killed, whole)
        )
        assert resumed == undisturbed, file


@pytest.mark.medium
def test_the_trained_backbone_is_evaluated_used_and_exported(
    photo_features: Path, tmp_path: Path
) -> None:
    changes = {**TRAINED, "backbone_lr": 1e-3, "epochs": 2}
    scores = run_decoder(photo_features, tmp_path, BASELINE, name="t", **changes)
    folder, test = tmp_path / "decoders" / "t-0", featurestore.open(photo_features / "test")
    options = {"weights": "decoder", "classes": [], "device": "cpu", "batch_size": 4, "workers": 0}
    assert evaluate.run(folder, photo_features / "test", **options).scores.iou == scores.iou
    segmenter = Segmenter.load(folder, device="cpu")
    predicted = np.stack([segmenter(sample.image) for sample in test])
    masks = test.gather("masks", np.arange(len(test)))
    valid = masks != 255
    accuracy = (predicted == masks)[valid].mean()
    assert accuracy == pytest.approx(scores.pixel_accuracy, abs=2e-3)
    frozen = load_map_network(test.spec, "default")
    images = torch.from_numpy(test.gather("images", np.arange(4))).movedim(-1, 1)
    with torch.no_grad():
        assert not torch.allclose(frozen(images), load_backbone(folder)(images), atol=1e-2)
    done = export.run(folder, format="torch-export", out=tmp_path / "model.pt2")
    assert done.difference <= 1e-3 * done.largest


@pytest.mark.medium
def test_a_joint_gan_sees_constant_features_and_the_real_loss_reaches_the_backbone(
    photo_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.gan.gan_trainer import GanTrainer

    run_gan(photo_features, tmp_path, frozen_epochs=1)
    seen: list[bool] = []
    forward = GanTrainer.forward

    def look(self: GanTrainer, features: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(features.requires_grad)
        return forward(self, features, *args, **options)

    monkeypatch.setattr(GanTrainer, "forward", look)
    variant = {"augmenter": "featuregan"}
    changes = {**TRAINED, "epochs": 1, "gradient_accumulation": 2}
    run_decoder(photo_features, tmp_path, variant, name="j", **changes)
    assert seen == [False] * 4
    before = weights_of(pretrained(photo_features))
    after = weights_of(load_backbone(tmp_path / "decoders" / "j-0"))
    assert not torch.equal(before["conv_stem.weight"], after["conv_stem.weight"])


def test_without_added_batches_the_gradient_is_that_of_the_real_loss(
    photo_features: Path, tmp_path: Path
) -> None:
    """`duplicate` adds the batch as a constant: the backbone takes the baseline's first step."""
    changes = {**TRAINED, "epochs": 1, "batch_size": 8}
    for name, variant in (("b", BASELINE), ("d", {"augmenter": "duplicate"})):
        run_decoder(photo_features, tmp_path, variant, name=name, **changes)
    one, other = (weights_of(load_backbone(tmp_path / "decoders" / f"{n}-0")) for n in "bd")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_image_transforms_move_the_mask_with_the_image() -> None:
    images = torch.zeros(6, 3, 64, 48, dtype=torch.uint8)
    masks = torch.zeros(6, 64, 48, dtype=torch.uint8)
    images[:, :, 10:30, 5:20], masks[:, 10:30, 5:20] = 200, 1
    torch.manual_seed(0)
    moved, labels = build_transform(("flip", "crop"), (64, 48))(images, masks)
    assert moved.shape == images.shape
    assert moved.dtype == labels.dtype == torch.uint8
    bright = moved[:, 0] > 100
    assert ((labels == 1) == bright).float().mean() > 0.98  # edges are interpolated
    assert len({label.numpy().tobytes() for label in labels}) == 6  # each sample by itself
    torch.manual_seed(0)
    again, _ = build_transform(("flip", "crop"), (64, 48))(images, masks)
    assert torch.equal(moved, again)
    coloured, same = build_transform(("colour",), (64, 48))(images, masks)
    assert torch.equal(same, masks)
    assert not torch.equal(coloured, images)


@pytest.mark.slow
def test_two_processes_train_as_one(photo_features: Path, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    states = []
    for how, launcher in (("one", ()), ("two", torchrun)):
        command = (sys.executable, *launcher, "-m", "tests.stages.train_in_processes", "unfrozen")
        paths = map(str, (photo_features, tmp_path / how, tmp_path / "no-gan"))
        run(*command, *paths, cwd=ROOT, OMP_NUM_THREADS="1")
        curves = read_curves(tmp_path / how / "metrics" / "unfrozen")
        states.append((weights_of(load_backbone(tmp_path / how / "unfrozen")), curves))
    (one, curve), (two, other) = states
    expected = curve["decoder/ce_real"].to_numpy()
    assert other["decoder/ce_real"].to_numpy() == pytest.approx(expected, rel=2e-3)
    for name, tensor in one.items():
        if tensor.ndim > 1:  # Adam takes a whole step even where a gradient is rounding
            assert (two[name] - tensor).abs().median() <= 2e-5, name


# -- bad input -------------------------------------------------------------------------------------


def test_a_store_without_images_is_refused(photo_features: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", {"train": 4, "val": 4, "test": 4}, size=64)
    prepare(prepare_config(tmp_path / "photos"), tmp_path)
    extract(extract_config(store_images=False), tmp_path)
    with pytest.raises(SpecMismatchError, match="extract with store_images: true"):
        run_decoder(tmp_path / "features", tmp_path, BASELINE, name="t", **TRAINED)


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        ({"augmenter": "class-transfer"}, "variants.x.augmenter"),
        ({"augmenter": "upsample"}, "variants.x.augmenter"),
        ({"augmenter": "combined", "of": [{"augmenter": "cvae"}, {"augmenter": "isda"}]}, "x.augm"),
        ({"augmenter": "none", "view": "random"}, "variants.x.view"),
    ],
)
def test_variants_that_read_stored_features_are_refused(variant: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*stored features.*set backbone to frozen"):
        check_variant(VARIANTS.validate_python({"x": variant})["x"], "x")


def test_parameters_name_the_key_before_any_work() -> None:
    from stages.commands.options import load_preset

    plain = load_preset("quickstart").plain()
    plain["variants"]["tuned"] = {"augmenter": "none", "backbone": "trained"}
    plain["compare"] = {**plain["compare"], "variants": ["tuned"]}
    plain["extract"]["store_images"] = False
    with pytest.raises(ConfigError, match=r"extract.store_images: variant 'tuned' trains the back"):
        Params.model_validate(plain)


def test_statistics_that_processes_cannot_share_are_refused(photo_features: Path) -> None:
    from types import SimpleNamespace

    network = pretrained(photo_features)  # timm's BatchNorm with an activation
    two: Any = SimpleNamespace(num_processes=2)
    with pytest.raises(ConfigError, match="train_decoder.backbone_batchnorm: .* set it to eval"):
        TrainedBackbone(two, network, batchnorm="train", transforms=())


def test_weights_of_a_frozen_backbone_are_not_given_to_a_trained_one(
    photo_features: Path, tmp_path: Path
) -> None:
    changes = {**TRAINED, "epochs": 1, "batch_size": 8}
    run_decoder(photo_features, tmp_path, BASELINE, name="t", **changes)
    with pytest.raises(ConfigError, match="--backbone-weights: .*holds the backbone"):
        Segmenter.load(tmp_path / "decoders" / "t-0", backbone_weights="x.pth", device="cpu")
