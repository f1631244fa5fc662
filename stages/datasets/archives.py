"""Unpacking tar archives: whole or not at all, and nothing outside the folder."""

from __future__ import annotations

import gzip
import lzma
import os
import posixpath
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

    Files are written beside ``folder`` first; the folder gets its name once all are there.

    Raises
    ------
    DataError
        When the archive is damaged, or a member would leave the folder, links out of it, is below
        a link, or is a device.
    FeatureStoreError
        When the disk is full, or the folder cannot be written.
    """
    if not hasattr(tarfile, "data_filter"):
        message = (
            "cannot be unpacked safely by this Python; "
            "use 3.10.12, 3.11.4 or later, or unpack it by hand"
        )
        raise DataError(archive, message)
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
        reason = " ".join(str(error).split())  # tarfile's reasons have several lines
        message = f"is no archive, or a damaged one ({reason}); get it again"
        raise DataError(archive, message) from error
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)


def _check(archive: Path, members: list[tarfile.TarInfo]) -> None:
    """Refuse bad names by their text, before a file is written and whatever is on this disk."""
    links = {_inside(member.name) for member in members if member.issym() or member.islnk()}
    for member in members:
        path, target = _inside(member.name), _link_target(member)
        if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
            problem = "is neither file nor folder"
        elif path is None:
            problem = "would leave the folder"
        elif _inside(target) is None:
            problem = f"links out of the folder, to {target}"
        elif links.intersection(path.parents):
            problem = "is below a link"
        else:
            continue
        raise DataError(
            archive, f"is not unpacked: its member {member.name!r} {problem}", actual=member.name
        )


def _link_target(member: tarfile.TarInfo) -> str:
    """Return where a link points, as a path from the archive's root; for others, the root."""
    if member.issym() and not member.linkname.startswith("/"):
        return f"{PurePosixPath(member.name).parent}/{member.linkname}"
    return member.linkname if member.issym() or member.islnk() else "."


def _inside(name: str) -> PurePosixPath | None:
    """Return the path below the archive's root, or None where a system would read it as outside."""
    path = PurePosixPath(posixpath.normpath(name))
    elsewhere = "\\" in name or "\0" in name or ":" in name.split("/")[0]
    return None if elsewhere or path.is_absolute() or path.parts[:1] == ("..",) else path
