"""Faults of disks, files, processes and inputs: each is detected and named, and loses little.

``FEATUREGAN_FAULTS=50 python -m pytest tests/featurestore/test_faults.py`` multiplies the number
of random cases.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import featurestore
from featurestore import (
    FeatureStoreError,
    IncompleteStoreError,
    StoreBusyError,
    StoreNotFoundError,
    StoreWriteError,
)
from featurestore.layouts import LAYOUTS
from featurestore.schema import FEATURE_DTYPES
from tests.factories import SPEC, sample, shard_bytes, write
from tests.imports import ROOT

TIMES = int(os.environ.get("FEATUREGAN_FAULTS", "1"))
LOSSLESS = tuple(name for name in LAYOUTS if name != "int8")


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.medium
@settings(
    max_examples=40 * TIMES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    mask=st.tuples(*[st.integers(1, 20)] * 2),
    dtype=st.sampled_from(FEATURE_DTYPES),
    compression=st.sampled_from(LOSSLESS),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    count=st.integers(1, 9),
    a_shard=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_lossless_store_returns_every_bit(
    tmp_path_factory: pytest.TempPathFactory,
    shape,
    mask,
    dtype,
    compression,
    flags,
    count,
    a_shard,
    seed,
) -> None:
    images, nonnegative, announced = flags
    spec = dataclasses.replace(
        SPEC,
        feature_shape=shape,
        mask_shape=mask,
        feature_dtype=dtype,
        compression=compression,
        has_images=images,
        nonnegative=nonnegative,
    )
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        features = rng.normal(size=shape) * (rng.random(shape) > rng.random())
        samples.append(
            {
                "id": f"{number}-{chr(rng.integers(0x20, 0xD7FF))}",
                "features": (np.abs(features) if nonnegative else features).astype(dtype),
                "mask": rng.choice(np.array([0, 1, 2, 255], np.uint8), mask),
                "image": rng.integers(0, 256, (*mask, 3)).astype(np.uint8) if images else None,
            }
        )
    folder = tmp_path_factory.mktemp("store")
    with featurestore.create(folder / "a", spec, samples_per_shard=a_shard) as writer:
        if announced:
            assert len(writer.resume(count)) == -(-count // a_shard)
        for one in samples:
            writer.append(**one)
    store = featurestore.open(folder / "a")
    store.verify()
    assert store.spec == spec
    assert len(store) == count
    order = rng.permutation(count).tolist()
    gathered = store.gather("features", order)
    for row, position in enumerate(order):
        expected, actual = samples[position], store[position]
        assert actual.id == expected["id"]
        assert actual.features.tobytes() == expected["features"].tobytes()
        assert gathered[row].tobytes() == expected["features"].tobytes()
        np.testing.assert_array_equal(actual.mask, expected["mask"])
        if images:
            np.testing.assert_array_equal(actual.image, expected["image"])
    shutil.rmtree(folder)


def test_a_short_last_shard_has_equal_bytes_whether_announced_or_not(tmp_path: Path) -> None:
    for compression in LAYOUTS:
        spec = dataclasses.replace(SPEC, compression=compression)
        write(tmp_path / compression, spec=spec)
        with featurestore.create(
            tmp_path / f"{compression}-announced", spec, samples_per_shard=3
        ) as writer:
            writer.resume(7)
            for number in range(7):
                writer.append(**sample(number, spec))
        assert shard_bytes(tmp_path / compression) == shard_bytes(
            tmp_path / f"{compression}-announced"
        )


def test_int8_features_are_within_their_error_bound(tmp_path: Path) -> None:
    store = write(tmp_path / "store", spec=dataclasses.replace(SPEC, compression="int8"))
    for number in range(7):
        expected = sample(number)["features"].astype(np.float32)
        actual = store.features(number)
        assert actual.dtype == np.float16
        step = expected.max(axis=(1, 2), keepdims=True) / 255
        error = np.abs(actual.astype(np.float32) - expected)
        assert (error <= 0.51 * step + 1e-3 * expected).all()
        np.testing.assert_array_equal(store.mask(number), sample(number)["mask"])
    with h5py.File(store.folder / "shard-00000.h5") as file:
        assert file["features"].dtype == np.uint8


@pytest.mark.medium
def test_ten_thousand_ids_in_many_scripts(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, feature_shape=(1, 1, 1), mask_shape=(1, 1), has_images=False)
    alphabets = "аяα語한éﷺ🌍z "
    names = [f"{alphabets[n % 10] * (n % 7 + 1)}/{n}" for n in range(10_000)]
    with featurestore.create(tmp_path / "store", spec, samples_per_shard=3000) as writer:
        for number, name in enumerate(names):
            writer.append(
                id=name,
                features=np.full((1, 1, 1), number % 500, np.float16),
                mask=np.zeros((1, 1), np.uint8),
            )
    store = featurestore.open(tmp_path / "store")
    assert store.ids == names
    assert [store[n].id for n in (0, 2999, 3000, 9999)] == [names[n] for n in (0, 2999, 3000, 9999)]
    assert store.to_frame()["id"].tolist()[-1] == names[-1]


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "zeros", "zstd"])
def test_verify_detects_any_changed_byte(tmp_path: Path, compression: str) -> None:
    store = write(tmp_path / "store", 5, spec=dataclasses.replace(SPEC, compression=compression))
    files = sorted(store.path.iterdir())
    rng = np.random.default_rng(1)
    for _ in range(150 * TIMES):
        file = files[rng.integers(len(files))]
        content = bytearray(file.read_bytes())
        place = int(rng.integers(len(content)))
        before = content[place]
        content[place] = (before + int(rng.integers(1, 256))) % 256
        file.write_bytes(content)
        with pytest.raises(FeatureStoreError):
            featurestore.open(store.path).verify()
        content[place] = before
        file.write_bytes(content)
    featurestore.open(store.path).verify()


def test_a_file_cut_anywhere_is_refused_on_opening(tmp_path: Path) -> None:
    store = write(tmp_path / "store", 5)
    rng = np.random.default_rng(2)
    for file in sorted(store.path.iterdir()):
        content = file.read_bytes()
        for length in [0, len(content) - 1, *rng.integers(len(content), size=20 * TIMES).tolist()]:
            file.write_bytes(content[:length])
            with pytest.raises(IncompleteStoreError) as caught:
                featurestore.open(store.path)
            assert str(caught.value).startswith(str(file))
        file.write_bytes(content)
    featurestore.open(store.path).verify()


JSON = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(
    max_examples=60 * TIMES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_garbage_index_is_a_feature_store_error(tmp_path: Path, garbage: bytes) -> None:
    folder = tmp_path / "garbage"
    folder.mkdir(exist_ok=True)
    (folder / "index.json").write_bytes(garbage)
    with pytest.raises(FeatureStoreError):
        featurestore.open(folder)


def test_a_shard_removed_while_the_store_is_open_is_named(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    store.features(0)
    (tmp_path / "store" / "shard-00002.h5").unlink()
    with pytest.raises(StoreNotFoundError, match=r"shard-00002.h5"):
        store.features(6)
    with pytest.raises(FeatureStoreError, match=r"shard-00002.h5"):
        store.verify()


def test_a_store_replaced_while_open_is_not_mixed_with_the_new_one(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    first = store.features(0)
    kept = first.copy()
    with featurestore.create(
        tmp_path / "store", SPEC, samples_per_shard=3, overwrite=True
    ) as writer:
        for number in range(10, 17):
            writer.append(**sample(number))
    np.testing.assert_array_equal(first, kept)  # the memory map outlives the file's name
    with pytest.raises(IncompleteStoreError, match="open it again"):
        store.features(6)
    np.testing.assert_array_equal(
        featurestore.open(tmp_path / "store").features(6), sample(16)["features"]
    )


@pytest.mark.medium
def test_a_writer_of_one_store_does_not_disturb_readers_of_another(tmp_path: Path) -> None:
    store = write(tmp_path / "a")
    stop, wrong = threading.Event(), []

    def read() -> None:
        for position in itertools.cycle(range(7)):
            if stop.is_set():
                return
            fresh = featurestore.open(tmp_path / "a") if position == 3 else store
            if not np.array_equal(fresh.features(position), sample(position)["features"]):
                wrong.append(position)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        write(tmp_path / "b", 20, overwrite=True).verify()
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- disks that refuse -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("compression", ["none", "zeros", "lz4"])
def test_a_full_disk_is_one_clear_error_and_finished_shards_stay(
    small_disk: Path, tmp_path: Path, compression: str
) -> None:
    spec = dataclasses.replace(
        SPEC, feature_shape=(40, 16, 16), compression=compression
    )  # 20 KB a sample
    options = {"samples_per_shard": 4, "scratch": small_disk / "scratch", "fingerprint": "f"}
    with pytest.raises(StoreWriteError, match="No space left on device|space"):  # noqa: SIM117
        with featurestore.create(small_disk / "store", spec, **options) as writer:
            for number in range(1000):
                writer.append(**sample(number, spec))
    assert not (small_disk / "store").exists()
    finished = sorted((small_disk / "scratch").glob("shard-*.h5"))
    assert finished
    assert not list((small_disk / "scratch").glob("*.partial"))
    shutil.copytree(small_disk / "scratch", tmp_path / "scratch")  # a larger disk
    count = 4 * len(finished) + 2
    with featurestore.create(
        tmp_path / "store", spec, **{**options, "scratch": tmp_path / "scratch"}
    ) as writer:
        missing = writer.resume(count)
        assert missing == [range(count - 2, count)]
        for number in missing[0]:
            writer.append(**sample(number, spec))
    featurestore.open(tmp_path / "store").verify()


def test_a_full_disk_is_reported_before_the_work_starts(small_disk: Path) -> None:
    spec = dataclasses.replace(SPEC, feature_shape=(40, 16, 16))
    writer = featurestore.create(small_disk / "store", spec, fingerprint="f")
    with pytest.raises(StoreWriteError, match=r"0\.0 GB are free; make room"):
        writer.resume(1000)


def test_a_limit_on_file_sizes_is_a_clear_error(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from tests.factories import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    write(Path(sys.argv[1]) / 'store')\n"
        "except featurestore.StoreWriteError as error: print('refused', error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("refused ")
    assert "cannot be written" in result.stdout
    assert not (tmp_path / "store").exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def test_a_folder_that_cannot_be_written_is_named(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreWriteError, match=r"cannot be written \(Read-only file system\)"):
        write(small_disk / "store")


def test_a_store_moves_across_file_systems_and_replaces_a_link(
    small_disk: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        (tmp_path / "real").mkdir(exist_ok=True)
        if not (tmp_path / "store").exists():
            (tmp_path / "store").symlink_to(tmp_path / "real")
        options = {
            "scratch": small_disk / name,
            "fingerprint": name,
            "samples_per_shard": 3,
            "overwrite": True,
        }
        with featurestore.create(tmp_path / "store", SPEC, **options) as writer:
            for number in range(7):
                writer.append(**sample(number))
        featurestore.open(tmp_path / "store").verify()
        assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
            "index.json",
            *(f"shard-0000{n}.h5" for n in range(3)),
        ]
        assert list(small_disk.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "real", "store"]


def test_shards_of_other_inputs_are_not_published_with_a_store(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        featurestore.create(
            tmp_path / "store", SPEC, fingerprint="a", samples_per_shard=3
        ) as writer,
    ):
        for number in range(9):
            writer.append(**sample(number))
        raise KeyboardInterrupt
    write(tmp_path / "store", 3, fingerprint="b")
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        "index.json",
        "shard-00000.h5",
    ]


# -- several writers -------------------------------------------------------------------------------


def test_a_second_writer_is_told_who_is_writing(tmp_path: Path) -> None:
    options = {"scratch": tmp_path / "scratch", "fingerprint": "f", "samples_per_shard": 3}
    with featurestore.create(tmp_path / "store", SPEC, **options) as writer:
        writer.append(**sample(0))
        with pytest.raises(
            StoreBusyError, match=f"process {os.getpid()} on .* is writing this store; wait for it"
        ):
            featurestore.create(tmp_path / "store", SPEC, **options)
        writer.append(**sample(1))
    assert len(featurestore.open(tmp_path / "store")) == 2  # the first one was not disturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]  # and no lock file


def test_the_lock_of_a_killed_writer_is_released(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from tests.factories import *\n"
        "writer = featurestore.create(Path(sys.argv[1]) / 'store', SPEC, fingerprint='f')\n"
        "writer.append(**sample(0))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, check=False
    )
    assert killed.returncode == -9
    assert list(tmp_path.glob(".store.unfinished/*.partial"))
    store = write(tmp_path / "store", fingerprint="f")
    assert shard_bytes(tmp_path / "store").keys() == {
        "index.json",
        *(record.file for record in store.records),
    }
