"""The samples of a store: views of images, or of windows of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from featurestore import VOID
from featurestore.prefetch import prefetch
from stages.common.errors import DataError
from stages.common.runtime import first_process
from stages.common.windows import TILE, Corner, Grid, window_id
from stages.data.images import fill_up, read_bytes
from stages.data.manifest import Classes, Entry, read_original
from stages.data.masks import decode_mask
from stages.data.views import make_view


class Sample(NamedTuple):
    """A view of an image, or of the window whose first row and column are ``corner``."""

    entry: Entry
    view: str
    corner: Corner | None = None

    @property
    def id(self) -> str:
        """Id in the store: the image's, with the corner of a window."""
        return self.entry.id if self.corner is None else window_id(self.entry.id, self.corner)

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What its bytes depend on: id, sha256 of image and mask, view."""
        return self.id, self.entry.image_sha256, self.entry.mask_sha256, self.view


def list_samples(
    entries: Sequence[Entry], views: Iterable[str], *, size: tuple[int, int], rule: str
) -> list[Sample]:
    """List the samples of a split, view by view; windows of an image follow each other.

    Parameters
    ----------
    entries, views
        Images, and names of stored views.
    size, rule
        (H, W) of the samples, and how images get this size.
    """
    if rule != TILE:
        return [Sample(entry, view) for view in views for entry in entries]
    grids = [(entry, Grid.over((entry.height, entry.width), size)) for entry in entries]
    return [
        Sample(entry, view, corner)
        for view in views
        for entry, grid in grids
        for corner in grid.corners()
    ]


def labelled_windows(
    samples: Sequence[Sample], classes: Classes, *, size: tuple[int, int], workers: int
) -> list[Sample]:
    """Leave out the windows of (H, W) without a labelled pixel, and say how many they are.

    All masks are read.
    """
    entries = list(dict.fromkeys(sample.entry for sample in samples))
    labelled = prefetch(partial(_labelled, classes=classes, size=size), entries, workers=workers)
    corners = dict(zip(entries, labelled, strict=True))
    kept = [sample for sample in samples if sample.corner in corners[sample.entry]]
    if first_process() and len(kept) < len(samples):
        tqdm.write(
            f"extract: {len(samples) - len(kept)} of {len(samples)} training windows have no"
            " labelled pixel and are left out"
        )
    return kept


def _labelled(entry: Entry, classes: Classes, size: tuple[int, int]) -> set[Corner]:
    """Find the corners of an image's windows with a labelled pixel."""
    path = Path(entry.mask)
    mask = decode_mask(
        read_bytes(path, "mask"),
        path,
        num_classes=len(classes.names),
        void_index=classes.void_index,
    )
    grid = Grid.over((entry.height, entry.width), size)
    return {corner for corner in grid.corners() if (grid.cut(mask, corner) != VOID).any()}


def read_samples(
    samples: Sequence[Sample], *, classes: Classes, seed: int, size: tuple[int, int], rule: str
) -> Iterable[tuple[Sample, np.ndarray, np.ndarray]]:
    """Read samples of one image, which is decoded once.

    Parameters
    ----------
    samples
        Samples of the image.
    classes
        Classes of its mask.
    seed, size, rule
        See :func:`stages.data.views.make_view`.

    Returns
    -------
    iterable
        Sample, pixels (H, W, 3) uint8 and labels (H, W) uint8. Windows are cut when they are taken:
        together they may be larger than the image.

    Raises
    ------
    DataError
        When a file is missing, damaged, or changed since the prepare stage.
    """
    entry = samples[0].entry
    image, mask = read_original(entry, classes)
    make = partial(make_view, seed=seed)
    if rule != TILE:
        return [
            (each, *make(image, mask, id=each.id, view=each.view, size=size, rule=rule))
            for each in samples
        ]
    if mask.shape != (entry.height, entry.width):
        raise DataError(
            entry.image,
            f"is {image.width} x {image.height} pixels, but the manifest says {entry.width} x"
            f" {entry.height}; run the prepare stage again",
            expected=(entry.height, entry.width),
            actual=mask.shape,
        )
    grid = Grid.over(mask.shape, size)

    def windows() -> Iterator[tuple[Sample, np.ndarray, np.ndarray]]:
        for each in samples:
            assert each.corner is not None
            (top, left), labels = each.corner, grid.cut(mask, each.corner)
            height, width = labels.shape
            pixels, labels = make(
                image.crop((left, top, left + width, top + height)),
                labels,
                id=each.id,
                view=each.view,
                size=labels.shape,
                rule="stretch",  # a view keeps the window's scale, but for a crop
            )
            yield each, fill_up(pixels, size), fill_up(labels, size, VOID)

    return windows()
