"""Downloading a data set whose owners allow it: checked, resumable, unpacked."""

from __future__ import annotations

import http.client
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from tqdm import tqdm

from featurestore.files import move_into_place, writing
from stages.common.errors import DataError
from stages.datasets.archives import unpack
from stages.datasets.layout import Archive

BLOCK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte


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
        message = (
            f"has no {archive.has}, but holds something else; "
            "set prepare.root to a new or an empty folder"
        )
        raise DataError(target, message, expected=archive.has)
    file = downloads / _file_name(archive.url)
    fetch(archive.url, archive.md5, file)
    unpacked = file.with_name(f"{file.name}.unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    unpack(file, unpacked)
    if not (unpacked / archive.inside / archive.has).is_dir():
        message = f"holds no {archive.inside}/{archive.has}; is this the right archive?"
        raise DataError(file, message, expected=archive.inside)
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
        message = f"what {url} sent has not the checksum {md5}, and is removed; start again"
        raise DataError(partial, message, expected=md5)
    os.replace(partial, file)


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
        message = f"{url} answers {error.code} {error.reason}; try again later"
        raise DataError(partial, message, actual=error.code) from error
    except (OSError, http.client.HTTPException) as error:
        message = f"{url} gave up ({getattr(error, 'reason', error)}); start again to go on"
        raise DataError(partial, message) from error
    size = partial.stat().st_size
    if total is not None and size < total:
        message = f"{url} gave up after {size} of {total} bytes; start again to go on"
        raise DataError(partial, message, expected=total, actual=size)
    return None


def _file_name(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).name
