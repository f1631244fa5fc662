"""Reuse of shards, locks, disk space, and the moments in which a finished store is renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import h5py
import pytest

import featurestore
from featurestore import (
    ShardCorruptError,
    StoreBusyError,
    StoreExistsError,
    StoreReadError,
    StoreWriteError,
)
from featurestore.disk_space import check_disk_space
from featurestore.files import atomic_file, renew_folder, write_atomically
from featurestore.writer import clear_after_publication
from tests.factories import SPEC, interrupted, sample, write
from tests.imports import ROOT


def finish(
    path: Path, scratch: Path, count: int = 7, fingerprint: str = "f", a_shard: int = 3
) -> list[range]:
    """Resume and end a store; the positions that had to be appended."""
    options = {
        "scratch": scratch,
        "fingerprint": fingerprint,
        "samples_per_shard": a_shard,
        "overwrite": True,
    }
    with featurestore.create(path, SPEC, **options) as writer:
        missing = writer.resume(count)
        for number in (number for span in missing for number in span):
            writer.append(**sample(number))
    return missing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- reuse -----------------------------------------------------------------------------------------


def test_shards_of_another_size_are_not_reused(tmp_path: Path) -> None:
    interrupted(tmp_path / "store", tmp_path / "scratch", 7)
    assert finish(tmp_path / "store", tmp_path / "scratch", count=9, a_shard=2) == [
        range(n, min(n + 2, 9)) for n in range(0, 9, 2)
    ]
    store = featurestore.open(tmp_path / "store")
    assert store.ids == [sample(number)["id"] for number in range(9)]
    store.verify()


def test_hidden_files_of_a_desktop_are_ignored(tmp_path: Path) -> None:
    interrupted(tmp_path / "store", tmp_path / "scratch", 7)
    (tmp_path / "scratch" / ".DS_Store").write_bytes(b"")
    assert finish(tmp_path / "store", tmp_path / "scratch") == [range(6, 7)]
    assert names(tmp_path / "store") == ["index.json", *(f"shard-0000{n}.h5" for n in range(3))]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_bytes(b"")
    with pytest.raises(StoreExistsError, match=r"holds 'thesis\.txt', which no writer left"):
        finish(tmp_path / "store", tmp_path / "other")


def test_the_next_writer_removes_the_partial_file_of_a_killed_one(tmp_path: Path) -> None:
    interrupted(tmp_path / "store", tmp_path / "scratch", 4)
    (tmp_path / "scratch" / "shard-00001.h5.0123abcd.partial").write_bytes(bytes(1000))
    featurestore.create(
        tmp_path / "store", SPEC, scratch=tmp_path / "scratch", fingerprint="f", samples_per_shard=3
    )
    assert names(tmp_path / "scratch") == ["shard-00000.h5", "shard-00000.h5.finished.json"]


# -- files --


def test_an_atomic_file_appears_only_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"ne")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.json"]


# -- locks -----------------------------------------------------------------------------------------


def test_writers_of_one_store_exclude_each_other_with_any_scratch_folders(
    tmp_path: Path,
) -> None:
    with featurestore.create(
        tmp_path / "store", SPEC, scratch=tmp_path / "a", fingerprint="a", overwrite=True
    ) as writer:
        writer.append(**sample(0))
        with pytest.raises(
            StoreBusyError, match=f"process {os.getpid()} on .* is writing this store"
        ):
            featurestore.create(
                tmp_path / "store", SPEC, scratch=tmp_path / "b", fingerprint="b", overwrite=True
            )
    assert names(tmp_path) == ["store"]


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        StoreWriteError,
        match=r"has no locks \(Function not implemented\); mount it with flock, or choose another",
    ):
        write(tmp_path / "new" / "store")


# -- publication -----------------------------------------------------------------------------------


@pytest.mark.parametrize("renames", [0, 1])
def test_an_error_during_publication_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """The renames are those of the old store and of the new one."""
    write(tmp_path / "store", 2, fingerprint="old")
    interrupted(tmp_path / "new", tmp_path / "scratch", 6)
    rename, done = os.rename, []

    def failing(source: object, target: object) -> None:
        if Path(str(target)).parent == tmp_path:
            if len(done) == renames:
                done.append(None)
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            done.append(None)
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(
        StoreWriteError,
        match=r"cannot be written \(Device or resource busy\); choose another folder",
    ):
        finish(tmp_path / "store", tmp_path / "scratch")
    assert len(featurestore.open(tmp_path / "store")) == 2  # the old store is unchanged
    assert finish(tmp_path / "store", tmp_path / "scratch") == []  # every shard is reused
    assert len(featurestore.open(tmp_path / "store")) == 7
    assert names(tmp_path) == ["store"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_during_publication_loses_nothing_and_leaves_no_file(
    tmp_path: Path, renames: int
) -> None:
    write(tmp_path / "store", 2, fingerprint="old")
    interrupted(tmp_path / "new", tmp_path / "scratch", 6)
    code = (
        "import signal, sys; from tests.featurestore.test_publication import *\n"
        "root, rename, done = Path(sys.argv[1]), os.rename, []\n"
        "def deadly(source, target):\n"
        "    rename(source, target)\n"
        "    done.extend([None] * (Path(target).parent == root))\n"
        f"    if len(done) == {renames}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.rename = deadly\n"
        "finish(root / 'store', root / 'scratch')\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, check=False
    )
    assert killed.returncode == -9
    if renames == 2:  # the store is published; its old version and its receipts remain
        assert len(featurestore.open(tmp_path / "store")) == 7
        assert list((tmp_path / "store").glob("*.finished.json"))
        clear_after_publication(tmp_path / "store", tmp_path / "scratch")
    else:
        assert finish(tmp_path / "store", tmp_path / "scratch") == []
    featurestore.open(tmp_path / "store").verify()
    assert names(tmp_path) == ["store"]
    assert names(tmp_path / "store") == ["index.json", *(f"shard-0000{n}.h5" for n in range(3))]


def rename_within_a_file_system(source: Path, target: Path) -> None:
    """Rename; fail as across file systems where the source is in a folder ``scratch``."""
    if Path(source).parent.name == "scratch":
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    RENAME(source, target)


RENAME = os.rename


def test_a_store_is_copied_across_file_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "store", 2, fingerprint="old")
    monkeypatch.setattr(os, "rename", rename_within_a_file_system)
    assert finish(tmp_path / "store", tmp_path / "scratch" / "f") == [
        range(3),
        range(3, 6),
        range(6, 7),
    ]
    store = featurestore.open(tmp_path / "store")
    store.verify()
    assert len(store) == 7
    assert names(tmp_path) == ["store"]


@pytest.mark.parametrize("kind", ["missing", "folder", "file", "link", "broken link"])
def test_a_renewed_folder_is_empty_and_what_a_link_points_to_is_kept(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("kept")
    target = tmp_path / "models" / "gan"
    target.parent.mkdir()
    {
        "missing": lambda: None,
        "folder": lambda: shutil.copytree(tmp_path / "elsewhere", target),
        "file": lambda: target.write_text("old"),
        "link": lambda: target.symlink_to(tmp_path / "elsewhere"),
        "broken link": lambda: target.symlink_to(tmp_path / "nowhere"),
    }[kind]()
    renew_folder(target)
    assert not target.is_symlink()
    assert list(target.iterdir()) == []
    assert (tmp_path / "elsewhere" / "weights").read_text() == "kept"


def test_a_kill_while_a_store_is_copied_keeps_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "store", 2, fingerprint="old")
    code = (
        "import signal, sys; from tests.featurestore.test_publication import *\n"
        "os.rename = rename_within_a_file_system\n"
        "shutil.copyfile = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "finish(Path(sys.argv[1]) / 'store', Path(sys.argv[1]) / 'scratch' / 'f')\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, check=False
    )
    assert killed.returncode == -9
    assert len(featurestore.open(tmp_path / "store")) == 2
    assert finish(tmp_path / "store", tmp_path / "scratch" / "f") == []  # every shard is reused
    assert len(featurestore.open(tmp_path / "store")) == 7
    assert names(tmp_path) == ["scratch", "store"]


# -- disk space ------------------------------------------------------------------------------------


def test_disk_space_is_checked_for_all_ranks_and_all_stores_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six samples fit: three of each of two ranks, or of each of two stores."""
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(6 * SPEC.sample_bytes))

    def resumed(name: str, samples: int, **ranks: int) -> featurestore.StoreWriter:
        writer = featurestore.create(
            tmp_path / name, SPEC, fingerprint=name, samples_per_shard=1, **ranks
        )
        writer.resume(samples)
        return writer

    check_disk_space([resumed("a", 3), resumed("b", 3)])
    resumed("c", 6, rank=0, ranks=2)
    with pytest.raises(
        StoreWriteError,
        match=r"are to be written, but .* GB are free; make room or choose another --scratch",
    ):
        resumed("d", 7, rank=0, ranks=2)
    with pytest.raises(StoreWriteError, match="are to be written"):
        check_disk_space([resumed("e", 4), resumed("f", 3)])


