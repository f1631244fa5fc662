"""Downloading a data set that its owners let everyone have: checked, resumable, unpacked."""

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
        What to get, and where it goes: a folder that is not there or is empty.
    downloads
        Where the archive arrives and is unpacked; it is removed once its content is in place.

    Raises
    ------
    DataError
        When the folder holds something else, the server gives up, or the file has another checksum.
    FeatureStoreError
        When the disk is full, or a folder cannot be written.
    """
    target = archive.target.resolve()  # a link to a larger disk stays one
    if (target / archive.has).is_dir():
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        message = f"has no {archive.has}, but holds something else; set prepare.root to a new or an empty folder"
        raise DataError(target, message, expected=archive.has)
    file = downloads / PurePosixPath(urlsplit(archive.url).path).name
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
    """Download a file; what an interrupted call left in ``NAME.partial`` is continued where the server can.

    Raises
    ------
    DataError
        When the server cannot be reached, stops early, or sends a file of another checksum.
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
    if not check_integrity(partial, md5):  # else it is whole: only its name was missing
        _receive(url, partial)
    if not check_integrity(partial, md5):
        partial.unlink()
        raise DataError(
            partial,
            f"what {url} sent has not the checksum {md5}, and is removed; start again",
            expected=md5,
        )
    os.replace(partial, file)


def _receive(url: str, partial: Path) -> None:
    """Append what is missing to the partial file, or write it anew where the server sends all of it."""
    start = partial.stat().st_size
    request = urllib.request.Request(
        url, headers={"User-Agent": "featuregan", **({"Range": f"bytes={start}-"} if start else {})}
    )
    total = None
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if answer.status != 206 or not (answer.headers["Content-Range"] or "").startswith(
                f"bytes {start}-"
            ):
                start = 0  # the server knows no ranges
            length = answer.headers["Content-Length"]
            total = start + int(length) if length else None
            with open(partial, "ab" if start else "wb") as file, _bar(url, start, total) as bar:
                while block := answer.read(BLOCK):
                    with writing(
                        partial
                    ):  # a connection that breaks is no disk that is full, though both are OSErrors
                        file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if (
            error.code == 416 and start
        ):  # the partial file is longer than the whole one: it is of another
            partial.write_bytes(b"")
            return _receive(url, partial)
        raise DataError(
            partial,
            f"{url} answers {error.code} {error.reason}; try again later",
            actual=error.code,
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            partial, f"{url} gave up ({getattr(error, 'reason', error)}); start again to go on"
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


def _bar(url: str, start: int, total: int | None) -> tqdm:
    name = PurePosixPath(urlsplit(url).path).name
    return tqdm(
        desc=f"downloading {name}",
        initial=start,
        total=total,
        unit="B",
        unit_scale=True,
        disable=None,
    )
