"""Unpacking tar archives: whole or not at all, and nothing outside the folder."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from featurestore.files import writing
from stages.common.errors import DataError

DAMAGE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive (of any compression) into a new folder.

    Everything is written beside ``folder`` first; it gets its name once all is there.

    Raises
    ------
    DataError
        When the archive is damaged, or a member would leave the folder, link out of it, lie below a link, or be a device.
    FeatureStoreError
        When the disk is full, or the folder cannot be written.
    """
    if not hasattr(tarfile, "data_filter"):
        raise DataError(
            archive,
            "cannot be unpacked safely by this Python; use 3.10.12, 3.11.4 or later, or unpack it by hand",
        )
    unpacking = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(unpacking, ignore_errors=True)
    unpacking.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            _check(archive, members)
            with writing(folder):
                unpacking.mkdir()
                for member in tqdm(members, f"unpacking {archive.name}", unit="file", disable=None):
                    tar.extract(member, unpacking, filter="data")
                os.rename(unpacking, folder)
    except tarfile.FilterError as error:
        raise DataError(archive, f"is not unpacked: {error}") from error
    except DAMAGE as error:
        reason = " ".join(str(error).split())  # tarfile's are of several lines
        raise DataError(
            archive, f"is no archive, or a damaged one ({reason}); get it again"
        ) from error
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)


def _link(member: tarfile.TarInfo) -> str | None:
    """Where a link points, as a path from the archive's root; None for a file or a folder."""
    if member.issym() and not member.linkname.startswith("/"):
        return f"{PurePosixPath(member.name).parent}/{member.linkname}"
    return member.linkname if member.issym() or member.islnk() else None


def _check(archive: Path, members: list[tarfile.TarInfo]) -> None:
    """Refuse names by their text alone, before the first file is written, so that it does not matter what lies on this disk."""
    links = {_inside(member.name) for member in members if _link(member) is not None}
    for member in members:
        parts, link = _inside(member.name), _link(member)
        if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
            problem = "is neither file nor folder"
        elif parts is None:
            problem = "would leave the folder"
        elif link is not None and _inside(link) is None:
            problem = f"links out of the folder, to {link}"
        elif any(parts[:depth] in links for depth in range(1, len(parts))):
            problem = "lies below a link"
        else:
            continue
        raise DataError(
            archive, f"is not unpacked: its member {member.name!r} {problem}", actual=member.name
        )


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