# -- reading ---------------------------------------------------------------------------------------


def test_a_store_of_more_shards_than_files_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with featurestore.create(tmp_path / "store", SPEC, samples_per_shard=1) as writer:
        for number in range(30):
            writer.append(**sample(number))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        others += [os.open(tmp_path, os.O_RDONLY) for _ in range(700)]  # such as a notebook's
        before = len(os.listdir("/dev/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 15, hard))
        store = featurestore.open(tmp_path / "store")
        store.verify()
        assert len(store.ids) == 30
        assert len(os.listdir("/dev/fd")) - before <= 30  # one descriptor for each shard
        del store
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 15, hard))
        monkeypatch.setattr(
            resource, "setrlimit", lambda *_: None
        )  # where the hard limit is as low
        with pytest.raises(
            StoreReadError,
            match=r"cannot be opened \(Too many open files\); raise the limit, with `ulimit -n`",
        ):
            featurestore.open(tmp_path / "store").verify()
    finally:
        monkeypatch.undo()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in others:
            os.close(descriptor)


def test_processes_that_divide_a_verification_detect_what_one_detects(tmp_path: Path) -> None:
    write(tmp_path / "store", 9)
    shard = tmp_path / "store" / "shard-00001.h5"
    with h5py.File(shard) as file:
        place = file["features"].id.get_offset()
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
    read: list[int] = []
    for rank in (0, 2):
        featurestore.open(tmp_path / "store").verify(progress=read.append, rank=rank, ranks=3)
    with pytest.raises(ShardCorruptError, match="damaged"):
        featurestore.open(tmp_path / "store").verify(progress=read.append, rank=1, ranks=3)
    assert sum(read) == sum(file.stat().st_size for file in (tmp_path / "store").glob("*.h5"))
