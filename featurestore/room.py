"""Room on the disks, looked at before anything is written."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from featurestore.errors import StoreWriteError


class Writer(Protocol):
    """What is asked of a :class:`featurestore.StoreWriter`."""

    path: Path
    scratch: Path

    @property
    def bytes_announced(self) -> tuple[int, int]:
        """Bytes still to be written into ``scratch``, and of the whole store."""


def check_room(writers: Iterable[Writer]) -> None:
    """Refuse to start what the disks cannot hold together.

    Raises
    ------
    StoreWriteError
        The text says how much is needed, how much room there is, and where.
    """
    needed: dict[int, int] = defaultdict(int)  # bytes by disk
    folders: dict[int, Path] = {}
    for writer in writers:
        left, whole = writer.bytes_announced
        disk, final_disk = writer.scratch.stat().st_dev, writer.path.parent.stat().st_dev
        folders.setdefault(disk, writer.scratch)
        needed[disk] += left
        if final_disk != disk:  # what is finished is copied there
            folders.setdefault(final_disk, writer.path.parent)
            needed[final_disk] += whole
    for disk, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if needed[disk] > free:
            message = f"{needed[disk] / 1e9:.1f} GB are to be written, but {free / 1e9:.1f} GB are free; make room or choose another --scratch"
            raise StoreWriteError(message, path=folder, expected=needed[disk], actual=free)
