"""Errors of a feature store, as exceptions with attributes."""

from __future__ import annotations

from pathlib import Path


class OneLineError(Exception):
    """Base of errors whose text is the one line that a user is shown: place, problem, remedy.

    Attributes
    ----------
    expected, actual
        The allowed value and the one that was met, where both can be named.
    """

    def __init__(
        self, place: object, message: str, *, expected: object = None, actual: object = None
    ) -> None:
        text = f"{place}: {message}"  # quoted text may hold line breaks and escape codes
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))
        self.expected = expected
        self.actual = actual

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle text and attributes; ``__init__`` has other arguments."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


class FeatureStoreError(OneLineError):
    """Base of all errors of this package; the text starts with the path.

    Attributes
    ----------
    path
        The file or folder with the problem.
    """

    def __init__(
        self, message: str, *, path: str | Path, expected: object = None, actual: object = None
    ) -> None:
        super().__init__(path, message, expected=expected, actual=actual)
        self.path = Path(path)


class StoreNotFoundError(FeatureStoreError):
    """There is no store at this path."""


class StoreExistsError(FeatureStoreError):
    """There is already something at the path of a new store."""


class StoreBusyError(FeatureStoreError):
    """Another process is writing this store."""


class IncompleteStoreError(FeatureStoreError):
    """The index is missing or unreadable, or a listed shard is missing or has another size."""


class FormatVersionError(FeatureStoreError):
    """The store was written in a version of the format that this library does not read."""


class ShardCorruptError(FeatureStoreError):
    """A shard's bytes or datasets differ from its index or attributes."""


class StoreReadError(FeatureStoreError):
    """A shard cannot be read for a reason outside it: an error of the OS, a missing filter."""


class SpecMismatchError(FeatureStoreError):
    """The store is sound but does not hold what the caller needs."""


class StoreWriteError(FeatureStoreError):
    """The file system refused to write: it is full, read-only, or gone."""


class StoreMemoryError(FeatureStoreError):
    """The store does not fit into the free memory."""


class SampleError(FeatureStoreError):
    """A sample to be written does not fit the store's spec."""
