"""Files: steps that happen wholly or not at all, and hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from featurestore.errors import StoreWriteError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line that the file system refused, and that nothing is lost."""
    try:
        yield
    except (
        OSError,
        RuntimeError,
    ) as error:  # h5py raises either when a disk is full, and not always says so
        raise not_written(path, error) from error


def not_written(path: Path | str, error: OSError | RuntimeError) -> StoreWriteError:
    """What to say when a file could not be written."""
    number = error.errno if isinstance(error, OSError) else None
    reason = os.strerror(number) if number else " ".join(str(error).split())[:200]
    remedy = (
        "make room or choose another folder" if number in (None, *FULL) else "choose another folder"
    )
    return StoreWriteError(
        f"cannot be written ({reason}); {remedy}, and start again", path=path, actual=reason
    )


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

    ``source`` keeps its name until ``target`` has its own, so a kill or an error on the way loses nothing. Files that
    match the pattern ``leave_behind`` are dropped after that.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced, arrived = _on_the_way(target)
    _remove(arrived)
    whole = source
    if not _can_be_renamed(source, arrived):
        shutil.copytree(source, arrived, copy_function=_copy_synced)
        sync_folder(arrived)
        whole = arrived
    if os.path.lexists(target):
        _remove(replaced)
        os.rename(target, replaced)
    try:
        os.rename(whole, target)
    except OSError:
        if os.path.lexists(replaced):
            os.rename(replaced, target)
        raise
    sync_folder(target.parent)
    clear_after_move(source, target, leave_behind=leave_behind)


def clear_after_move(source: Path, target: Path, *, leave_behind: str = "") -> None:
    """Remove what :func:`move_into_place` no longer needs once ``target`` has its name; a killed one leaves it there."""
    for file in target.glob(leave_behind) if leave_behind else ():
        file.unlink()
    for leftover in (source, *_on_the_way(target)):
        _remove(leftover)


def _on_the_way(target: Path) -> tuple[Path, Path]:
    """Where the old folder waits, and where a copy from another file system arrives."""
    return target.with_name(f".{target.name}.replaced"), target.with_name(f".{target.name}.arrived")


def _can_be_renamed(source: Path, target: Path) -> bool:
    """Whether a rename does, or a copy is needed. Two mounts of one disk have one device number, so an empty folder is to try it."""
    probe = Path(tempfile.mkdtemp(dir=source.parent))
    try:
        os.rename(probe, target)
    except OSError as error:
        probe.rmdir()
        if error.errno != errno.EXDEV:
            raise
        return False
    target.rmdir()
    return True


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
