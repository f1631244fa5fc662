"""Downloading a data set whose owners allow it: checked, resumable, unpacked.

An archive is unpacked whole or not at all, and nothing outside of its folder.
"""

from __future__ import annotations

import gzip
import http.client
import lzma
import os
import posixpath
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from tqdm import tqdm

from featurestore.files import move_into_place, writing
from stages.common.errors import DataError
from stages.datasets.layout import Archive

BLOCK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte
DAMAGE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)


def download_data(archive: Archive, downloads: Path) -> None:
    """Bring what an archive holds to its folder, unless it is there already.

    Parameters
    ----------
    archive
        What to get, and its destination: a folder that does not exist or is empty.
    downloads
        Folder in which the archive arrives and is unpacked; both are removed at the end.

    Raises
    ------
    DataError
        When the folder holds something else, the download fails, or the checksum differs.
    FeatureStoreError
        When the disk is full, or a folder cannot be written.
    """
    target = archive.target.resolve()  # a link to a larger disk stays a link
    if (target / archive.has).is_dir():
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(
            target,
            f"has no {archive.has}, but holds something else; "
            "set prepare.root to a new or an empty folder",
            expected=archive.has,
        )
    file = downloads / _file_name(archive.url)
    fetch(archive.url, archive.md5, file)
    unpacked = file.with_name(f"{file.name}.unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    unpack(file, unpacked)
    if not (unpacked / archive.inside / archive.has).is_dir():
        raise DataError(
            file,
            f"holds no {archive.inside}/{archive.has}; is this the right archive?",
            expected=archive.inside,
        )
    with writing(target):
        move_into_place(unpacked / archive.inside, target)
        shutil.rmtree(unpacked)
        file.unlink()


def fetch(url: str, md5: str, file: Path) -> None:
    """Download a file; resume from an interrupted call's ``NAME.partial`` where the server can.

    Raises
    ------
    DataError
        When the server cannot be reached or stops early, or the checksum differs.
    FeatureStoreError
        When the disk is full, or the folder cannot be written.
    """
    from torchvision.datasets.utils import check_integrity

    if check_integrity(file, md5):
        return
    partial = file.with_name(f"{file.name}.partial")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    if not check_integrity(partial, md5):  # else only the rename is missing
        _receive(url, partial)
    if not check_integrity(partial, md5):
        partial.unlink()
        raise DataError(
            partial,
            f"what {url} sent has not the checksum {md5}, and is removed; start again",
            expected=md5,
        )
    os.replace(partial, file)


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
        raise DataError(
            archive,
            "cannot be unpacked safely by this Python; "
            "use 3.10.12, 3.11.4 or later, or unpack it by hand",
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
        reason = " ".join(str(error).split())  # tarfile's reasons have several lines
        raise DataError(
            archive,
            f"is no archive, or a damaged one ({reason}); get it again",
        ) from error
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)


def _receive(url: str, partial: Path) -> None:
    """Append what is missing to the partial file, or write it anew where the server sends all."""
    start, total = partial.stat().st_size, None
    headers = {"User-Agent": "featuregan", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT
        ) as response:
            sent = response.headers["Content-Range"] or ""
            if response.status != 206 or not sent.startswith(f"bytes {start}-"):
                start = 0  # the server knows no ranges
            length = response.headers["Content-Length"]
            total = start + int(length) if length else None
            bar = tqdm(
                desc=f"downloading {_file_name(url)}",
                initial=start,
                total=total,
                unit="B",
                unit_scale=True,
                disable=None,
            )
            with open(partial, "ab" if start else "wb") as file, bar:
                while block := response.read(BLOCK):
                    with writing(partial):  # tells a full disk from a broken connection
                        file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # the partial file is longer than the whole file
            partial.write_bytes(b"")
            return _receive(url, partial)
        raise DataError(
            partial,
            f"{url} answers {error.code} {error.reason}; try again later",
            actual=error.code,
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            partial,
            f"{url} gave up ({getattr(error, 'reason', error)}); start again to go on",
        ) from error
    size = partial.stat().st_size
    if total is not None and size < total:
        raise DataError(
            partial,
            f"{url} gave up after {size} of {total} bytes; start again to go on",
            expected=total,
            actual=size,
        )
    return None


def _file_name(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).name


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
