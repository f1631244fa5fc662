"""Stores of generated features read like real ones, say what they are, and are reproducible."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import featurestore
import featurestore.writer
import pipeline
from featurestore import FeatureStore, SpecMismatchError
from featurestore.files import file_sha256
from stages.augment.new_masks import Change
from stages.commands.generate import CHANGES
from stages.common.errors import ConfigError, DataError
from stages.gan.networks import build_networks
from stages.models.image_encoder import sample_z
from stages.training.models import load_gan, load_generator, save_weights
from stages.use import generate
from stages.use.generate import Sample, Sampler
from stages.use.mask_source import Masks, Pair
from tests.factories import SPEC
from tests.imports import ROOT

REAL = dataclasses.replace(SPEC, feature_shape=(12, 8, 8), mask_shape=(64, 64), has_images=True)
ARCHITECTURE = {
    "num_classes": 3,
    "feature_shape": [12, 8, 8],
    "output_stride": 8,
    "nonnegative": True,
    "family": "gan",
    "flow_components": 6,
    "flow_width": 8,
    "flow_steps": 3,
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
    "image_encoder": False,
    "nef": 2,
    "init_gain": 0.7,
}
THREE_A_SHARD = 3 * dataclasses.replace(REAL, has_images=False).sample_bytes


def write_gan(folder: Path, seed: int = 0, **changes) -> Path:
    """Write a folder as train-gan does, with random weights."""
    architecture = {**ARCHITECTURE, **changes}
    torch.manual_seed(seed)
    networks = build_networks(architecture, torch.rand(12) + 0.5)
    if architecture["family"] == "flow":
        torch.nn.init.normal_(networks.generator.last.weight, std=0.1)
    folder.mkdir(parents=True)
    for name, network in networks.by_name().items():
        save_weights(network.state_dict(), folder / f"{name}.safetensors")
    described = {
        "architecture": architecture,
        "training": {},
        "store": "",
        "features": REAL.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def write_masks(folder: Path, count: int = 4, first: int = 0) -> Path:
    """Mask files of several sizes, with void."""
    folder.mkdir(exist_ok=True)
    for number in range(first, first + count):
        labels = np.random.default_rng(number).integers(0, 3, (5, 4 + number)).astype(np.uint8)
        mask = labels.repeat(16, 0).repeat(20, 1)
        mask[:7] = 255
        Image.fromarray(mask).save(folder / f"m{number}.png")
    return folder


def run(gan: Path, masks: Path, out: Path, **changes) -> FeatureStore:
    settings = {
        "per_mask": 1,
        "seed": 0,
        "scratch": out.parent / "scratch",
        "device": "cpu",
        "workers": 0,
    }
    return generate.run(gan, masks, out=out, **{**settings, **changes})


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


@pytest.fixture
def gan(tmp_path: Path) -> Path:
    return write_gan(tmp_path / "gan")


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    return write_masks(tmp_path / "masks")


def test_the_store_reads_like_any_other_and_says_what_generated_it(
    gan: Path, masks: Path, tmp_path: Path
) -> None:
    store = run(gan, masks, tmp_path / "out", per_mask=2)
    store.verify()
    assert store.ids == [f"m{number}-{draw}" for number in range(4) for draw in range(2)]
    assert store.views == ["identity"] * 8
    assert store.spec == dataclasses.replace(
        REAL, has_images=False, generator=f"gan {file_sha256(gan / 'generator.safetensors')}"
    )
    original = Image.open(masks / "m1.png")
    np.testing.assert_array_equal(
        store.mask(2), np.asarray(original.resize((64, 64), Image.Resampling.NEAREST))
    )
    np.testing.assert_array_equal(store.mask(2), store.mask(3))
    assert (store.features(2) != store.features(3)).any()
    assert (store.features(2) >= 0).all()
    frame = store.to_frame()
    assert frame["void"].between(0.05, 0.2).all()
    assert featurestore.open(tmp_path / "out" / "shard-00000.h5").spec == store.spec
    assert not list((tmp_path / "scratch").rglob("*.*"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"noise": "spatial"}, {"z_dim": 0}, {"conditioning": "concat"}, {"family": "flow"}],
    ids=str,
)
def test_features_are_those_of_the_generator(masks: Path, tmp_path: Path, changes: dict) -> None:
    gan = write_gan(tmp_path / "gan", **changes)
    store = run(gan, masks, tmp_path / "out", seed=7)
    assert store.spec.generator.startswith(changes.get("family", "gan"))
    generator = load_generator(gan)
    z = torch.cat(
        [
            generate.noise(generator.z_dim, seed=7, id=f"m{number}", view="identity", number=0)
            for number in range(4)
        ]
    )
    batch = torch.from_numpy(store.gather("masks", range(4)))
    expected = generator.generate(batch, z=z)
    assert expected.std() > 0.02
    torch.testing.assert_close(
        torch.from_numpy(store.gather("features", range(4))).float(), expected, rtol=2e-3, atol=2e-3
    )


def test_bytes_depend_only_on_mask_seed_and_number(
    gan: Path, masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not depend on threads, other samples or shards."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(gan, masks, tmp_path / "one", per_mask=3)
        torch.set_num_threads(3)
        three = run(gan, masks, tmp_path / "three", per_mask=3, workers=3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert digests(one.path) == digests(three.path)

    monkeypatch.setattr(featurestore.writer, "SHARD_BYTES", THREE_A_SHARD)
    few = run(gan, write_masks(tmp_path / "few", count=3, first=1), tmp_path / "fewer", per_mask=2)
    assert len(few.records) == 2
    for position, id in enumerate(few.ids):
        assert few.features(position).tobytes() == one.features(one.ids.index(id)).tobytes()

    other = run(gan, masks, tmp_path / "other", per_mask=3, seed=1)
    assert all((other.features(position) != one.features(position)).any() for position in range(12))
    assert other.fingerprint != one.fingerprint


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import get_args
import featurestore.writer
from tests.stages.test_generate import THREE_A_SHARD, run
featurestore.writer.SHARD_BYTES = THREE_A_SHARD
append, count = featurestore.writer.StoreWriter.append, 0
def fatal(self, **sample):
    global count
    count += 1
    if count == 8:
        self._await_finished()  # two full shards
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, **sample)
featurestore.writer.StoreWriter.append = fatal
run(Path("gan"), Path("masks"), Path("out"), per_mask=3)
"""


