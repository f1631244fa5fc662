"""A store returns what was written, or an error that names the problem."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import pickle
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest

import featurestore
from featurestore import (
    FeatureStoreError,
    FormatVersionError,
    IncompleteStoreError,
    SampleError,
    ShardCorruptError,
    SpecMismatchError,
    StoreExistsError,
    StoreNotFoundError,
    StoreWriteError,
    SubsetStore,
)
from featurestore.index import ShardRecord
from featurestore.shard import ShardWriter
from featurestore.statistics import Statistics
from tests.factories import SPEC, interrupted, sample, shard_bytes, write


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("has_images", [True, False])
def test_round_trip(tmp_path: Path, compression: str, dtype: str, has_images: bool) -> None:
    spec = dataclasses.replace(
        SPEC, compression=compression, feature_dtype=dtype, has_images=has_images
    )
    store = write(tmp_path / "store", spec=spec)
    assert len(store) == 7
    assert store.spec == spec
    for number, actual in enumerate(store):
        expected = sample(number, spec)
        assert (actual.id, actual.view) == (expected["id"], expected["view"])
        assert actual.features.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(actual.features, expected["features"])
        np.testing.assert_array_equal(actual.mask, expected["mask"])
        if has_images:
            np.testing.assert_array_equal(actual.image, expected["image"])
        else:
            assert actual.image is None
    np.testing.assert_array_equal(store[-1].features, store[6].features)
    with pytest.raises(IndexError):
        store[7]
    store.verify()


def test_uncompressed_features_are_views_of_the_file(tmp_path: Path) -> None:
    features = write(tmp_path / "store").features(4)
    assert not features.flags.writeable
    assert not features.flags.owndata
    base = features
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


@pytest.mark.parametrize("compression", ["none", "zeros", "lz4", "int8"])
def test_samples_that_threads_prepared_give_the_bytes_of_one_thread(
    tmp_path: Path, compression: str
) -> None:
    spec = dataclasses.replace(SPEC, compression=compression)
    write(tmp_path / "alone", count=20, spec=spec)
    with (
        featurestore.create(tmp_path / "threads", spec, samples_per_shard=3) as writer,
        ThreadPoolExecutor(4) as pool,
    ):
        samples = (sample(number, spec) for number in range(20))
        for prepared in pool.map(lambda given: writer.prepare(**given), samples):
            writer.write(prepared)
    assert shard_bytes(tmp_path / "threads") == shard_bytes(tmp_path / "alone")


def test_an_error_while_a_full_shard_is_finished_is_raised_and_the_next_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shard reaches the disk, the second does not; later samples were accepted."""
    write(tmp_path / "whole", fingerprint="f", scratch=tmp_path / "other")
    commit = ShardWriter.commit

    def failing(shard: ShardWriter) -> tuple[ShardRecord, Statistics]:
        if shard.path.name == "shard-00001.h5":
            raise OSError(errno.ENOSPC, "no room")
        return commit(shard)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "commit", failing)
        with pytest.raises(StoreWriteError, match=r"shard-00001.h5.*No space left"):
            resumed(tmp_path / "store", tmp_path / "scratch")
    assert resumed(tmp_path / "store", tmp_path / "scratch") == [range(3, 6)]
    assert shard_bytes(tmp_path / "store") == shard_bytes(tmp_path / "whole")


