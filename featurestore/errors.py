"""Everything that can be wrong with a feature store, as exceptions with attributes."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class FeatureStoreError(Exception):
    """Base of all errors of this package; its text is one line that names the path.

    Attributes
    ----------
    path
        The file or folder that is wrong.
    expected, actual
        What was wanted there and what was met, where that can be said.
    """

    def __init__(
        self, message: str, *, path: str | Path, expected: Any = None, actual: Any = None
    ) -> None:
        super().__init__(f"{path}: {message}")
        self.path = Path(path)
        self.expected = expected
        self.actual = actual

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes whole."""
        return _restore, (type(self), self.args, self.__dict__)


class StoreNotFoundError(FeatureStoreError):
    """There is no store at this path."""


class StoreExistsError(FeatureStoreError):
    """There is something at the path that a new store was to be written to."""


class StoreBusyError(FeatureStoreError):
    """Another process is writing this very store."""


class IncompleteStoreError(FeatureStoreError):
    """The index is missing or unreadable, or a shard that it lists is missing or has another size."""


class FormatVersionError(FeatureStoreError):
    """The store was written in a version of the format that this library does not read."""


class ShardCorruptError(FeatureStoreError):
    """A shard's bytes or datasets are not what its index says."""


class StoreReadError(FeatureStoreError):
    """A shard could not be read here, which says nothing about what is in it: the system refused, or a filter is missing."""


class SpecMismatchError(FeatureStoreError):
    """The store is sound but does not hold what the caller needs."""


class StoreWriteError(FeatureStoreError):
    """The file system did not take what was written: it is full, read-only, or gone."""


class StoreMemoryError(FeatureStoreError):
    """The store does not fit into the memory that it was to be kept in."""


class SampleError(FeatureStoreError):
    """A sample that was to be written does not fit the store's spec."""


def _restore(
    kind: type[FeatureStoreError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> FeatureStoreError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error