@pytest.mark.medium
def test_a_killed_run_resumes_to_equal_bytes(
    gan: Path, masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(featurestore.writer, "SHARD_BYTES", THREE_A_SHARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    killed = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not Path("out").exists()
    assert len(list(Path("scratch").rglob("*.finished.json"))) == 2

    made = []
    original = Sampler._generate

    def counting(self: Sampler, samples: list[Sample]) -> list[tuple[Sample, np.ndarray]]:
        made.extend(sample.id for sample in samples)
        return original(self, samples)

    monkeypatch.setattr(Sampler, "_generate", counting)
    resumed = run(Path("gan"), Path("masks"), Path("out"), per_mask=3)
    assert sorted(made) == [f"m{number}-{draw}" for number in (2, 3) for draw in range(3)]
    whole = run(gan, masks, tmp_path / "whole", per_mask=3)
    assert digests(resumed.path) == digests(whole.path)


@pytest.mark.parametrize("encodes", [False, True])
def test_batches_of_a_gpu_hold_the_same_samples_and_cross_no_shard(
    masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encodes: bool
) -> None:
    gan = write_gan(tmp_path / "gan", image_encoder=encodes)
    given = write_store(tmp_path / "real").path if encodes else masks
    one_by_one = run(gan, given, tmp_path / "one", per_mask=3)
    sizes, original = [], Sampler._generate

    def counting(self: Sampler, samples: list[Sample]) -> list[tuple[Sample, np.ndarray]]:
        sizes.append(len(samples))
        return original(self, samples)

    monkeypatch.setattr(Sampler, "_generate", counting)
    monkeypatch.setitem(generate.BATCH, "cpu", 2)
    monkeypatch.setattr(featurestore.writer, "SHARD_BYTES", THREE_A_SHARD)
    batched = run(gan, given, tmp_path / "batched", per_mask=3)
    assert sizes == [2, 1] * (len(batched) // 3)
    assert batched.ids == one_by_one.ids
    for number in range(len(batched)):
        np.testing.assert_allclose(
            batched.features(number), one_by_one.features(number), rtol=1e-3, atol=1e-4
        )


def write_store(path: Path, **changes) -> FeatureStore:
    """A store of real features with images and a mirrored view."""
    spec = dataclasses.replace(REAL, **changes)
    rng = np.random.default_rng(0)
    with featurestore.create(path, spec) as writer:
        for view in ("identity", "hflip"):
            for number in range(2):
                height, width = spec.mask_shape
                writer.append(
                    id=f"photo/{number}",
                    features=rng.random(spec.feature_shape).astype(np.float16),
                    mask=rng.integers(0, spec.num_classes, (height // 8, width // 8))
                    .astype(np.uint8)
                    .repeat(8, 0)
                    .repeat(8, 1),
                    image=rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
                    if spec.has_images
                    else None,
                    view=view,
                )
    return featurestore.open(path)


def test_masks_of_a_store_keep_their_views_and_take_the_generators_size(
    gan: Path, tmp_path: Path
) -> None:
    real = write_store(tmp_path / "real")
    store = run(gan, tmp_path / "real", tmp_path / "out")
    assert (store.ids, store.views) == (
        ["photo/0-0", "photo/1-0"] * 2,
        ["identity"] * 2 + ["hflip"] * 2,
    )
    np.testing.assert_array_equal(store.gather("masks", range(4)), real.gather("masks", range(4)))
    assert not store.spec.has_images
    write_store(tmp_path / "wide", mask_shape=(128, 192), feature_shape=(12, 16, 24))
    assert run(gan, tmp_path / "wide" / "shard-00000.h5", tmp_path / "shard").mask(0).shape == (
        64,
        64,
    )


def test_an_image_encoder_takes_z_from_images_where_there_are_some(
    masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    gan = write_gan(tmp_path / "gan", image_encoder=True)
    real = write_store(tmp_path / "real")
    store = run(gan, tmp_path / "real", tmp_path / "out")
    assert "N(0, I)" not in capsys.readouterr().out
    networks, _ = load_gan(gan)
    image, mask = torch.from_numpy(real.image(3).copy()), torch.from_numpy(real.mask(3).copy())
    with torch.no_grad():
        mu, logvar = networks.image_encoder.eval()(image.permute(2, 0, 1)[None])
    noise = generate.noise(6, seed=0, id="photo/1", view="hflip", number=0)
    expected = load_generator(gan).generate(mask[None], z=sample_z(mu, logvar, noise))[0]
    torch.testing.assert_close(
        torch.from_numpy(store.features(3).copy()).float(), expected, rtol=2e-3, atol=2e-3
    )

    without = run(gan, masks, tmp_path / "without")
    assert (
        "has no images for the image encoder, so z is drawn from N(0, I)" in capsys.readouterr().out
    )
    expected = load_generator(gan).generate(
        torch.from_numpy(without.mask(1).copy())[None],
        z=generate.noise(6, seed=0, id="m1", view="identity", number=0),
    )[0]
    torch.testing.assert_close(
        torch.from_numpy(without.features(1).copy()).float(), expected, rtol=2e-3, atol=2e-3
    )


def test_new_masks_are_stored_with_the_features_made_for_them(
    gan: Path, masks: Path, tmp_path: Path
) -> None:
    plain = run(gan, masks, tmp_path / "plain", per_mask=3)
    new = run(gan, masks, tmp_path / "new", per_mask=3, new_masks=("shift", "scale", "paste"))
    again = run(
        gan, masks, tmp_path / "again", per_mask=3, new_masks=("shift", "scale", "paste"), workers=2
    )
    assert digests(new.path) == digests(again.path)
    assert sum((new.mask(position) != plain.mask(position)).any() for position in range(12)) >= 11
    assert (new.mask(0) != new.mask(1)).any()
    z = generate.noise(6, seed=0, id="m0", view="identity", number=1)
    expected = load_generator(gan).generate(torch.from_numpy(new.mask(1).copy())[None], z=z)[0]
    torch.testing.assert_close(
        torch.from_numpy(new.features(1).copy()).float(), expected, rtol=2e-3, atol=2e-3
    )


def test_wrong_masks_are_refused_before_the_first_sample(
    gan: Path, masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "_generate", lambda *_: pytest.fail("generated"))
    out = tmp_path / "out"
    write_store(tmp_path / "others", class_names=("belt", "paper", "纸"))
    with pytest.raises(
        SpecMismatchError,
        match=r"others: mask value 1 is 'paper' here, but 'Größe' to the generator",
    ):
        run(gan, tmp_path / "others", out)
    write_store(
        tmp_path / "more",
        class_names=(*REAL.class_names, "tin"),
        palette=(*REAL.palette, (1, 2, 3)),
    )
    with pytest.raises(
        SpecMismatchError, match=r"more: mask value 3 is 'tin' here, but None to the generator"
    ):
        run(gan, tmp_path / "more", out)
    with pytest.raises(DataError, match=r"nowhere: there is no such folder"):
        run(gan, tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds neither masks .* nor a feature store"):
        run(gan, tmp_path / "empty", out)
    Image.fromarray(np.full((8, 8), 3, np.uint8)).save(masks / "m9.png")
    with pytest.raises(
        DataError, match=r"m9.png: mask value 3 is no class \(0 to 2\) and not void \(255\)"
    ):
        run(gan, masks, out)
    (masks / "m9.png").unlink()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(masks / "m0.bmp")
    with pytest.raises(DataError, match=r"m0.png: has the same id \(m0\) as m0.bmp"):
        run(gan, masks, out)
    (masks / "m0.bmp").unlink()
    with pytest.raises(DataError, match=r"there is no trained model here"):
        run(tmp_path / "no gan", masks, out)
    config = json.loads((gan / "config.json").read_text())
    (gan / "config.json").write_text(json.dumps({**config, "architecture": {"head": "deeplab"}}))
    with pytest.raises(
        DataError, match=r"gan: holds no generator; name a folder that train-gan wrote"
    ):
        run(gan, masks, out)
    with pytest.raises(ConfigError, match=r"--per-mask: this generator takes no noise"):
        run(write_gan(tmp_path / "silent", z_dim=0), masks, out, per_mask=2)
    assert not out.exists()


def test_a_mask_that_changes_during_the_run_is_refused(
    gan: Path, masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Masks.read

    def read(self: Masks, position: int) -> Pair:
        pair = original(self, position)
        if position == 3:  # all masks were checked
            Image.fromarray(np.zeros((9, 9), np.uint8)).save(masks / "m0.png")
        return pair

    monkeypatch.setattr(Masks, "read", read)
    with pytest.raises(DataError, match=r"mask 'm0' changed while features were generated"):
        run(gan, masks, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def call(*arguments: object) -> Result:
    return CliRunner().invoke(pipeline.main, [str(argument) for argument in arguments])


def test_the_command_and_inspect(
    gan: Path, masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("generate", gan, masks, "--out", "made", "--per-mask", 2, "--seed", 3)
    done = call(*command)
    assert done.exit_code == 0, done.output
    assert "made: 8 samples of 12 x 8 x 8" in done.output
    sha256 = file_sha256(gan / "generator.safetensors")
    assert f"generator   gan {sha256}" in call("inspect", "made").output
    assert "every byte as written" in call("verify", "made").output
    write_store(tmp_path / "real")
    assert "generator" not in call("inspect", "real").output

    refused = call(*command)
    assert refused.exit_code == 2
    assert "made is there already; add --force to replace it" in refused.stderr
    before = digests(Path("made"))
    assert call(*command, "--force", "--new-masks", "flip, shift").exit_code == 0
    assert digests(Path("made")) != before
    precious = call("generate", gan, masks, "--out", masks, "--force")
    assert precious.exit_code == 2
    assert "is no feature store, and --force replaces nothing else" in precious.stderr
    assert len(list(masks.iterdir())) == 4
    wrong = call("generate", gan, masks, "--out", "other", "--new-masks", "flop")
    assert wrong.exit_code == 2
    assert "'flop' is none of flip, shift, scale, paste, swap" in wrong.stderr
    assert get_args(Change) == CHANGES
