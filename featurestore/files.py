"""Files: atomic writing and moving, and hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from featurestore.errors import StoreWriteError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit of file sizes


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one line that names ``path`` and a remedy.

    Raises
    ------
    StoreWriteError
        When the block raises an ``OSError``, or a ``RuntimeError``: h5py raises either where a
        disk is full, and does not always name the reason.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise not_written(path, error) from error


def not_written(path: Path | str, error: OSError | RuntimeError) -> StoreWriteError:
    """Build the error of a file that could not be written."""
    number = error.errno if isinstance(error, OSError) else None
    reason = os.strerror(number) if number else " ".join(str(error).split())[:200]
    remedy = "make room or " if number in (None, *FULL) else ""
    return StoreWriteError(
        f"cannot be written ({reason}); {remedy}choose another folder, and start again",
        path=path,
        actual=reason,
    )


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing that appears at ``path`` once all its bytes are on disk.

    A block that raises leaves ``path`` as it was, and the bytes so far in ``path`` + ``.partial``.
    """
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under its final name only once all its bytes are on disk."""
    with atomic_file(path) as file:
        file.write(content)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's entries (new names, renames), to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def renew_folder(path: Path) -> None:
    """Make an empty folder in place of what is at ``path``; a link is replaced, not followed.

    Raises
    ------
    StoreWriteError
        When the file system does not allow it.
    """
    with writing(path):
        _remove(path)
        path.mkdir(parents=True)


def move_into_place(source: Path, target: Path, *, leave_behind: str = "") -> None:
    """Rename a finished folder to its final name; across file systems, copy it first.

    ``source`` keeps its name until ``target`` has its own: a kill or an error in between loses
    nothing.

    Parameters
    ----------
    source
        The finished folder.
    target
        Its final name; what is there is replaced.
    leave_behind
        Pattern of files that are removed after the move; default: none.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced, copied = _waypoints(target)
    try:  # two mounts of one disk have one device number: only a rename tells
        _rename_over(source, target, replaced)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _remove(copied)
        shutil.copytree(source, copied, copy_function=_copy_synced)
        sync(copied)
        _rename_over(copied, target, replaced)
    sync(target.parent)
    clear_after_move(source, target, leave_behind=leave_behind)


def clear_after_move(source: Path, target: Path, *, leave_behind: str = "") -> None:
    """Remove what :func:`move_into_place` leaves when it is killed after the last rename."""
    for file in target.glob(leave_behind) if leave_behind else ():
        file.unlink()
    for leftover in (source, *_waypoints(target)):
        _remove(leftover)


def _waypoints(target: Path) -> tuple[Path, Path]:
    """Name where the old folder waits, and where a copy from another file system is made."""
    return target.with_name(f".{target.name}.replaced"), target.with_name(f".{target.name}.arrived")


def _rename_over(source: Path, target: Path, replaced: Path) -> None:
    """Rename a folder; what was at ``target`` becomes ``replaced``, or returns on an error."""
    if os.path.lexists(target):
        _remove(replaced)
        os.rename(target, replaced)
    try:
        os.rename(source, target)
    except OSError:
        if os.path.lexists(replaced):
            os.rename(replaced, target)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _copy_synced(source: str, target: str) -> None:
    """Copy a file and wait until it is on disk, because its source is removed next."""
    shutil.copyfile(source, target)
    sync(Path(target))


def file_sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """Hash a file's bytes with sha256.

    Parameters
    ----------
    path
        The file.
    progress
        Called with the number of bytes of each block that was read.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def allow_open_files(shards: int) -> None:
    """Raise this process's soft limit of open files (256 or 1024) where a store has more shards.

    The new limit counts the files that are open now, two stores of this size, and 512 others. A
    store of a terabyte has 4000 shards.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS refuses values between the limits; too few files are an error when they are opened.
    with suppress(ValueError, OSError):
        wanted = len(os.listdir("/dev/fd")) + 2 * shards + 512
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def file_state(path: Path) -> tuple[int, int, int] | None:
    """Read inode, size and time of the last change of a file; None: there is no file."""
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns
    return None
