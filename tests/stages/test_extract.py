"""extract caches what the backbone gives, survives kills, and names the image that is wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import featurestore
from featurestore import ShardCorruptError, StoreBusyError, StoreReadError
from stages import extract
from stages.backbones.backbone import Backbone
from stages.backbones.build import build_backbone
from stages.backbones.compute import converted
from stages.common.errors import ConfigError, DataError
from stages.common.runtime import make_accelerator
from stages.data.manifest import read_manifest
from stages.data.samples import Sample, read_samples
from tests.factories import digests, prepare, prepare_config, write_photos
from tests.factories import extract as run
from tests.factories import extract_config as config
from tests.imports import ROOT


@pytest.fixture
def prepared(photos: Path, tmp_path: Path) -> Path:
    """``tmp_path`` with a prepared data set of 6 + 3 + 3 images."""
    prepare(prepare_config(photos), tmp_path)
    return tmp_path


def test_stored_features_are_those_of_the_backbone(prepared: Path) -> None:
    stores = run(config(feature_dtype="float32"), prepared)
    assert {split: len(store) for split, store in stores.items()} == {
        "train": 6,
        "val": 3,
        "test": 3,
        "unlabelled": 0,
    }
    store = stores["train"]
    assert store.spec.feature_shape == (320, 8, 8)
    assert store.spec.class_names[1] == "paper"
    backbone = build_backbone(name="efficientnet_lite0", weights="default")
    assert store.spec.weights_digest == backbone.digest()
    for sample in store:
        (expected,) = backbone(torch.from_numpy(sample.image.copy()).permute(2, 0, 1)[None])[0]
        torch.testing.assert_close(
            torch.from_numpy(sample.features.copy()), expected, rtol=1e-3, atol=1e-3
        )


@pytest.mark.medium
def test_bytes_do_not_depend_on_workers_and_a_second_run_computes_nothing(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    run(config(), prepared, out="a")
    run(config(), prepared, out="b", workers=2)
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32) == (
        False,
        True,
    )  # a notebook's own settings are back
    assert digests(prepared / "a") == digests(prepared / "b")
    monkeypatch.setattr(featurestore, "create", lambda *_, **__: pytest.fail("extracted again"))
    run(config(), prepared, out="a")


def test_only_train_has_mirrored_views(prepared: Path) -> None:
    stores = run(config(views=["identity", "hflip"]), prepared)
    train = stores["train"]
    assert (len(train), len(stores["val"]), len(stores["test"])) == (12, 3, 3)
    assert train.views == ["identity"] * 6 + ["hflip"] * 6
    assert train.ids[:6] == train.ids[6:]
    np.testing.assert_array_equal(train.mask(6), train.mask(0)[:, ::-1])
    np.testing.assert_array_equal(train.image(6), train.image(0)[:, ::-1])
    assert not np.array_equal(
        train.features(6), train.features(0)[:, :, ::-1]
    )  # the network saw the mirrored image


@pytest.mark.medium
def test_compression_and_bf16_read_back_through_the_same_interface(prepared: Path) -> None:
    plain = run(config(), prepared, out="plain")["train"]
    packed = run(config(compression="lz4", store_images=False), prepared, out="packed")["train"]
    np.testing.assert_array_equal(plain.features(3), packed.features(3))
    half = run(config(compute="bf16"), prepared, out="half")["train"]
    difference = np.abs(half.features(3).astype(np.float32) - plain.features(3).astype(np.float32))
    assert 0 < difference.mean() < 0.05 * plain.stats.std.mean()


def test_a_non_square_size(prepared: Path) -> None:
    store = run(config(input_size=[64, 96], resize="pad"), prepared)["train"]
    assert store.spec.feature_shape == (320, 8, 12)
    assert store.mask(0).shape == (64, 96)
    assert (store.mask(0)[:, 64:] == 255).all()


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_changed_since_prepare_is_named(prepared: Path, workers: int) -> None:
    entry = read_manifest(prepared / "dataset")[0][2]
    Path(entry.image).write_bytes(Path(entry.image).read_bytes() + b" ")
    with pytest.raises(DataError, match="changed since the prepare stage") as caught:
        run(config(), prepared, workers=workers)
    assert str(caught.value).startswith(entry.image)


def spoil(monkeypatch: pytest.MonkeyPatch, prepared: Path, number: int, value: float) -> str:
    """Let the backbone return one wrong value for an image; return the image's path."""
    entries, classes = read_manifest(prepared / "dataset")
    samples = [Sample(entries[number], "identity")]
    ((_, image, _),) = read_samples(samples, classes=classes, seed=0, size=(64, 64), rule="stretch")
    wanted, forward = torch.from_numpy(image.copy()).permute(2, 0, 1), Backbone.forward

    def spoilt(self: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        features = forward(self, images)[0].clone()
        for row, each in enumerate(images):
            if torch.equal(each, wanted):
                features[row, 5, 1, 1] = value
        return [features]

    monkeypatch.setattr(Backbone, "forward", spoilt)
    return entries[number].image


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "not finite"), (1e6, "1e\\+06 does not fit float16")]
)
def test_a_feature_that_cannot_be_stored_names_its_image(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, value: float, words: str
) -> None:
    image = spoil(monkeypatch, prepared, 2, value)
    with pytest.raises(DataError, match=words) as caught:
        run(config(), prepared)
    assert str(caught.value).startswith(image)
    assert not (prepared / "features").exists()


