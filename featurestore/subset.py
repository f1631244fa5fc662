"""Some samples of a store, as a store: a fold of a cross-validation, a class of interest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from featurestore.reader import FeatureStore
from featurestore.schema import fingerprint
from featurestore.shard import Shard


class SubsetStore(FeatureStore):
    """Samples of another store, in any order. Nothing is copied; statistics are of these samples.

    Parameters
    ----------
    store
        The whole store.
    positions
        (n,) positions of the samples, n at least 1.

    Raises
    ------
    IndexError
        When there is no such position, or none is given.
    """

    def __init__(self, store: FeatureStore, positions: Sequence[int] | np.ndarray) -> None:
        rows = np.asarray(positions, np.int64)
        if not len(rows) or rows.min() < 0 or rows.max() >= len(store):
            raise IndexError(f"samples {rows.tolist()} of a store with {len(store)}")
        vars(self).update(vars(store))
        self._store, self._rows, self._statistics = store, rows, None
        self.fingerprint = fingerprint(store=store.fingerprint, positions=rows.tolist())

    @override
    def __len__(self) -> int:
        return len(self._rows)

    @property
    @override
    def ids(self) -> list[str]:
        ids = self._store.ids
        return [ids[row] for row in self._rows]

    @property
    @override
    def views(self) -> list[str]:
        views = self._store.views
        return [views[row] for row in self._rows]

    @override
    def gather(
        self, name: str, positions: Sequence[int] | np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        where = np.asarray(positions, np.int64)
        if len(where) and not (where.min() >= 0 and where.max() < len(self)):
            raise IndexError(f"samples {where.tolist()} of a store with {len(self)}")
        return self._store.gather(name, self._rows[where], out)

    @override
    def _locate(self, position: int) -> tuple[Shard, int]:
        index = int(position) + (len(self) if position < 0 else 0)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {position} of a store with {len(self)}")
        return self._store._locate(int(self._rows[index]))
