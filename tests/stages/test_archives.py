"""Archives are unpacked whole or not at all, and nothing is written outside the folder."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from featurestore.errors import FeatureStoreError
from stages.common.errors import DataError
from stages.datasets.download import unpack

FILES = {"data/a.txt": b"first", "data/deep/b.bin": bytes(100_000), "empty.txt": b""}


def write_tar(path: Path, *members: tarfile.TarInfo, mode: str = "w") -> None:
    """A tar archive of FILES, and of other members after them."""
    with tarfile.open(path, mode) as tar:
        for name, content in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


WRITERS: dict[str, Callable[[Path], None]] = {
    "tar": write_tar,
    "tar.gz": lambda path: write_tar(path, mode="w:gz"),
    "tar.bz2": lambda path: write_tar(path, mode="w:bz2"),
    "tar.xz": lambda path: write_tar(path, mode="w:xz"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_unpacked_files_equal_the_packed_ones(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / "archive")
    unpack(tmp_path / "archive", tmp_path / "new" / "folder")
    assert contents(tmp_path / "new" / "folder") == FILES
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["folder"]


def test_links_that_stay_inside_are_unpacked(tmp_path: Path) -> None:
    links = (
        tar_member("data/deep/up", tarfile.SYMTYPE, "../a.txt"),
        tar_member("data/same", tarfile.LNKTYPE, "data/a.txt"),
    )
    write_tar(tmp_path / "archive", *links)
    unpack(tmp_path / "archive", tmp_path / "folder")
    assert (
        (tmp_path / "folder" / "data" / "deep" / "up").read_bytes()
        == (tmp_path / "folder" / "data" / "same").read_bytes()
        == b"first"
    )


BAD_TARS = {
    "a path upwards": ([tar_member("../outside")], "would leave the folder"),
    "a path up from a folder": ([tar_member("data/../../outside")], "would leave the folder"),
    "an absolute path": ([tar_member("/outside")], "would leave the folder"),
    "a drive": ([tar_member("C:/outside")], "would leave the folder"),
    "backslashes": ([tar_member("..\\outside")], "would leave the folder"),
    "a symbolic link upwards": (
        [tar_member("data/link", tarfile.SYMTYPE, "../../outside")],
        "links out of the folder, to",
    ),
    "an absolute symbolic link": (
        [tar_member("data/link", tarfile.SYMTYPE, "/etc")],
        "links out of the folder, to /etc",
    ),
    "a hard link upwards": (
        [tar_member("link", tarfile.LNKTYPE, "../outside")],
        "links out of the folder",
    ),
    "a file below a link": (
        [tar_member("link", tarfile.SYMTYPE, "data"), tar_member("link/outside")],
        "'link/outside' is below a link",
    ),
    "a file below a link of another spelling": (
        [tar_member("./data/../link", tarfile.SYMTYPE, "data"), tar_member("link/deep/outside")],
        "is below a link",
    ),
    "a device": ([tar_member("null", tarfile.CHRTYPE)], "is neither file nor folder"),
    "a pipe": ([tar_member("pipe", tarfile.FIFOTYPE)], "is neither file nor folder"),
}


def assert_refused(tmp_path: Path, words: str) -> None:
    """Unpacking fails with these words and leaves nothing at all, inside or outside."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=words) as caught:
        unpack(tmp_path / "archive", tmp_path / "folder")
    assert str(caught.value).startswith(f"{tmp_path / 'archive'}: ")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path.parent / "outside").exists()


@pytest.mark.parametrize("case", BAD_TARS)
def test_malicious_tars_are_refused(tmp_path: Path, case: str) -> None:
    members, words = BAD_TARS[case]
    write_tar(tmp_path / "archive", *members)
    assert_refused(tmp_path, words)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.8])
def test_truncated_archives_leave_nothing(tmp_path: Path, kind: str, kept: float) -> None:
    WRITERS[kind](tmp_path / "archive")
    content = (tmp_path / "archive").read_bytes()
    (tmp_path / "archive").write_bytes(content[: int(kept * len(content))])
    assert_refused(tmp_path, "is no archive, or a damaged one")


def test_archives_with_changed_bytes_leave_nothing(tmp_path: Path) -> None:
    write_tar(tmp_path / "archive", mode="w:gz")
    content = bytearray((tmp_path / "archive").read_bytes())
    content[60] ^= 0xFF  # compressed bytes
    (tmp_path / "archive").write_bytes(content)
    assert_refused(tmp_path, "is no archive, or a damaged one")


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "archive")

    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    with pytest.raises(FeatureStoreError, match="No space left on device"):
        unpack(tmp_path / "archive", tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive"]
