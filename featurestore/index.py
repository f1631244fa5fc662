"""index.json: the list of a store's shards with their sizes and hashes, written last."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from featurestore.errors import IncompleteStoreError
from featurestore.schema import StoreSpec, check_version
from featurestore.statistics import Statistics

INDEX_NAME = "index.json"


@dataclass(frozen=True)
class ShardRecord:
    """One shard as the index lists it.

    Attributes
    ----------
    file
        Name of the file in the store's folder.
    samples
        Number of samples.
    bytes
        Size of the file.
    sha256
        Hash of all its bytes; empty for a single shard that was opened without an index.
    """

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """A whole store as its index describes it."""

    spec: StoreSpec
    fingerprint: str
    shards: tuple[ShardRecord, ...]
    statistics: Statistics

    def to_text(self) -> str:
        """Return the only text that stands for this index: canonical, with a digest of itself."""
        body: dict[str, object] = {
            "format": "featurestore",
            "format_version": self.spec.format_version,
            "samples": sum(shard.samples for shard in self.shards),
            "fingerprint": self.fingerprint,
            "spec": self.spec.to_dict(),
            "shards": [asdict(shard) for shard in self.shards],
            "statistics": self.statistics.to_dict(),
        }
        body["digest"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        return json.dumps(body, indent=1) + "\n"


def read_index(folder: Path) -> Index:
    """Read ``folder/index.json``.

    Raises
    ------
    IncompleteStoreError
        When it is missing, or a byte of it differs from what was written.
    FormatVersionError
        When another version of the format wrote it.
    """
    path = folder / INDEX_NAME
    try:
        raw = path.read_bytes()
        body = json.loads(raw)
        if body["format"] != "featurestore":
            raise ValueError("not a featurestore index")
        check_version(body["format_version"], path)
        index = Index(
            spec=StoreSpec.from_dict(body["spec"]),
            fingerprint=str(body["fingerprint"]),
            shards=tuple(ShardRecord(**record) for record in body["shards"]),
            statistics=Statistics.from_dict(body["statistics"]),
        )
        if any(
            os.path.basename(shard.file) != shard.file or min(shard.samples, shard.bytes) < 1
            for shard in index.shards
        ):
            raise ValueError("a shard record is out of range")
        intact = index.to_text().encode() == raw
    except OSError as error:
        raise IncompleteStoreError(
            f"cannot be read ({error.strerror}); write the store again", path=path
        ) from error
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise IncompleteStoreError(
            f"not a whole index ({reason}); write the store again", path=path
        ) from error
    if not intact:
        raise IncompleteStoreError(
            "the index was changed after it was written; write the store again", path=path
        )
    return index