def test_a_store_that_lost_a_shard_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when the caller goes on after the error."""

    def failing(*paths: Path) -> None:
        raise OSError(errno.EIO, "no disk")

    with pytest.raises(StoreWriteError, match="Input/output error"):  # noqa: SIM117
        with featurestore.create(tmp_path / "store", SPEC, samples_per_shard=1) as writer:
            with monkeypatch.context() as patch:
                patch.setattr("featurestore.shard.os.replace", failing)
                for number in range(9):
                    with suppress(StoreWriteError):
                        writer.append(**sample(number))
            for number in range(9, 12):
                with suppress(StoreWriteError):
                    writer.append(**sample(number))
    assert not (tmp_path / "store").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_any_hdf5_tool_can_read_a_shard(tmp_path: Path) -> None:
    write(tmp_path / "store")
    with h5py.File(tmp_path / "store" / "shard-00001.h5") as file:
        assert sorted(file) == ["features", "ids", "images", "masks", "views"]
        assert file["features"].shape == (3, 6, 4, 5)
        assert file["features"].chunks is None  # contiguous
        assert file["ids"].asstr()[0] == "photo 3 é"
        assert file.attrs["backbone"] == "resnet50"
        assert [name.decode() for name in file.attrs["class_names"]] == list(SPEC.class_names)
        assert file.attrs["palette"].tolist() == [list(colour) for colour in SPEC.palette]
        assert file.attrs["format_version"] == featurestore.FORMAT_VERSION


@pytest.mark.skipif(
    shutil.which("h5dump") is None, reason="h5dump and h5ls come with the package hdf5-tools"
)
@pytest.mark.parametrize("compression", ["none", "zeros", "int8"])
def test_the_hdf5_groups_own_tools_read_a_shard(tmp_path: Path, compression: str) -> None:
    store = write(tmp_path / "store", spec=dataclasses.replace(SPEC, compression=compression))
    shard = str(store.folder / "shard-00000.h5")
    listed = subprocess.run(["h5ls", shard], capture_output=True, text=True, check=True).stdout
    assert "masks                    Dataset {3, 32, 40}" in listed
    dumped = subprocess.run(
        ["h5dump", "-d", "masks", "-y", "-w", "0", shard],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    numbers = dumped.split("DATA {")[1].split("}")[0].replace(",", " ").split()
    np.testing.assert_array_equal(
        np.array(numbers, np.uint8).reshape(3, 32, 40),
        np.stack([sample(n)["mask"] for n in range(3)]),
    )


def test_a_single_shard_can_be_opened(tmp_path: Path) -> None:
    write(tmp_path / "store")
    shard = featurestore.open(tmp_path / "store" / "shard-00002.h5")
    assert shard.ids == ["photo 6 é"]
    assert shard.spec == SPEC
    np.testing.assert_array_equal(shard.features(0), sample(6)["features"])
    with pytest.raises(SpecMismatchError, match="verify the store's folder"):
        shard.verify()


def test_statistics_equal_numpys(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    samples = [sample(number) for number in range(7)]
    values = np.stack([part["features"] for part in samples]).astype(np.float64)
    np.testing.assert_allclose(store.stats.mean, values.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(store.stats.std, values.std(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(store.stats.minimum, values.min(axis=(0, 2, 3)))
    np.testing.assert_array_equal(store.stats.maximum, values.max(axis=(0, 2, 3)))
    masks = np.stack([part["mask"] for part in samples])
    assert store.stats.class_pixels.tolist() == [(masks == value).sum() for value in range(3)]
    assert store.stats.void_pixels == (masks == 255).sum() == 21
    of_one = featurestore.open(tmp_path / "store" / "shard-00000.h5").stats
    np.testing.assert_allclose(of_one.mean, values[:3].mean(axis=(0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("kind", ["rectified", "signed", "negative", "subnormal", "zero", "large"])
def test_statistics_of_large_layers_equal_numpys(kind: str) -> None:
    """From a number of values on they are computed in one compiled pass over the bits."""
    drawn = np.random.default_rng(0).standard_normal((500, 35, 32)).astype(np.float32)
    features = {
        "rectified": drawn.clip(0),
        "signed": drawn,
        "negative": -np.abs(drawn) - 0.01,
        "subnormal": 1e-7 * drawn,
        "zero": 0 * drawn,  # of both signs
        "large": 10_000 * drawn,
    }[kind].astype(np.float16)
    assert features.size >= featurestore.statistics.LARGE
    mask = np.zeros(SPEC.mask_shape, np.uint8)
    found = Statistics.of_sample(SPEC, [features], mask)
    values = features.reshape(500, -1).astype(np.float64)
    np.testing.assert_array_equal(found.mean, values.mean(1))
    np.testing.assert_allclose(found.variance, values.var(1), rtol=1e-12, atol=1e-18)
    np.testing.assert_array_equal(found.minimum, values.min(1))
    np.testing.assert_array_equal(found.maximum, values.max(1))


def test_a_frame_has_a_row_for_each_sample_with_fractions_of_classes(tmp_path: Path) -> None:
    frame = write(tmp_path / "store").to_frame()
    assert list(frame.columns) == ["id", "view", "shard", *SPEC.class_names, "void"]
    assert frame["shard"].tolist() == ["shard-00000.h5"] * 3 + ["shard-00001.h5"] * 3 + [
        "shard-00002.h5"
    ]
    np.testing.assert_allclose(frame[[*SPEC.class_names, "void"]].sum(axis=1), 1)
    assert frame["belt"][2] == (sample(2)["mask"] == 0).mean()


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": np.full(SPEC.feature_shape, np.nan, np.float32)}, "not finite"),
        ({"features": np.full(SPEC.feature_shape, 7e4, np.float32)}, "70000 does not fit float16"),
        ({"features": np.full(SPEC.feature_shape, -1, np.float32)}, "negative"),
        ({"features": np.zeros((6, 4, 4), np.float32)}, r"expected \(6, 4, 5\)"),
        ({"mask": np.full(SPEC.mask_shape, 3, np.uint8)}, "mask value 3 is no class"),
        ({"mask": np.zeros((32, 41), np.uint8)}, "mask is uint8"),
        ({"image": None}, "image is None"),
        ({"view": "rotated"}, "view 'rotated'"),
        ({"id": ""}, "id must have"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, change: dict, words: str
) -> None:
    good = sample(0)
    with (
        pytest.raises(SampleError, match=words) as caught,
        featurestore.create(tmp_path / "store", SPEC) as writer,
    ):
        writer.append(**{**good, **change})
    assert repr(change.get("id", good["id"])) in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_nothing_is_published_after_an_exception(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        featurestore.create(tmp_path / "store", SPEC, samples_per_shard=1) as writer,
    ):
        writer.append(**sample(0))
        raise RuntimeError
    assert not (tmp_path / "store").exists()
    with pytest.raises(StoreNotFoundError):
        featurestore.open(tmp_path / "store")


def test_an_empty_store_is_not_published(tmp_path: Path) -> None:
    with (
        pytest.raises(IncompleteStoreError, match="no sample"),
        featurestore.create(tmp_path / "store", SPEC),
    ):
        pass


def test_an_existing_store_is_kept_unless_asked(tmp_path: Path) -> None:
    write(tmp_path / "store")
    with pytest.raises(StoreExistsError):
        featurestore.create(tmp_path / "store", SPEC)
    assert len(write(tmp_path / "store", count=2, overwrite=True)) == 2


def resumed(path: Path, scratch: Path, fingerprint: str = "f") -> list[range]:
    with featurestore.create(
        path, SPEC, scratch=scratch, fingerprint=fingerprint, samples_per_shard=3
    ) as writer:
        missing = writer.resume(7)
        for span in missing:
            for number in span:
                writer.append(**sample(number))
    return missing


def test_a_resumed_store_reuses_finished_shards_and_equals_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    write(tmp_path / "whole", fingerprint="f", scratch=tmp_path / "other")
    interrupted(tmp_path / "store", tmp_path / "scratch", stop_after=5)
    assert resumed(tmp_path / "store", tmp_path / "scratch") == [range(3, 6), range(6, 7)]
    assert shard_bytes(tmp_path / "store") == shard_bytes(tmp_path / "whole")
    assert not (tmp_path / "scratch").exists()


def test_a_missing_shard_in_the_middle_is_written_again(tmp_path: Path) -> None:
    write(tmp_path / "whole", fingerprint="f", scratch=tmp_path / "other")
    interrupted(tmp_path / "store", tmp_path / "scratch", stop_after=6)
    (tmp_path / "scratch" / "shard-00000.h5").unlink()
    assert resumed(tmp_path / "store", tmp_path / "scratch") == [range(3), range(6, 7)]
    assert shard_bytes(tmp_path / "store") == shard_bytes(tmp_path / "whole")


def test_shards_of_other_inputs_or_with_changed_bytes_are_not_reused(tmp_path: Path) -> None:
    interrupted(tmp_path / "store", tmp_path / "scratch", stop_after=6, fingerprint="other inputs")
    assert resumed(tmp_path / "store", tmp_path / "scratch") == [range(3), range(3, 6), range(6, 7)]
    interrupted(tmp_path / "second", tmp_path / "scratch", stop_after=6)
    shard = tmp_path / "scratch" / "shard-00001.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert resumed(tmp_path / "second", tmp_path / "scratch") == [range(3, 6), range(6, 7)]


def test_foreign_files_in_the_scratch_folder_are_kept(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "thesis.docx").write_text("years of work")
    for fingerprint in ("", "f"):
        with pytest.raises(StoreExistsError, match="thesis.docx"):
            featurestore.create(
                tmp_path / "store", SPEC, scratch=tmp_path / "scratch", fingerprint=fingerprint
            )
    assert (tmp_path / "scratch" / "thesis.docx").exists()


def test_several_ranks_write_a_store_together(tmp_path: Path) -> None:
    write(tmp_path / "whole", fingerprint="f", scratch=tmp_path / "other")
    options = {"scratch": tmp_path / "scratch", "fingerprint": "f", "samples_per_shard": 3}
    for rank in (1, 0):
        with featurestore.create(tmp_path / "store", SPEC, rank=rank, ranks=2, **options) as writer:
            spans = writer.resume(7)
            assert spans == ([range(3, 6)] if rank else [range(3), range(6, 7)])
            for number in (number for span in spans for number in span):
                writer.append(**sample(number))
        assert (tmp_path / "store").exists() == (rank == 0)
    assert shard_bytes(tmp_path / "store") == shard_bytes(tmp_path / "whole")


def test_missing_announced_samples_are_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(IncompleteStoreError, match="5 of the 7 samples"),
        featurestore.create(
            tmp_path / "store", SPEC, fingerprint="f", samples_per_shard=3
        ) as writer,
    ):
        writer.resume(7)
        writer.append(**sample(0))
        writer.append(**sample(1))
    assert not (tmp_path / "store").exists()


# -- damage ----------------------------------------------------------------------------------------


def test_verify_detects_changed_bytes_of_every_file(tmp_path: Path) -> None:
    write(tmp_path / "store")
    rng = np.random.default_rng(0)
    for file in sorted((tmp_path / "store").iterdir()):
        content = file.read_bytes()
        for position in rng.integers(0, len(content), 40):
            changed = bytearray(content)
            changed[position] ^= int(rng.integers(1, 256))
            file.write_bytes(changed)
            with pytest.raises(FeatureStoreError):
                featurestore.open(tmp_path / "store").verify()
        file.write_bytes(content)
    featurestore.open(tmp_path / "store").verify()


def test_a_damaged_shard_is_named_with_both_hashes(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    shard = tmp_path / "store" / "shard-00001.h5"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 255
    shard.write_bytes(content)
    with pytest.raises(ShardCorruptError, match="shard-00001.h5: damaged") as caught:
        featurestore.open(tmp_path / "store").verify()
    assert caught.value.path == shard
    assert caught.value.expected == store.records[1].sha256


def test_missing_and_shortened_shards_are_refused_on_opening(tmp_path: Path) -> None:
    write(tmp_path / "store")
    shard = tmp_path / "store" / "shard-00000.h5"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(IncompleteStoreError, match="bytes long, but the index says"):
        featurestore.open(tmp_path / "store")
    shard.unlink()
    with pytest.raises(IncompleteStoreError, match="it is gone"):
        featurestore.open(tmp_path / "store")


def test_a_folder_without_an_index_is_no_store(tmp_path: Path) -> None:
    write(tmp_path / "store")
    (tmp_path / "store" / "index.json").unlink()
    with pytest.raises(IncompleteStoreError, match="no index.json"):
        featurestore.open(tmp_path / "store")


def test_only_a_store_of_generated_features_names_a_generator(
    tmp_path: Path,
) -> None:
    """The field changed neither stores of real features nor the fingerprints of their specs."""
    assert (
        featurestore.fingerprint(spec=SPEC.to_dict())
        == "128b9346860794d9160158e9453f5f18ac2ad6ec81f8c6c023604a72e4fb5095"
    )
    assert "generator" not in SPEC.to_attributes()
    write(tmp_path / "real")
    with h5py.File(tmp_path / "real" / "shard-00000.h5") as file:
        assert "generator" not in file.attrs
    assert featurestore.open(tmp_path / "real").spec == SPEC

    made = dataclasses.replace(SPEC, generator="gan " + "cd" * 32)
    with featurestore.create(tmp_path / "made", made) as writer:
        writer.append(**sample(0, made))
    for path in (tmp_path / "made", tmp_path / "made" / "shard-00000.h5"):
        assert featurestore.open(path).spec == made
        featurestore.open(path)[0]
    with h5py.File(tmp_path / "made" / "shard-00000.h5") as file:
        assert file.attrs["generator"] == made.generator


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "store")
    index = tmp_path / "store" / "index.json"
    body = json.loads(index.read_text())
    index.write_text(json.dumps({**body, "format_version": 99}))
    with pytest.raises(FormatVersionError, match="format version 99") as caught:
        featurestore.open(tmp_path / "store")
    assert (caught.value.expected, caught.value.actual) == ((1, 2), 99)
    shard = tmp_path / "store" / "shard-00000.h5"
    with h5py.File(shard, "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(FormatVersionError):
        featurestore.open(shard)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"format": "featurestore", "format_version": 1}',
        b"[" * 100_000,
    ],
)
def test_a_garbage_index_or_shard_is_a_feature_store_error(tmp_path: Path, garbage: bytes) -> None:
    write(tmp_path / "store")
    (tmp_path / "store" / "shard-00000.h5").write_bytes(garbage)
    with pytest.raises(FeatureStoreError):
        featurestore.open(tmp_path / "store" / "shard-00000.h5")
    (tmp_path / "store" / "index.json").write_bytes(garbage)
    with pytest.raises(FeatureStoreError):
        featurestore.open(tmp_path / "store")


# -- processes -------------------------------------------------------------------------------------


def _read_features(store: featurestore.FeatureStore, position: int, queue) -> None:
    queue.put(store.features(position).tolist())


@pytest.mark.parametrize("compression", ["none", "lz4"])
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_an_open_store_can_be_handed_to_other_processes(
    tmp_path: Path, start: str, compression: str
) -> None:
    store = write(tmp_path / "store", spec=dataclasses.replace(SPEC, compression=compression))
    store.features(5)  # opens a shard in this process first
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    process = context.Process(target=_read_features, args=(store, 5, queue))
    process.start()
    assert queue.get(timeout=60) == sample(5)["features"].tolist()
    process.join()
    assert len(pickle.loads(pickle.dumps(store))) == 7


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_a_subset_is_a_store_of_its_samples(tmp_path: Path, compression: str) -> None:
    spec = dataclasses.replace(SPEC, compression=compression)
    whole = write(tmp_path / "store", spec=spec)
    chosen = [5, 0, 3]
    with featurestore.create(tmp_path / "alone", spec) as writer:
        for number in chosen:
            writer.append(**sample(number, spec))
    alone, subset = featurestore.open(tmp_path / "alone"), SubsetStore(whole, chosen)
    assert (len(subset), subset.ids, subset.views) == (3, alone.ids, alone.views)
    assert subset.to_frame().drop(columns="shard").equals(alone.to_frame().drop(columns="shard"))
    for name in (*spec.feature_names, "masks", "images"):
        np.testing.assert_array_equal(subset.gather(name, [2, 1]), alone.gather(name, [2, 1]))
    np.testing.assert_array_equal(subset[-1].features, alone[2].features)
    for name, value in vars(alone.stats).items():
        np.testing.assert_allclose(getattr(subset.stats, name), value, rtol=1e-12)
    assert subset.fingerprint not in (
        "",
        whole.fingerprint,
        SubsetStore(whole, [0, 5, 3]).fingerprint,
    )
    assert pickle.loads(pickle.dumps(subset)).ids == alone.ids
    subset.verify()
    for positions in ([], [7], [-1]):
        with pytest.raises(IndexError):
            SubsetStore(whole, positions)
    with pytest.raises(IndexError):
        subset[3]
    with pytest.raises(IndexError):
        subset.gather("masks", [3])
