"""Unpacking tar and zip archives: whole or not at all, and nothing outside the folder."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from featurestore.files import writing
from stages.errors import DataError

ZIP_MODES = (0, stat.S_IFREG, stat.S_IFDIR)  # 0: made where files have none
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)


@dataclass(frozen=True)
class _Member:
    """What an archive says of one of its files or folders, before anything of it is believed."""

    name: str
    link: str | None  # where it points, as a path from the archive's root
    ordinary: bool  # a file, a folder or a link


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive (of any compression) or a zip archive into a new folder.

    Everything is written beside ``folder`` first; it gets its name once all is there.

    Raises
    ------
    DataError
        When the archive is damaged, or a member would leave the folder, link out of it, lie below a link, or be a device.
    FeatureStoreError
        When the disk is full, or the folder cannot be written.
    """
    if not hasattr(tarfile, "data_filter"):
        raise DataError(archive, "cannot be unpacked safely by this Python; use 3.10.12, 3.11.4 or later, or unpack it by hand")
    unpacking = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(unpacking, ignore_errors=True)
    unpacking.parent.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, unpacking)
        else:
            _unpack_tar(archive, unpacking)
        with writing(folder):
            os.rename(unpacking, folder)
    except tarfile.FilterError as error:
        raise DataError(archive, f"is not unpacked: {error}") from error
    except DAMAGE as error:
        reason = " ".join(str(error).split())  # tarfile's are of several lines
        raise DataError(archive, f"is no archive, or a damaged one ({reason}); get it again") from error
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)


def _unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        _check(archive, (_Member(member.name, _tar_link(member), _is_ordinary(member)) for member in members))
        with writing(folder):
            folder.mkdir()
            for member in tqdm(members, f"unpacking {archive.name}", unit="file", disable=None):
                tar.extract(member, folder, filter="data")


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as zipped:
        members = zipped.infolist()
        if any(member.flag_bits & 1 for member in members):
            raise DataError(archive, "is encrypted; unpack it by hand")
        # Links and devices are files with a mode of their own; zipfile would write their text.
        _check(archive, (_Member(member.filename, None, stat.S_IFMT(member.external_attr >> 16) in ZIP_MODES) for member in members))
        with writing(folder):
            folder.mkdir()
            for member in tqdm(members, f"unpacking {archive.name}", unit="file", disable=None):
                zipped.extract(member, folder)


def _is_ordinary(member: tarfile.TarInfo) -> bool:
    return member.isreg() or member.isdir() or member.issym() or member.islnk()


def _tar_link(member: tarfile.TarInfo) -> str | None:
    """Where a link points: a symbolic one from its own folder, a hard one from the archive's root."""
    if member.issym() and not member.linkname.startswith("/"):
        return f"{PurePosixPath(member.name).parent}/{member.linkname}"
    return member.linkname if member.issym() or member.islnk() else None


def _check(archive: Path, members: Iterable[_Member]) -> None:
    """Refuse names by their text alone, before the first file is written, so that it does not matter what lies on this disk."""
    members = list(members)
    links = {_inside(member.name) for member in members if member.link is not None}
    for member in members:
        parts = _inside(member.name)
        if not member.ordinary:
            problem = "is neither file nor folder"
        elif parts is None:
            problem = "would leave the folder"
        elif member.link is not None and _inside(member.link) is None:
            problem = f"links out of the folder, to {member.link}"
        elif any(parts[:depth] in links for depth in range(1, len(parts))):
            problem = "lies below a link"
        else:
            continue
        raise DataError(archive, f"is not unpacked: its member {member.name!r} {problem}", found=member.name)


def _inside(name: str) -> tuple[str, ...] | None:
    """A path's parts below the archive's root; None where it leads out of it, on any operating system."""
    if name.startswith("/") or "\\" in name or "\0" in name or ":" in name.split("/")[0]:
        return None
    parts: list[str] = []
    for part in PurePosixPath(name).parts:
        if part == "..":
            if not parts:
                return None
            parts.pop()
        else:
            parts.append(part)
    return tuple(parts)
