"""Receipts: files beside finished shards, by which a later writer recognizes them as its own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from featurestore.files import file_sha256, write_atomically, writing
from featurestore.index import ShardRecord
from featurestore.statistics import Statistics

RECEIPT_SUFFIX = ".finished.json"


@dataclass(frozen=True)
class Receipt:
    """What is known of a finished shard until the store is whole.

    Attributes
    ----------
    fingerprint
        Identity of everything that the store is made from.
    first
        Position of the shard's first sample in the store.
    record, statistics
        Size and sha256 of the file, and statistics of its samples.
    """

    fingerprint: str
    first: int
    record: ShardRecord
    statistics: Statistics

    def write(self, shard: Path) -> None:
        """Write the receipt beside a shard.

        Raises
        ------
        StoreWriteError
            When the disk does not take it.
        """
        values = {
            "fingerprint": self.fingerprint,
            "first": self.first,
            "shard": asdict(self.record),
            "statistics": self.statistics.to_dict(),
        }
        path = receipt_path(shard)
        with writing(path):
            write_atomically(path, json.dumps(values).encode())

    @classmethod
    def read(cls, shard: Path) -> Receipt | None:
        """Read the receipt of a shard; None where it is missing or damaged."""
        try:
            values = json.loads(receipt_path(shard).read_bytes())
            return cls(
                values["fingerprint"],
                values["first"],
                ShardRecord(**values["shard"]),
                Statistics.from_dict(values["statistics"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def describes(self, shard: Path, *, hashed: bool) -> bool:
        """Return whether a file is the shard of this receipt.

        Parameters
        ----------
        shard
            The file.
        hashed
            Whether to compare its sha256 too, and not only its size.
        """
        try:
            if shard.stat().st_size != self.record.bytes:
                return False
            return not hashed or file_sha256(shard) == self.record.sha256
        except OSError:
            return False


def receipt_path(shard: Path) -> Path:
    """Return the path of a shard's receipt."""
    return shard.with_name(shard.name + RECEIPT_SUFFIX)
