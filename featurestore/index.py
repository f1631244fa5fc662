"""index.json: the list of a store's shards with their sizes and hashes, written last."""

from __future__ import annotations

import hashlib
import json
import re
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

    def __post_init__(self) -> None:
        """Refuse what no writer makes.

        Raises
        ------
        ValueError, TypeError
            When shards or statistics do not fit the spec or each other.
        """
        names = [f"shard-{number:05d}.h5" for number in range(len(self.shards))]
        if [shard.file for shard in self.shards] != names:
            raise ValueError("the shards are not shard-00000.h5 and so on")
        for shard in self.shards:
            if {type(shard.samples), type(shard.bytes)} != {int} or shard.samples < 1:
                raise ValueError(f"{shard.file} has no number of samples or bytes")
            if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
                raise ValueError(f"{shard.file} has no sha256")
            self.spec.check_size(shard.samples, shard.bytes)
        self.statistics.check(self.spec, sum(shard.samples for shard in self.shards))

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
        ArithmeticError,
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
