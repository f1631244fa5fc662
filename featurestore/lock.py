"""One writer a store: a lock that the operating system releases when its process dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path

from featurestore.errors import StoreBusyError, StoreWriteError

UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class WriterLock:
    """An exclusive lock on a file, held until :meth:`release` or the end of the process.

    ``flock`` works on local file systems, and on NFS from version 4 on.

    Parameters
    ----------
    path
        The lock's file. Its folder is made where missing. :meth:`release` removes the file, and
        a folder that was made for it if that is empty.

    Raises
    ------
    StoreBusyError
        When another process, or another writer of this process, holds the lock.
    StoreWriteError
        When the file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made_folder = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        file = None
        while file is None:
            file = self._try_to_lock()
        with suppress(OSError):  # on a full disk the lock holds without its holder's name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._file = file

    def _try_to_lock(self) -> FileIO | None:
        """Lock the file; None where its last holder removed it after it was opened here."""
        with ExitStack() as stack:
            file = stack.enter_context(FileIO(self.path, "a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read(200).decode(errors="replace").strip() or "another process"
                raise StoreBusyError(
                    f"{holder} is writing this store; wait for it or stop it, then start again",
                    path=self.path,
                    actual=holder,
                ) from None
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                reason = error.strerror
                raise StoreWriteError(
                    f"this file system has no locks ({reason});"
                    " mount it with flock, or choose another folder",
                    path=self.path.parent,
                    actual=reason,
                ) from error
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    stack.pop_all()
                    return file
        return None

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if not self._file.closed:
            self.path.unlink(missing_ok=True)
            self._file.close()
            if self._made_folder:
                with suppress(OSError):  # the folder is not empty
                    self.path.parent.rmdir()
