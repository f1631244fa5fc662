"""featurestore: a cache of dense features in plain HDF5 shards.

>>> import featurestore
>>> store = featurestore.open("features/train")
>>> store.features(0)          # (C, h, w), zero copy where uncompressed
>>> store[0].mask              # (H, W) uint8

The format is described in ``docs/format.md``. The library needs NumPy, h5py, pandas and
typing_extensions; numba for ``zeros``, ``int8``, large layers and large batches; hdf5plugin for
``lz4`` and ``zstd``. Only ``featurestore.dataset`` imports PyTorch. Locks need a POSIX system.
"""

from featurestore.errors import (
    FeatureStoreError,
    FormatVersionError,
    IncompleteStoreError,
    SampleError,
    ShardCorruptError,
    SpecMismatchError,
    StoreBusyError,
    StoreExistsError,
    StoreMemoryError,
    StoreNotFoundError,
    StoreReadError,
    StoreWriteError,
)
from featurestore.reader import FeatureStore, Sample, open
from featurestore.schema import FORMAT_VERSION, VOID, StoreSpec, fingerprint
from featurestore.statistics import Statistics
from featurestore.subset import SubsetStore
from featurestore.writer import StoreWriter, create

__all__ = [
    "FORMAT_VERSION",
    "VOID",
    "FeatureStore",
    "FeatureStoreError",
    "FormatVersionError",
    "IncompleteStoreError",
    "Sample",
    "SampleError",
    "ShardCorruptError",
    "SpecMismatchError",
    "Statistics",
    "StoreBusyError",
    "StoreExistsError",
    "StoreMemoryError",
    "StoreNotFoundError",
    "StoreReadError",
    "StoreSpec",
    "StoreWriteError",
    "StoreWriter",
    "SubsetStore",
    "create",
    "fingerprint",
    "open",
]
