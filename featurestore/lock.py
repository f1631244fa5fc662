"""One writer a store: a lock that the operating system takes back when its process dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from featurestore.errors import StoreBusyError, StoreWriteError

UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class WriterLock:
    """An exclusive lock on a file, held from construction to :meth:`release` or the end of the process.

    ``flock`` works on local file systems and on NFS from version 4 on.

    Parameters
    ----------
    path
        The lock's file; its folder is made if need be; on release the file is removed, and a folder so made if it is empty.

    Raises
    ------
    StoreBusyError
        When another process, or another writer of this one, holds it.
    StoreWriteError
        When this file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._made_folder = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        while self._descriptor is None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = (
                    os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                )
                os.close(descriptor)
                message = (
                    f"{holder} is writing this store; wait for it or stop it, then start again"
                )
                raise StoreBusyError(message, path=path, actual=holder) from None
            except OSError as error:
                os.close(descriptor)
                if error.errno not in UNSUPPORTED:
                    raise
                message = f"this file system has no locks ({error.strerror}); mount it with flock, or choose another folder"
                raise StoreWriteError(message, path=path.parent, actual=error.strerror) from error
            except BaseException:
                os.close(descriptor)
                raise
            if self._is_current(descriptor):
                self._descriptor = descriptor
            else:  # the holder before us removed the file between our open and our lock
                os.close(descriptor)
        with suppress(OSError):  # on a full disk the lock holds without a note of who has it
            os.truncate(self._descriptor, 0)
            os.write(
                self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode()
            )

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.fstat(descriptor).st_ino == os.stat(self.path).st_ino
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
            if self._made_folder:
                with suppress(OSError):  # it is not empty any more
                    self.path.parent.rmdir()