@pytest.mark.medium
def test_after_a_bad_image_no_shard_holds_features_of_others_under_its_ids(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that were computed already must not be appended in place of the one that failed."""
    monkeypatch.setattr(
        "featurestore.writer.SHARD_BYTES", 2 * 60_000
    )  # two samples a shard, as many as a batch
    run(config(), prepared, out="undisturbed")
    with monkeypatch.context() as patch:
        spoil(patch, prepared, 1, float("nan"))
        with pytest.raises(DataError, match="not finite"):
            run(config(), prepared)
    run(config(), prepared)
    assert digests(prepared / "features") == digests(prepared / "undisturbed")


def test_weights_that_are_missing_are_named(prepared: Path) -> None:
    with pytest.raises(DataError, match="there is no such weights file"):
        run(config(backbone="resnet50", weights=str(prepared / "none.pth")), prepared)


def test_weights_that_cannot_be_downloaded_say_what_to_do(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(prepared / "empty"))
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda *_, **__: (_ for _ in ()).throw(OSError("no network")),
    )
    with pytest.raises(
        ConfigError, match="cannot be downloaded .*no network.*give the file as the weights"
    ):
        run(config(backbone="resnet50"), prepared)


def test_a_damaged_shard_is_found_and_extracted_again(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(), prepared)
    before = digests(prepared / "features")
    shard = prepared / "features" / "train" / "shard-00000.h5"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ShardCorruptError):
        featurestore.open(shard.parent).verify()
    run(config(), prepared)
    assert "extracting it again" in capsys.readouterr().out
    assert digests(prepared / "features") == before


def test_a_store_that_cannot_be_read_here_is_not_replaced(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config(), prepared)
    before = digests(prepared / "features")

    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("featurestore.reader.file_sha256", refuse)
    with pytest.raises(StoreReadError, match="Too many open files"):
        run(config(), prepared)
    assert digests(prepared / "features") == before


@pytest.mark.medium
def test_unfinished_work_of_other_parameters_is_named(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = next(entry for entry in read_manifest(prepared / "dataset")[0] if entry.split == "test")
    content = Path(entry.image).read_bytes()
    Path(entry.image).write_bytes(b"damaged")
    with pytest.raises(DataError):
        run(config(feature_dtype="float32"), prepared)
    Path(entry.image).write_bytes(content)
    run(config(), prepared)
    named = [
        line.partition(":")[0]
        for line in capsys.readouterr().out.splitlines()
        if "unfinished extraction with other parameters" in line
    ]
    assert [Path(name).parent.name for name in named] == [
        "train",
        "val",
        "test",
        "unlabelled",
    ]
    assert list(Path(named[0]).glob("shard-*.h5"))
    run(config(feature_dtype="float32"), prepared, out="other")
    assert "unfinished" not in capsys.readouterr().out


# -- kill -9 ---------------------------------------------------------------------------------------


@pytest.mark.medium
def test_nothing_is_published_before_all_splits_are_extracted(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC removes a stage's outputs before it starts, so splits published early would be lost."""
    run(config(), prepared, out="undisturbed")
    entry = next(entry for entry in read_manifest(prepared / "dataset")[0] if entry.split == "test")
    content = Path(entry.image).read_bytes()
    Path(entry.image).write_bytes(b"damaged")
    with pytest.raises(DataError):
        run(config(), prepared)
    assert not (prepared / "features").exists()
    Path(entry.image).write_bytes(content)
    forward, calls = Backbone.forward, []
    monkeypatch.setattr(
        Backbone, "forward", lambda self, images: calls.append(len(images)) or forward(self, images)
    )
    run(config(), prepared)
    # Noise and an image to describe the layers, then the test split: train and val were reused.
    # Two threads compute its two batches.
    assert (calls[:2], sorted(calls[2:])) == ([2, 1], [1, 2])
    assert digests(prepared / "features") == digests(prepared / "undisturbed")


@pytest.mark.slow
def test_a_second_extraction_into_the_same_scratch_folder_says_so_and_stops(prepared: Path) -> None:
    code = (
        "import time; from tests.stages.test_extract import *\n"
        "extract._forward = lambda *batch, **options: time.sleep(60)\n"
        f"run(config(), Path({str(prepared)!r}))"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        while first.poll() is None and not list((prepared / "scratch").glob("train/*.lock")):
            time.sleep(0.05)
        with pytest.raises(
            StoreBusyError,
            match=f"process {first.pid} on .* is writing this store; wait for it or stop it",
        ):
            run(config(), prepared)
    finally:
        first.kill()
        first.wait()
    assert len(run(config(), prepared)["train"]) == 6  # a killed process holds nothing


# Extracts in each process of a launcher, notes who begins which shard, and lets rank 1 die.
RANK = """
import os, signal, sys, time
from pathlib import Path
import featurestore.writer as writer
from stages import extract
from tests import factories
folder, out, dies = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "dies"
rank, batches = os.environ.get("RANK", "0"), []
writer.SHARD_BYTES = 3 * 60_000  # three samples, and two batches, a shard
shard_writer, forward = writer.ShardWriter, extract._forward
write_atomically = writer.write_atomically

def noted(path, *arguments):
    with (folder / "begun.txt").open("a") as notes:
        notes.write(f"{out} {rank} {path.parent.parent.name} {path.name[6:11]}\\n")
    return shard_writer(path, *arguments)

def dying(*arguments, **options):
    batches.append(1)
    if len(batches) == 4:  # in the middle of its second shard, with all of rank 0's finished
        of_train, others = (0, 1, 2, 4), ("val", "test")
        wanted = [f"train/*/shard-{n:05d}.h5.finished.json" for n in of_train]
        wanted += [f"{split}/*/*.finished.json" for split in others]
        wanted += ["train/*/shard-00003.h5.*.partial"]
        while not all(list((folder / "scratch").glob(pattern)) for pattern in wanted):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*arguments, **options)

def late(path, content):
    if rank == "1" and path.name.endswith(".finished.json"):
        time.sleep(1)  # rank 0 must not publish without the last shard of rank 1
    write_atomically(path, content)

writer.ShardWriter, writer.write_atomically = noted, late
if dies and rank == "1":
    extract._forward = dying
factories.extract(factories.extract_config(), folder, out=out)
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_shards_of_two_ranks_interleave_and_a_dead_rank_costs_only_its_unfinished_ones(
    tmp_path: Path,
) -> None:
    write_photos(tmp_path / "photos", {"train": 16, "val": 1, "test": 1})
    prepare(prepare_config(tmp_path / "photos"), tmp_path)
    (tmp_path / "rank.py").write_text(RANK)

    def extract_with(launcher: Sequence[str], out: str, how: str = "lives") -> int:
        command = [sys.executable, *launcher, str(tmp_path / "rank.py"), str(tmp_path), out, how]
        environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode

    def begun(out: str, split: str = "train") -> dict[str, str]:
        """Which rank began which shards since the last call."""
        lines = (tmp_path / "begun.txt").read_text().splitlines()
        words = [line.split() for line in lines]
        found = {shard: rank for where, rank, part, shard in words if (where, part) == (out, split)}
        (tmp_path / "begun.txt").write_text("")
        return dict(sorted(found.items()))

    assert extract_with([], "one") == 0
    whole = digests(tmp_path / "one")
    numbers = [f"{number:05d}" for number in range(6)]
    assert begun("one") == dict.fromkeys(numbers, "0")

    assert extract_with(TORCHRUN, "two", "dies") != 0
    assert begun("two") == dict(zip(numbers[:5], "01010", strict=True))  # it died in shard 3
    assert not (tmp_path / "two" / "train").exists()
    (scratch,) = (tmp_path / "scratch" / "train").glob("*/")
    receipts = sorted(scratch.glob("*.finished.json"))
    finished = [receipt.name.removesuffix(".finished.json") for receipt in receipts]
    assert finished == [f"shard-{number}.h5" for number in ("00000", "00001", "00002", "00004")]
    before = {name: (scratch / name).stat() for name in finished}

    assert extract_with(TORCHRUN, "two") == 0
    assert begun("two") == {"00003": "1", "00005": "1"}  # those that the dead rank had left
    assert digests(tmp_path / "two") == whole
    for name, stat in before.items():
        now = (tmp_path / "two" / "train" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)  # reused


@pytest.mark.slow
def test_killed_extractions_resume_to_byte_identical_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGKILLs behind one and two finished shards, these are reused; the bytes are equal."""
    write_photos(tmp_path / "photos", {"train": 12, "val": 1, "test": 1})
    prepare(prepare_config(tmp_path / "photos"), tmp_path)
    code = (
        "import featurestore.writer as w; from tests.stages.test_extract import *; import sys\n"
        "w.SHARD_BYTES = 3 * 60_000  # three samples a shard\n"
        f"run(config(), Path({str(tmp_path)!r}), out=sys.argv[1])"
    )

    def start(out: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", code, out], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )

    assert start("undisturbed").wait() == 0
    whole = digests(tmp_path / "undisturbed")
    assert sum(name.startswith("train/shard") for name in whole) >= 4
    adopted: dict[str, int] = {}
    for wanted in (1, 2):
        process = start("features")
        while process.poll() is None:
            finished = sorted((tmp_path / "scratch").glob("train/*/*.finished.json"))
            if len(finished) >= wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "features" / "train").exists()
        shards = sorted((tmp_path / "scratch").glob("train/*/shard-*.h5"))
        for shard in shards[:wanted]:
            assert (
                adopted.setdefault(shard.name, shard.stat().st_ino) == shard.stat().st_ino
            )  # not written again
    assert start("features").wait() == 0
    assert digests(tmp_path / "features") == whole
    for name, inode in adopted.items():
        assert (tmp_path / "features" / "train" / name).stat().st_ino == inode


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_are_converted_to_nchw(layout: torch.memory_format, dtype: torch.dtype) -> None:
    features = torch.randn(3, 70, 9, 8).contiguous(memory_format=layout)
    stored = converted(features, dtype)
    assert all(image.is_contiguous() for image in stored)
    assert torch.equal(torch.stack(list(stored)), features.to(dtype))


class Arrival:
    """Stands for the event of a copy from a GPU, which ends only after the next launch."""

    def __init__(self, launched: list[int], number: int, last: int) -> None:
        self.launched, self.needed = launched, min(number + 1, last)

    def synchronize(self) -> None:
        deadline = time.monotonic() + 20
        while self.needed not in self.launched:
            assert time.monotonic() < deadline, "nothing is launched while a batch is on its way"
            time.sleep(0.001)


def test_a_gpu_has_its_next_batch_while_one_is_on_its_way(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, expected = [], run(config(batch_size=2), prepared, out="expected")["train"]
    original = extract.compute

    def compute(images, backbone, accelerator, dtype):
        computed = original(images, backbone, make_accelerator("cpu", "no"), dtype)
        computed.arrived = Arrival(launched, len(launched), last=2)
        launched.append(len(launched))
        return computed

    monkeypatch.setattr(extract, "compute", compute)
    entries, classes = read_manifest(prepared / "dataset")
    samples = [Sample(entry, "identity") for entry in entries if entry.split == "train"]
    backbone = build_backbone(name="efficientnet_lite0", weights="default")
    with featurestore.create(prepared / "store", expected.spec) as writer:
        extract._fill(
            writer,
            samples,
            writer.resume(len(samples)),
            config=config(batch_size=2),
            classes=classes,
            backbone=backbone,
            accelerator=SimpleNamespace(device=torch.device("cuda")),
            workers=2,
        )
    assert launched == [0, 1, 2]
    store = featurestore.open(prepared / "store")
    for number in range(len(store)):
        np.testing.assert_array_equal(store.features(number), expected.features(number))
