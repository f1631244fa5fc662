"""index.json: the list of a store's shards with their sizes and hashes, written last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featurestore.errors import FormatVersionError, IncompleteStoreError
from featurestore.files import write_atomically
from featurestore.schema import FORMAT_VERSION, StoreSpec
from featurestore.statistics import Statistics

INDEX_NAME = "index.json"


@dataclass(frozen=True)
class ShardRecord:
    """One shard as the index lists it: file name, number of samples, size in bytes, sha256 of all its bytes."""

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

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    def to_text(self) -> str:
        """The one text that stands for this index: canonical, and closed by a digest of itself."""
        body: dict[str, Any] = {
            "format": "featurestore",
            "format_version": FORMAT_VERSION,
            "samples": self.samples,
            "fingerprint": self.fingerprint,
            "spec": self.spec.to_dict(),
            "shards": [asdict(shard) for shard in self.shards],
            "statistics": self.statistics.to_dict(),
        }
        body["digest"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        return json.dumps(body, indent=1) + "\n"


def write_index(folder: Path, index: Index) -> None:
    """Write ``index.json`` into ``folder``, whole or not at all."""
    write_atomically(folder / INDEX_NAME, index.to_text().encode())


def read_index(folder: Path) -> Index:
    """Read ``folder/index.json``.

    Raises
    ------
    IncompleteStoreError
        When it is missing, or differs from what was written by as little as a byte.
    FormatVersionError
        When another version of the format wrote it.
    """
    path = folder / INDEX_NAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise IncompleteStoreError(
            f"cannot be read ({error.strerror}); write the store again", path=path
        ) from error
    try:
        body = json.loads(raw)
        if body["format"] != "featurestore":
            raise ValueError("not a featurestore index")
        version = body["format_version"]
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                f"format version {version!r}, but this library reads version {FORMAT_VERSION}; write the store again",
                path=path,
                expected=FORMAT_VERSION,
                actual=version,
            )
        index = _parse(body)
        intact = index.to_text().encode() == raw
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


def _parse(body: Mapping[str, Any]) -> Index:
    shards = tuple(ShardRecord(**record) for record in body["shards"])
    if any(
        os.path.basename(shard.file) != shard.file or shard.samples < 1 or shard.bytes < 1
        for shard in shards
    ):
        raise ValueError("a shard record is out of range")
    return Index(
        spec=StoreSpec.from_dict(body["spec"]),
        fingerprint=str(body["fingerprint"]),
        shards=shards,
        statistics=Statistics.from_dict(body["statistics"]),
    )
