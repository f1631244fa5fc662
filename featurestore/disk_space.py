"""Free space on the disks, checked before anything is written."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from featurestore.errors import StoreWriteError

if TYPE_CHECKING:
    from featurestore.writer import StoreWriter


def check_disk_space(writers: Iterable[StoreWriter]) -> None:
    """Refuse to start writing stores that together do not fit on their disks.

    Raises
    ------
    StoreWriteError
        The text says how many bytes are needed, how many are free, and where.
    """
    needed: Counter[int] = Counter()  # bytes by disk
    folders: dict[int, Path] = {}
    for writer in writers:
        missing, whole = writer.bytes_announced
        scratch, final = writer.scratch, writer.path.parent
        if final.stat().st_dev == scratch.stat().st_dev:
            whole = 0  # the finished store is renamed, not copied
        for folder, size in ((scratch, missing), (final, whole)):
            disk = folder.stat().st_dev
            folders.setdefault(disk, folder)
            needed[disk] += size
    for disk, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if needed[disk] > free:
            raise StoreWriteError(
                f"{needed[disk] / 1e9:.1f} GB are to be written, but {free / 1e9:.1f} GB are free;"
                " make room or choose another --scratch",
                path=folder,
                expected=needed[disk],
                actual=free,
            )
