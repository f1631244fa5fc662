"""Feature stores in PyTorch: a map-style data set, an order of batches, a loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from featurestore.reader import FeatureStore


@dataclass
class Batch:
    """B samples: features (B, C, h, w) of the store's type, masks (B, H, W) uint8, images (B, 3, H, W) uint8 or None.

    ``positions`` (B,) int64 are the samples' places in the store.
    """

    positions: torch.Tensor
    features: torch.Tensor
    masks: torch.Tensor
    images: torch.Tensor | None

    def to(self, device: torch.device, non_blocking: bool = True) -> Batch:
        """The same batch on ``device``; copies from pinned memory do not block."""
        moved = (None if part is None else part.to(device, non_blocking=non_blocking) for part in (self.features, self.masks, self.images))
        return Batch(self.positions, *moved)  # type: ignore[arg-type]

    def pin_memory(self) -> Batch:
        """The same batch in page-locked host memory (the loader calls this where CUDA is there)."""
        images = None if self.images is None else self.images.pin_memory()
        return Batch(self.positions, self.features.pin_memory(), self.masks.pin_memory(), images)


class FeatureDataset(Dataset[Batch]):
    """A store's samples for a :class:`torch.utils.data.DataLoader`.

    A batch is gathered at once (``__getitems__``), each sample copied once, from the
    file's pages straight into the batch.

    Parameters
    ----------
    store
        The store.
    images
        Whether to read the images too; the store must have them.
    """

    def __init__(self, store: FeatureStore, *, images: bool = False) -> None:
        self.store = store
        self.images = images
        if images and len(store):
            store.image(0)  # raises SpecMismatchError now rather than in a worker

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Batch of the samples at ``positions``, in that order."""
        store, spec, count = self.store, self.store.spec, len(positions)
        features = np.empty((count, *spec.feature_shape), spec.feature_dtype)
        masks = np.empty((count, *spec.mask_shape), np.uint8)
        images = np.empty((count, *spec.mask_shape, 3), np.uint8) if self.images else None
        for row, position in enumerate(positions):
            features[row] = store.features(position)
            masks[row] = store.mask(position)
            if images is not None:
                images[row] = store.image(position)
        return Batch(
            positions=torch.tensor(positions, dtype=torch.int64),
            features=torch.from_numpy(features),
            masks=torch.from_numpy(masks),
            # (B, H, W, 3) -> (B, 3, H, W)
            images=None if images is None else torch.from_numpy(images).permute(0, 3, 1, 2),
        )


class BatchOrder(Sampler[list[int]]):
    """Which samples make up which batch: a pure function of seed and epoch.

    Parameters
    ----------
    samples
        Number of samples in the store.
    batch_size
        Samples a batch.
    seed
        None: in the store's order. Else shuffled anew each epoch (:meth:`set_epoch`).
    drop_last
        Leave out a last batch that is not full.
    """

    def __init__(self, samples: int, batch_size: int, *, seed: int | None = None, drop_last: bool = False) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples // self.batch_size if self.drop_last else -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.samples)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.samples)
        for number in range(len(self)):
            yield order[number * self.batch_size : (number + 1) * self.batch_size].tolist()


def loader(
    store: FeatureStore,
    batch_size: int,
    *,
    seed: int | None = None,
    drop_last: bool = False,
    images: bool = False,
    workers: int = 0,
) -> DataLoader[Batch]:
    """A loader of :class:`Batch`; call ``loader.batch_sampler.set_epoch(epoch)`` before each epoch.

    Parameters
    ----------
    store, batch_size, seed, drop_last, images
        See :class:`FeatureDataset` and :class:`BatchOrder`.
    workers
        Worker processes. The order and the contents do not depend on it.
    """
    return DataLoader(
        FeatureDataset(store, images=images),
        batch_sampler=BatchOrder(len(store), batch_size, seed=seed, drop_last=drop_last),
        collate_fn=_as_it_is,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),  # else every epoch would draw from the global one, which dropout uses
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch
