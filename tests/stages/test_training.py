"""Training resumes to the same bits, compares variants fairly, and refuses what does not fit."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

import featurestore
from featurestore import IncompleteStoreError, ShardCorruptError, SpecMismatchError, StoreWriteError
from featurestore.dataset import FeatureLoader
from stages import train_decoder
from stages.augment.base import Labelled
from stages.common.errors import ConfigError, DataError, DivergenceError
from stages.common.runtime import generator as random_generator
from stages.common.runtime import verify_stores, write_json
from stages.gan import gan_trainer
from stages.gan.gan_trainer import GanTrainer
from stages.models.generator import Generator
from stages.models.spectral import SpectralConv2d
from stages.reporting.curves import read_curves
from stages.segmentation.folds import Folds
from stages.segmentation.metrics import confusion_matrix, score
from stages.train_gan import TrainGanConfig
from stages.training.checkpoint import Checkpoint
from stages.training.models import (
    load_decoder,
    load_gan,
    load_generator,
    save_weights,
)
from tests.factories import (
    DECODER,
    GAN,
    SPEC,
    VARIANTS,
    added_by_a_frozen_generator,
    files,
    run,
    run_decoder,
    run_gan,
    stop_after,
    with_gan,
)
from tests.imports import ROOT


@pytest.fixture(scope="module")
def trained(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained GAN."""
    root = tmp_path_factory.mktemp("trained")
    run_gan(features, root)
    return root


# -- train-gan -----------------------------------------------------------------------------------


def test_gan_leaves_networks_config_and_curves(features: Path, trained: Path) -> None:
    names = {
        "generator.safetensors",
        "generator-initial.safetensors",
        "discriminator.safetensors",
        "optimizers.pt",
        "config.json",
    }
    assert {file.name for file in (trained / "gan").iterdir()} == names
    curves = read_curves(trained / "metrics" / "train-gan")
    watched = {name for name in curves if name.startswith("monitor/")}
    terms = {"real", "fake", "accuracy_real", "accuracy_fake"}
    assert set(curves) - watched == {
        "generator/adversarial",
        "generator/feature_matching",
        *(f"discriminator/{term}" for term in terms),
    }
    assert all(
        list(curve.index) == [0, 1, 2] for name, curve in curves.items() if name not in watched
    )
    assert all(
        list(curves[name].index) == [1, 2] for name in watched
    )  # every second epoch, and the last
    assert list((trained / "logs").rglob("events.out.tfevents*"))
    assert not (trained / "scratch" / "train-gan").exists() or not list(
        (trained / "scratch" / "train-gan").iterdir()
    )


def test_a_loaded_generator_makes_features_like_the_stores(features: Path, trained: Path) -> None:
    store = featurestore.open(features / "train")
    generator = load_generator(trained / "gan")
    masks = torch.from_numpy(np.stack([store.mask(position) for position in range(3)]))
    generated = generator.generate(masks, generator=torch.Generator().manual_seed(0))
    assert generated.shape == (3, 12, 8, 8)
    assert generated.min() >= 0
    assert torch.equal(
        generated, generator.generate(masks, generator=torch.Generator().manual_seed(0))
    )
    root_mean_square = np.sqrt(store.stats.mean**2 + store.stats.variance)
    np.testing.assert_allclose(generator.feature_scale.flatten(), root_mean_square, rtol=1e-6)
    untrained = load_generator(trained / "gan", weights="generator-initial").generate(masks)
    assert not torch.allclose(untrained, generated)


def test_a_generator_starts_from_the_class_means_where_it_is_told_to(
    features: Path, tmp_path: Path
) -> None:
    run_gan(features, tmp_path, frozen_epochs=1, prior="class-means", init_gain=1e-6)
    store = featurestore.open(features / "train")
    masks = store.gather("masks", np.arange(len(store)))
    labels, vectors = (
        masks[:, 4::8, 4::8],
        store.gather("features", np.arange(len(store))).astype(np.float64).transpose(0, 2, 3, 1),
    )
    nearest = masks[:, ::8, ::8]  # void in the first row of cells, a quarter of each
    means = np.stack([vectors[nearest == number].mean(0) for number in range(3)])
    untrained = load_generator(tmp_path / "gan", weights="generator-initial").generate(
        torch.from_numpy(masks)
    )
    made = untrained.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(made[:, 1:], means[labels[:, 1:]], rtol=1e-3)
    overall = vectors[nearest != 255].mean(0)
    np.testing.assert_allclose(
        made[:, 0], 0.25 * overall + 0.75 * means[labels[:, 0]], rtol=1e-3
    )  # mixed, as the pixel is


def test_a_gan_of_another_version_is_refused_in_one_line(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "gan", tmp_path / "gan")
    config = json.loads((tmp_path / "gan" / "config.json").read_text())
    del config["architecture"]["prior"]
    (tmp_path / "gan" / "config.json").write_text(json.dumps(config))
    for load in (load_generator, load_gan):
        with pytest.raises(
            DataError,
            match=r"config.json: does not describe networks of this version"
            r" \(KeyError\('prior'\)\); run train-gan again",
        ):
            load(tmp_path / "gan")


@pytest.mark.medium
def test_a_decoder_may_see_each_image_mirrored_or_not_by_chance(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = {"augmenter": "none", "view": "random"}
    with pytest.raises(
        SpecMismatchError, match="holds no view but identity, and view: random draws among several"
    ):
        run_decoder(features, tmp_path, described, name="random")
    root = tmp_path / "features"
    for split in ("val", "test"):
        shutil.copytree(features / split, root / split)
    store = featurestore.open(features / "train")
    with featurestore.create(root / "train", store.spec, fingerprint="both") as writer:
        for view in ("identity", "hflip"):
            for sample in store:
                writer.append(
                    id=sample.id,
                    view=view,
                    features=sample.features,
                    mask=sample.mask,
                    image=sample.image,
                )
    seen: set[int] = set()

    class Watched(FeatureLoader):
        def epoch(self, epoch: int, first: int = 0):
            for batch in super().epoch(epoch, first):
                if self.store.path.name == "train":
                    seen.update(batch.positions.tolist())
                yield batch

    monkeypatch.setattr("stages.training.session.FeatureLoader", Watched)
    run_decoder(root, tmp_path, described, name="random", epochs=12)
    assert seen == set(range(20))
    seen.clear()
    run_decoder(root, tmp_path, {"augmenter": "none"}, name="baseline", epochs=12)
    assert seen == set(range(10))


@pytest.mark.parametrize("changes", [[], ["flip", "paste"]], ids=str)
def test_a_frozen_generator_gives_features_of_the_masks_that_the_decoder_is_to_find(
    features: Path, trained: Path, changes: list[str]
) -> None:
    parts, _, _, wanted, z = added_by_a_frozen_generator(features, trained, changes)
    generator = load_generator(trained / "gan")
    for part, noise in zip(parts, z.chunk(2), strict=True):
        torch.testing.assert_close(
            part.features, generator.generate(wanted, z=noise), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("change", "fraction"), [("paste", 1.0), ("swap", 1.0), ("swap", 0.3)])
def test_a_class_swap_moves_real_features_as_the_generators_move(
    features: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, change: str, fraction: float
) -> None:
    asked = []
    swap_classes = Generator.swap_classes
    monkeypatch.setattr(
        Generator,
        "swap_classes",
        lambda self, real, old, new, *, z: (
            asked.append(len(real)),
            swap_classes(self, real, old, new, z=z),
        )[1],
    )
    parts, real, masks, new, z = added_by_a_frozen_generator(
        features, trained, [change], class_swap=True, weight=0.5, fraction=fraction
    )
    assert [part.weight for part in parts] == [0.5, 0.5]
    generator = load_generator(trained / "gan")
    same = (new == masks).flatten(1).all(1)
    assert (0 < same.sum() < 3) == (fraction < 1)
    assert asked == [2 * int((~same).sum())]  # what stays costs nothing
    for part, noise in zip(parts, z.chunk(2), strict=True):
        expected = real + generator.generate(new, z=noise) - generator.generate(masks, z=noise)
        torch.testing.assert_close(part.features, expected.clamp(min=0), rtol=1e-4, atol=1e-5)
        assert torch.equal(part.features[same], real[same].float())


@pytest.mark.medium
def test_reconstruction_draws_generated_features_to_the_real_ones_of_their_masks(
    features: Path, tmp_path: Path
) -> None:
    store = featurestore.open(features / "val")
    real, masks = (
        torch.from_numpy(store.gather(name, np.arange(len(store))))
        for name in ("features", "masks")
    )
    errors = {}
    for weight in (0.0, 100.0):
        row = run_gan(
            features, tmp_path / str(weight), frozen_epochs=20, lambda_rec=weight, generator_lr=2e-3
        )
        assert ("generator/reconstruction" in row) == (weight > 0)
        made = load_generator(tmp_path / str(weight) / "gan").generate(
            masks, generator=torch.Generator().manual_seed(0)
        )
        errors[weight] = float((made - real).square().mean())
    assert errors[100.0] < 0.85 * errors[0.0]


@pytest.mark.medium
def test_longer_training_brings_generated_statistics_closer(features: Path, tmp_path: Path) -> None:
    run_gan(features, tmp_path, frozen_epochs=40)
    store = featurestore.open(features / "train")
    masks = torch.from_numpy(np.stack([store.mask(position) for position in range(10)]))
    distances = []
    for weights in ("generator-initial", "generator"):
        generated = load_generator(tmp_path / "gan", weights=weights).generate(
            masks, generator=torch.Generator().manual_seed(0)
        )
        distances.append(float(np.abs(generated.mean((0, 2, 3)).numpy() - store.stats.mean).mean()))
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize(
    "saves", [1, 2, 5]
)  # in the middle of the first epoch, at its end, in the middle of the third
def test_a_killed_gan_training_resumes_to_the_same_bits(
    features: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, saves)
        run_gan(features, tmp_path)
    run_gan(features, tmp_path)
    ours, undisturbed = files(tmp_path / "gan"), files(trained / "gan")
    assert {name for name in ours if ours[name] != undisturbed[name]} <= {
        "optimizers.pt"
    }  # a zip file: compared by value below
    states = [
        torch.load(root / "gan" / "optimizers.pt", weights_only=True)
        for root in (tmp_path, trained)
    ]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    curves = [read_curves(root / "metrics" / "train-gan") for root in (tmp_path, trained)]
    for name in curves[0]:
        pd.testing.assert_series_equal(curves[0][name], curves[1][name])


def changed_weights(gan: Path) -> list[str]:
    """Return names of the generator's tensors that training changed."""
    before, after = (
        load_file(gan / f"{name}.safetensors") for name in ("generator-initial", "generator")
    )
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.medium
@pytest.mark.parametrize("loss", ["wasserstein-clip", "wasserstein-gp"])
def test_ablation_losses_and_the_image_encoder_train(
    features: Path, tmp_path: Path, loss: str
) -> None:
    losses = run_gan(features, tmp_path, frozen_epochs=1, adversarial_loss=loss, image_encoder=True)
    assert changed_weights(tmp_path / "gan")
    assert "generator/kld" in losses
    assert ("discriminator/gradient_penalty" in losses) == (loss == "wasserstein-gp")
    assert (tmp_path / "gan" / "image_encoder.safetensors").is_file()
    if loss == "wasserstein-clip":
        from safetensors.torch import load_file

        discriminator = load_file(tmp_path / "gan" / "discriminator.safetensors")
        assert (
            max(
                float(tensor.abs().max())
                for name, tensor in discriminator.items()
                if name.endswith(("weight", "bias"))
            )
            <= 0.01
        )


def test_bf16_autocast_changes_losses_by_its_rounding_and_weights_stay_float32(
    features: Path, tmp_path: Path
) -> None:
    full, half = (
        {
            name: loss
            for name, loss in run_gan(
                features, tmp_path / precision, frozen_epochs=1, mixed_precision=precision
            ).items()
            if name.startswith(("generator/", "discriminator/"))
        }
        for precision in ("no", "bf16")
    )
    assert half == pytest.approx(full, rel=0.05, abs=0.05)
    assert half["generator/feature_matching"] != full["generator/feature_matching"]
    weights = load_file(tmp_path / "bf16" / "gan" / "generator.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {
        torch.float32
    }
    assert changed_weights(tmp_path / "bf16" / "gan")


def test_a_training_that_diverges_stops_with_the_loss_that_did(
    features: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        DivergenceError, match="the training diverges: .* is nan; lower the learning rate"
    ):
        run_gan(features, tmp_path, generator_lr=1e30)
    with pytest.raises(DivergenceError, match="decoder/ce_real is (nan|inf)"):
        run_decoder(features, tmp_path, {"augmenter": "none"}, name="baseline", lr=1e30)
    assert not (tmp_path / "decoders").exists()  # no score of such a decoder


def test_what_the_gan_refuses(features: Path, tmp_path: Path) -> None:
    import dataclasses

    with pytest.raises(ConfigError, match="64 is more than the 10 samples"):
        run_gan(features, tmp_path, batch_size=64)
    small = dataclasses.replace(
        SPEC, feature_shape=(12, 8, 7), mask_shape=(64, 56), has_images=False
    )
    for name, spec in (
        ("small", small),
        ("plain", dataclasses.replace(small, feature_shape=(12, 8, 8), mask_shape=(64, 64))),
    ):
        for split in ("train", "val"):
            with featurestore.create(tmp_path / name / split, spec) as writer:
                for number in range(4):
                    features_of_one = np.ones(spec.feature_shape, np.float32)
                    writer.append(
                        id=str(number),
                        features=features_of_one,
                        mask=np.zeros(spec.mask_shape, np.uint8),
                    )
    with pytest.raises(
        ConfigError,
        match=r"extract.input_size: \(64, 56\) gives features of 8 x 7 at stride 8, and the GAN"
        r" needs 8 x 8; use 64 x 64 pixels or more",
    ):
        run_gan(tmp_path / "small", tmp_path)
    with pytest.raises(SpecMismatchError, match="store_images"):
        run_gan(tmp_path / "plain", tmp_path, image_encoder=True)
    with pytest.raises(ConfigError, match="2 scales need features of 16 x 16 or more"):
        run_gan(tmp_path / "plain", tmp_path, discriminator_scales=2)
    assert not (tmp_path / "gan").exists()


def test_a_repository_without_a_commit_is_explained(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    run("git", "init", "-q", cwd=tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    with pytest.raises(ConfigError, match="commit something first"):
        run_gan(features, tmp_path)


def test_a_damaged_shard_stops_training_by_name(features: Path, tmp_path: Path) -> None:
    shutil.copytree(features, tmp_path / "features")
    shard = tmp_path / "features" / "train" / "shard-00001.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ShardCorruptError, match=r"shard-00001.h5: damaged"):
        run_gan(tmp_path / "features", tmp_path)
    with pytest.raises(ShardCorruptError, match=r"shard-00001.h5: damaged"):
        run_decoder(tmp_path / "features", tmp_path, VARIANTS["baseline"], name="x")
    shard.write_bytes(content[:-10])
    with pytest.raises(IncompleteStoreError, match=r"shard-00001.h5"):
        run_gan(tmp_path / "features", tmp_path)


def test_processes_of_one_machine_share_the_verification(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(features, tmp_path / "features")
    store = featurestore.open(tmp_path / "features" / "train")
    shard = store.folder / "shard-00001.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    verify_stores(store, workers=1)  # the first of two processes reads the shards 0, 2, ...
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ShardCorruptError, match=r"shard-00001.h5: damaged"):
        verify_stores(store, workers=1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(ShardCorruptError, match=r"shard-00001.h5: damaged"):
        verify_stores(store, workers=1)


def test_a_full_disk_is_one_line_and_leaves_no_half_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "test.json", {"miou": 0.5})
    save_weights({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    checkpoint = Checkpoint(tmp_path / "run", minutes=0, main=True)
    checkpoint.save(history=[], step=1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for save in (
        lambda: write_json(tmp_path / "test.json", {"miou": 0.7}),
        lambda: save_weights({"a": torch.ones(3)}, tmp_path / "a.safetensors"),
        lambda: checkpoint.save(history=[], step=2),
    ):
        with pytest.raises(
            StoreWriteError, match=r"cannot be written \(No space left on device\); make room"
        ):
            save()
    monkeypatch.undo()
    assert json.loads((tmp_path / "test.json").read_text()) == {"miou": 0.5}
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 0, 0]
    assert checkpoint.load() == {"history": [], "step": 1}


# -- train-decoder -------------------------------------------------------------------------------

KILLED = [
    ("baseline", 3),
    ("featuregan-1x", 1),
    ("featuregan-2x", 2),
    ("new-masks", 3),
    ("edited", 2),
    ("combined", 3),  # isda and a frozen generator among its members
    ("cvae", 1),
]


@pytest.mark.parametrize(("name", "saves"), KILLED)
@pytest.mark.medium
def test_a_killed_decoder_training_resumes_to_the_same_bits(
    features: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    saves: int,
) -> None:
    whole, killed = with_gan(trained, tmp_path / "whole"), with_gan(trained, tmp_path / "killed")
    expected = run_decoder(
        features, whole, VARIANTS[name], name=name, workers=2
    )  # nor does the number of workers matter
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, saves)
        run_decoder(features, killed, VARIANTS[name], name=name)
    assert run_decoder(features, killed, VARIANTS[name], name=name) == expected
    ours, undisturbed = files(killed / "decoders"), files(whole / "decoders")
    assert ours.keys() == undisturbed.keys()
    assert {path for path in ours if ours[path] != undisturbed[path]} <= {
        f"{name}-0/gan/optimizers.pt"
    }
    assert files(killed / "metrics" / f"{name}-0") == files(whole / "metrics" / f"{name}-0")


@pytest.mark.medium
def test_variants_of_a_seed_start_alike_and_take_equal_steps(
    features: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_gan(trained, tmp_path)
    starts: dict[str, list[torch.Tensor]] = {}
    orders: dict[str, list[list[int]]] = {}
    decoder_class = train_decoder.Decoder
    for name, variant in VARIANTS.items():
        built, seen = [], []

        def build(built=built, **settings):
            built.append(decoder_class(**settings))
            return built[0]

        def collect(self, positions, seen=seen, original=FeatureLoader._gather):
            seen.append(list(positions)[: DECODER["batch_size"]])  # without the extra samples
            return original(self, positions)

        with monkeypatch.context() as patch:
            patch.setattr(train_decoder, "Decoder", build)
            patch.setattr(FeatureLoader, "_gather", collect)
            # Learning is off, so that the weights at the end are those at the start.
            run_decoder(features, root, variant, name=name, epochs=1, lr=1e-30)
        starts[name] = [parameter.detach().clone() for parameter in built[0].parameters()]
        orders[name] = seen
    for name in VARIANTS:
        assert orders[name] == orders["baseline"]
        assert all(
            torch.allclose(ours, theirs, rtol=0, atol=1e-20)
            for ours, theirs in zip(starts[name], starts["baseline"], strict=True)
        )


def test_every_images_confusion_matrix_adds_up_to_the_splits(
    features: Path, tmp_path: Path
) -> None:
    run_decoder(features, tmp_path, VARIANTS["baseline"], name="baseline", epochs=2)
    metrics = tmp_path / "metrics" / "baseline-0"
    by_image = json.loads((metrics / "images.json").read_text())
    assert list(by_image) == featurestore.open(features / "test").ids
    total = np.zeros((3, 3), int)
    for entries in by_image.values():
        for truth, predicted, pixels in np.array(entries).reshape(-1, 3):
            total[truth, predicted] += pixels
    assert total.tolist() == json.loads((metrics / "test.json").read_text())["confusion"]


@pytest.mark.medium
def test_passes_and_schedule_are_those_of_the_parameters(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []
    step = torch.optim.Adam.step
    for optimizer in (torch.optim.Adam, torch.optim.AdamW):  # of GANs, of decoders
        monkeypatch.setattr(
            optimizer,
            "step",
            lambda self, *args: (rates.append(self.param_groups[0]["lr"]), step(self, *args))[1],
        )
    run_decoder(
        features,
        tmp_path,
        VARIANTS["baseline"],
        name="poly",
        epochs=2,
        repeats=3,
        lr=1.0,
        lr_schedule="poly",
    )
    assert rates == pytest.approx(
        [(1 - number / 14) ** 0.9 for number in range(14)]
    )  # 30 samples an epoch in batches of 4
    rates.clear()
    run_gan(features, tmp_path, repeats=2, frozen_epochs=1)
    assert len(rates) == 2 * 5


@pytest.mark.medium
def test_added_features_may_be_kept_out_of_the_running_statistics(
    features: Path, tmp_path: Path
) -> None:
    def first_layer(name: str, **variant) -> tuple[torch.Tensor, torch.Tensor]:
        run_decoder(features, tmp_path, variant, name=name, epochs=1, lr=1e-30)
        norm = load_decoder(tmp_path / "decoders" / f"{name}-0").head[0].convs[0][1]
        return norm.running_mean, norm.running_var

    baseline = first_layer("baseline", augmenter="none")
    louder = {"augmenter": "noise", "additive": 5.0, "multiplicative": 0.0}
    with_real = first_layer("real", **louder, statistics="real")
    with_all = first_layer("all", **louder)
    for ours, plain in zip(with_real, baseline, strict=True):
        torch.testing.assert_close(ours, plain)
    assert (with_all[1] > 1.1 * baseline[1]).all()


def test_from_until_on_real_batches_take_the_place_of_added_ones(
    features: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = [
        {"augmenter": "isda"},
        {"augmenter": "featuregan", "generator": "frozen", "weight": 0.25},
        {"augmenter": "noise", "weight": 0.5},
    ]
    seen = []
    augment, decoder_loss = train_decoder.transform_features, train_decoder.decoder_loss

    def look(
        names: tuple[str, ...], parts: list[Labelled], rng: torch.Generator, folds: Folds
    ) -> list[Labelled]:
        assert folds == ((12, 1),)
        real, *added = parts
        seen.append(
            (
                [part.weight for part in added],
                [torch.equal(part.features, real.features) for part in added],
            )
        )
        return augment(names, parts, rng, folds)

    adjusted = []
    monkeypatch.setattr(train_decoder, "transform_features", look)
    monkeypatch.setattr(
        train_decoder,
        "decoder_loss",
        lambda *args, **weights: (adjusted.extend(args[2:]), decoder_loss(*args, **weights))[1],
    )
    run_decoder(
        features,
        with_gan(trained, tmp_path),
        {"augmenter": "combined", "of": of, "until": 0.5},
        name="half",
        epochs=2,
    )
    half = len(seen) // 2
    assert half > 0
    assert seen == [([0.25, 0.5], [False, False])] * half + [([0.25, 0.5], [True, True])] * half
    assert len(adjusted) == 2 * half  # ISDA adds nothing, and goes on
    assert None not in adjusted


@pytest.mark.medium
def test_a_jointly_trained_gan_rests_from_until_on(
    features: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_gan(trained, tmp_path)
    until = {**VARIANTS["featuregan-1x"], "until": 0.5}
    expected = run_decoder(features, root, until, name="half", epochs=2)
    run_decoder(features, root, VARIANTS["featuregan-1x"], name="whole", epochs=1)
    half, whole = (
        load_generator(root / "decoders" / f"{name}-0" / "gan").state_dict()
        for name in ("half", "whole")
    )
    assert all(torch.equal(half[name], whole[name]) for name in whole)
    curves = read_curves(root / "metrics" / "half-0")
    assert (
        len(curves["val/miou"]),
        len(curves["generator/adversarial"]),
        len(curves["monitor/frechet"]),
    ) == (2, 1, 1)
    again = with_gan(trained, tmp_path / "again")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4)  # while it rests
        run_decoder(features, again, until, name="half", epochs=2)
    assert run_decoder(features, again, until, name="half", epochs=2) == expected
    resumed, undisturbed = (
        (folder / "decoders" / "half-0" / "decoder.safetensors").read_bytes()
        for folder in (again, root)
    )
    assert resumed == undisturbed


@pytest.mark.medium
def test_scores_are_those_of_the_saved_decoder_on_the_whole_test_split(
    features: Path, tmp_path: Path
) -> None:
    scores = run_decoder(features, tmp_path, VARIANTS["baseline"], name="baseline", epochs=40)
    assert scores.miou > 0.6  # the classes are easy to tell apart
    decoder = load_decoder(tmp_path / "decoders" / "baseline-0")
    total = torch.zeros(3, 3, dtype=torch.long)
    for batch in FeatureLoader(featurestore.open(features / "test"), 3):
        total += confusion_matrix(
            decoder(batch.features.float(), (64, 64)).argmax(1), batch.masks, 3
        )
    assert score(total, SPEC.class_names) == scores
    result = json.loads((tmp_path / "metrics" / "baseline-0" / "test.json").read_text())
    assert result["miou"] == scores.miou
    assert result["confusion"] == scores.confusion
    curves = read_curves(tmp_path / "metrics" / "baseline-0")
    assert result["val"]["miou"] == curves["val/miou"].iloc[-1]
    assert np.sum(result["val"]["confusion"]) == 4 * 62 * 64  # void rows are left out
    assert result["best_on_val"]["epoch"] == int(curves["val/miou"].idxmax())


@pytest.mark.medium
def test_joint_training_moves_the_gan_and_frozen_does_not(
    features: Path, trained: Path, tmp_path: Path
) -> None:
    root = with_gan(trained, tmp_path)
    before = load_generator(root / "gan").state_dict()
    run_decoder(features, root, VARIANTS["featuregan-1x"], name="joint", epochs=1)
    after = load_generator(root / "decoders" / "joint-0" / "gan").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(
        torch.equal(tensor, load_generator(root / "gan").state_dict()[name])
        for name, tensor in before.items()
    )
    run_decoder(features, root, VARIANTS["frozen"], name="frozen", epochs=1)
    assert not (root / "decoders" / "frozen-0" / "gan").exists()
    curves = read_curves(root / "metrics" / "frozen-0")
    assert set(curves) == {
        "decoder/ce_real",
        "decoder/ce_added",
        "val/pixel_accuracy",
        "val/miou",
        *(f"val/iou/{name}" for name in SPEC.class_names),
    }


@pytest.mark.medium
def test_no_state_is_taken_over_after_the_code_or_the_gan_changed(
    features: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_gan(trained, tmp_path)
    variant = VARIANTS["featuregan-1x"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        run_decoder(features, root, variant, name="x")
    states = set((root / "scratch" / "train-decoder").iterdir())
    assert len(states) == 1
    loaded = []
    load = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self: loaded.append(load(self)) or loaded[-1])
    with monkeypatch.context() as patch:
        patch.setattr("stages.training.session.imports_digest", lambda _: "other code")
        run_decoder(features, root, variant, name="x", epochs=3)
    assert loaded == [None]
    run_gan(features, root, seed=1)
    run_decoder(features, root, variant, name="x")
    assert loaded[-1] is None


def test_noise_streams_of_purposes_and_epochs_never_meet() -> None:
    keys = [
        (seed, epoch, *purpose)
        for seed in (0, 1, 50)
        for epoch in range(60)
        for purpose in ((), (1,))
    ]
    draws = {random_generator(torch.device("cpu"), *key).initial_seed() for key in keys}
    assert len(draws) == len(keys)


def test_what_the_decoder_refuses(features: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no trained model here"):
        run_decoder(features, tmp_path, VARIANTS["featuregan-1x"], name="x")
    with pytest.raises(ConfigError, match="11 is more than the 10 samples that an epoch takes"):
        run_decoder(features, tmp_path, VARIANTS["baseline"], name="x", batch_size=11)
    root = with_gan(trained, tmp_path)
    other = tmp_path / "features"
    shutil.copytree(features, other)
    shutil.rmtree(other / "train")
    shutil.copytree(other / "val", other / "train")
    with pytest.raises(SpecMismatchError, match="trained on other features"):
        run_decoder(other, root, VARIANTS["featuregan-1x"], name="x")
    (root / "gan" / "optimizers.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match=r"optimizers.pt: cannot be read"):
        run_decoder(features, root, VARIANTS["featuregan-1x"], name="x")
    weights = root / "gan" / "generator.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"generator.safetensors: cannot be read"):
        run_decoder(features, root, VARIANTS["featuregan-1x"], name="x")


def test_no_pickle_is_ever_loaded() -> None:
    """torch.load without weights_only=True, and pickle itself, occur nowhere in the sources."""
    for file in (
        *ROOT.glob("stages/**/*.py"),
        *ROOT.glob("featurestore/*.py"),
        ROOT / "pipeline.py",
    ):
        text = file.read_text()
        assert "import pickle" not in text
        for start in (
            position for position in range(len(text)) if text.startswith("torch.load(", position)
        ):
            assert "weights_only=True" in text[start : start + 120], file


# -- options -------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize(
    "changes",
    [
        {
            "adversarial_loss": "non-saturating",
            "r1_gamma": 1.0,
            "discriminator_norm": "none",
            "lambda_info": 1.0,
        },
        {
            "adversarial_loss": "segmentation",
            "noise": "spatial",
            "ema_decay": 0.9,
            "lambda_info": 1.0,
        },
        {
            "z_dim": 0,
            "projection_channels": 5,
            "diffaugment": ["flip", "translation", "cutout", "channel_dropout"],
        },
        {
            "gradient_accumulation": 2,
            "norm": "instance",
            "image_encoder": True,
            "kld_reduction": "sum",
            "lambda_info": 1.0,
        },
        {"conditioning": "concat", "ema_decay": 0.9, "image_encoder": True},
    ],
)
def test_options_train_resume_and_go_on_jointly(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_gan(features, whole, frozen_epochs=2, **changes)
    assert changed_weights(whole / "gan")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        run_gan(features, killed, frozen_epochs=2, **changes)
    run_gan(features, killed, frozen_epochs=2, **changes)
    ours, undisturbed = files(killed / "gan"), files(whole / "gan")
    assert ours.keys() == undisturbed.keys()
    assert {name for name in ours if ours[name] != undisturbed[name]} <= {"optimizers.pt"}
    run_decoder(features, whole, VARIANTS["featuregan-1x"], name="joint", epochs=1)
    before = load_generator(whole / "gan").state_dict()
    after = load_generator(whole / "decoders" / "joint-0" / "gan").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    run_decoder(features, whole, VARIANTS["frozen"], name="frozen", epochs=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"z_dim": 0},
        {"image_encoder": True, "kld_reduction": "sum", "lambda_info": 1.0, "lambda_kld": 1.0},
    ],
    ids=["no noise", "sum of the divergence"],
)
def test_accumulated_gradients_are_those_of_the_whole_batch(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    """Without batch statistics, two halves of a batch give the gradients of the whole."""
    gradients: dict[int, list[torch.Tensor]] = {}
    iterate = SpectralConv2d._iterate
    for parts in (1, 2):
        taken = gradients[parts] = []

        def step(self: torch.optim.Adam, taken=taken) -> None:
            taken.extend(
                parameter.grad.clone()
                for group in self.param_groups
                for parameter in group["params"]
            )

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", step)
            patch.setattr(  # a training step's power iteration would move once a part
                SpectralConv2d,
                "_iterate",
                lambda self, times: iterate(self, times) if times > 1 else None,
            )
            patch.setattr(  # each part draws its own noise
                gan_trainer,
                "draw_noise",
                lambda rng, ratio, batch, z_dim, device: torch.zeros(ratio * batch, z_dim),
            )
            run_gan(
                features,
                tmp_path / str(parts),
                frozen_epochs=1,
                norm="instance",
                gradient_accumulation=parts,
                **changes,
            )
    assert len(gradients[1]) == len(gradients[2]) > 40  # generator and discriminator, two steps
    largest = max(float(gradient.abs().max()) for gradient in gradients[1])
    for whole, halves in zip(gradients[1], gradients[2], strict=True):
        torch.testing.assert_close(halves, whole, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.medium
def test_the_segmentation_loss_may_be_kept_from_the_generator(
    features: Path, trained: Path, tmp_path: Path
) -> None:
    root = with_gan(trained, tmp_path)
    generators = {}
    for name, changes in {
        "with": {},
        "without": {"segmentation_loss": False},
        "heavy": {"segmentation_loss": False, "weight": 50.0},
    }.items():
        run_decoder(features, root, {**VARIANTS["featuregan-1x"], **changes}, name=name, epochs=1)
        generators[name] = load_generator(root / "decoders" / f"{name}-0" / "gan").state_dict()
    same = [
        torch.equal(tensor, generators["heavy"][name])
        for name, tensor in generators["without"].items()
    ]
    assert all(same)  # however heavy the loss, it does not reach the generator
    assert not all(
        torch.equal(tensor, generators["with"][name])
        for name, tensor in generators["without"].items()
    )


def test_the_average_generator_is_an_exponential_moving_average(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights equal the closed form over the weights after each step."""
    seen: list[dict[str, torch.Tensor]] = []
    after_optimizer_step = GanTrainer.after_optimizer_step

    def watched(self: GanTrainer) -> None:
        after_optimizer_step(self)
        seen.append(
            {
                name: parameter.detach().clone()
                for name, parameter in self.networks.generator.named_parameters()
            }
        )

    monkeypatch.setattr(GanTrainer, "after_optimizer_step", watched)
    run_gan(features, tmp_path, ema_decay=0.75)
    average = dict(load_generator(tmp_path / "gan").named_parameters())
    raw = dict(load_gan(tmp_path / "gan")[0].generator.named_parameters())
    assert len(seen) == 6
    for name, tensor in average.items():
        # The first update copies; then d^5 w_1 + (1 - d) sum d^(6 - t) w_t.
        expected = 0.75**5 * seen[0][name] + sum(
            0.25 * 0.75 ** (6 - step) * seen[step - 1][name] for step in range(2, 7)
        )
        torch.testing.assert_close(tensor, expected)
        assert torch.equal(raw[name], seen[-1][name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"family": "flow", "lambda_info": 1.0},
            r"set lambda_info to 0 and discriminator_norm to spectral, or family to gan",
        ),
        ({"family": "flow", "discriminator_norm": "none"}, "discriminator_norm to spectral, or"),
        ({"z_dim": 0, "lambda_info": 1.0}, "set z_dim above 0, or lambda_info to 0"),
        ({"kld_reduction": "sum"}, "set image_encoder to true, or kld_reduction to mean"),
    ],
)
def test_losses_that_do_not_apply_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as refused:
        TrainGanConfig(**{**GAN, **changes})
    (problem,) = refused.value.errors()
    assert "\n" not in problem["msg"]


def test_weight_clipping_leaves_the_head_for_z_as_it_is(features: Path, tmp_path: Path) -> None:
    changes = {"adversarial_loss": "wasserstein-clip", "lambda_info": 1.0}
    run_gan(features, tmp_path, frozen_epochs=1, discriminator_norm="none", **changes)
    saved = load_file(tmp_path / "gan" / "discriminator.safetensors")
    largest = {name: float(tensor.abs().max()) for name, tensor in saved.items()}
    assert largest.pop("info.linear.weight") > 0.1
    largest.pop("info.linear.bias")
    assert max(largest.values()) <= 0.01


def test_options_that_do_not_fit_together_are_refused() -> None:
    for changes in (
        {"adversarial_loss": "segmentation", "r1_gamma": 1.0},
        {"image_encoder": True, "z_dim": 0},
    ):
        with pytest.raises(ValueError, match="r1_gamma and|image encoder gives"):
            TrainGanConfig(**{**GAN, **changes})
