"""Files: steps that happen wholly or not at all, and hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from featurestore.errors import StoreWriteError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line that the file system refused, and that nothing is lost."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # h5py raises either when a disk is full
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else " ".join(str(error).split())[:200]
        message = f"cannot be written ({reason}); make room or choose another folder, and start again"
        raise StoreWriteError(message, path=path, found=reason) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under its final name only once all its bytes are on disk."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries (new names, renames) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(source: Path, target: Path, *, leave_behind: str = "") -> None:
    """Rename a finished folder to its final name, replacing what is there; across file systems, copy first.

    Files that match the pattern ``leave_behind`` are dropped last of what matters, so that after a kill on the way
    they are still there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced, arrived = (target.with_name(f".{target.name}.{word}") for word in ("replaced", "arrived"))
    for leftover in (replaced, arrived):
        _remove(leftover)
    try:
        os.rename(source, arrived)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(source, arrived, copy_function=_copy_synced)
        sync_folder(arrived)
    if os.path.lexists(target):
        os.rename(target, replaced)
    os.rename(arrived, target)
    sync_folder(target.parent)
    for file in target.glob(leave_behind) if leave_behind else ():
        file.unlink()
    _remove(source)
    _remove(replaced)


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _copy_synced(source: str, target: str) -> None:
    """Copy a file and wait until it is on disk: its source is removed next."""
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def file_sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """sha256 of a file's bytes, in hexadecimal; ``progress`` is called with the number of bytes of each block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()
