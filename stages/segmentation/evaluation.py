"""Predictions and scores of a decoder on cached features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, pairwise
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F

from featurestore import VOID, FeatureStore, SpecMismatchError
from featurestore.dataset import Batch
from stages.common.windows import TILE, Corner, Grid, split_id
from stages.models.decoder import Decoder
from stages.segmentation.joining import join
from stages.segmentation.metrics import Scores, confusion_matrices, confusion_matrix, score

SAMPLES = 8  # whose logits a GPU upsamples at a time


def predict(accelerator: Accelerator, decoder: Decoder, batch: Batch) -> Tensor:
    """Predict the class of each mask pixel of a batch.

    Logits are upsampled in float32, as a decoder in use does: in bfloat16 a pixel in a thousand has
    two highest logits. A few samples are upsampled at a time, because the logits of a whole batch
    at the masks' size may take gigabytes. A CPU upsamples one sample, which fits into its caches.

    Returns
    -------
    Tensor
        (B, H, W) int64.
    """
    logits, size = _logits(accelerator, decoder, batch), tuple(batch.masks.shape[-2:])
    upsampled = (
        F.interpolate(samples.float(), size, mode="bilinear", align_corners=False)
        for samples in logits.split(1 if logits.device.type == "cpu" else SAMPLES)
    )
    return torch.cat([samples.argmax(1) for samples in upsampled])


@torch.no_grad()
def _logits(accelerator: Accelerator, decoder: Decoder, batch: Batch) -> Tensor:
    """Compute logits (B, K, h, w) in the precision of the training."""
    features = batch.features.float().contiguous(memory_format=torch.channels_last)
    with accelerator.autocast():
        logits: Tensor = decoder(features)
    return logits


def evaluate(
    accelerator: Accelerator, decoder: Decoder, batches: Iterable[Batch], store: FeatureStore
) -> Scores:
    """Score a decoder on a whole split; each process reads a fraction of the samples.

    Windows of an image (``extract.resize: tile``) are joined, and each pixel of the image counts
    once.

    Parameters
    ----------
    accelerator, decoder
        Device, precision and processes; the decoder.
    batches
        Samples of the store, without views. One process reads all windows of an image, in order.
    store
        The store.

    Raises
    ------
    ValueError
        When no pixel has a label.
    SpecMismatchError
        When the store does not hold the windows of an image one after the other.
    """
    classes = store.spec.num_classes
    total = torch.zeros(classes, classes, dtype=torch.int64, device=accelerator.device)
    for _, matrices in _confusions(accelerator, decoder, batches, store):
        total += matrices.sum(0)
    return score(accelerator.reduce(total, "sum"), store.spec.class_names)


def evaluate_images(
    accelerator: Accelerator, decoder: Decoder, batches: Iterable[Batch], store: FeatureStore
) -> dict[str, list[int]]:
    """Compute the confusion matrix of every image; arguments and errors as of :func:`evaluate`.

    Returns
    -------
    dict
        By name of the image, in the order of the store: the entries above 0 of its matrix as
        ``true, predicted, pixels, true, ...``.
    """
    entries: list[tuple[int, list[int]]] = []
    for positions, matrices in _confusions(accelerator, decoder, batches, store):
        for position, matrix in zip(positions, matrices.cpu(), strict=True):
            counts = torch.cat([matrix.nonzero(), matrix[matrix > 0][:, None]], 1)  # (n, 3)
            entries.append((position, counts.flatten().tolist()))
    ids, rule = store.ids, store.spec.resize
    return {
        split_id(ids[position], rule)[0]: counts
        for position, counts in sorted(gather_object(entries))
    }


def _confusions(
    accelerator: Accelerator, decoder: Decoder, batches: Iterable[Batch], store: FeatureStore
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Yield confusion matrices (n, K, K) of images, and the positions of their first samples."""
    decoder.eval()
    # A last, small batch leaves some processes without samples.
    batches, classes = filter(len, batches), store.spec.num_classes
    if store.spec.resize != TILE:
        for batch in batches:
            predicted = predict(accelerator, decoder, batch)
            yield batch.positions.tolist(), confusion_matrices(predicted, batch.masks, classes)
        return
    corners, names = _corners(store), [split_id(id, TILE)[0] for id in store.ids]
    windows = (
        _Window(*window)
        for batch in batches
        for window in zip(
            batch.positions.tolist(),
            _logits(accelerator, decoder, batch),
            batch.masks,
            strict=True,
        )
    )
    for name, image in groupby(windows, lambda window: names[window.position]):
        yield _joined_confusion(image, corners[name], classes)


# -- windows ---------------------------------------------------------------------------------------


class _Window(NamedTuple):
    """A sample that is a window of an image."""

    position: int
    logits: Tensor  # (K, h, w)
    mask: Tensor  # (H, W)


def _corners(store: FeatureStore) -> dict[str, list[Corner]]:
    """Find the corners of the stored windows of each image.

    Raises
    ------
    SpecMismatchError
        When other samples stand between the windows of an image, or these are not row by row.
    """
    ids = store.ids
    corners: dict[str, list[Corner]] = {}
    places = [split_id(ids[position], TILE) for position in store.positions("identity").tolist()]
    for name, group in groupby(places, lambda place: place[0]):
        stored = [corner for _, corner in group]
        if name in corners or any(after <= before for before, after in pairwise(stored)):
            message = f"does not hold the windows of {name} row by row; extract it again"
            raise SpecMismatchError(message, path=store.path)
        corners[name] = stored
    return corners


def _joined_confusion(
    windows: Iterator[_Window], corners: list[Corner], classes: int
) -> tuple[list[int], Tensor]:
    """Join the windows of an image as ``predict`` does, and compute its confusion matrix.

    A window that is not stored has no label: its logits do not matter. One row of windows is in
    memory, and the mask of the image.

    Returns
    -------
    tuple
        Position of the first window, and matrix (1, K, K).
    """
    first = next(windows)
    windows, (height, width) = chain([first], windows), first.mask.shape
    grid, moved = Grid.spanned_by(corners, (height, width))
    truth, stored = first.mask.new_full(grid.size, VOID), set(moved)

    def logits() -> Iterator[Tensor]:
        for top, left in grid.corners():
            if (top, left) in stored:
                window = next(windows)
                truth[top : top + height, left : left + width] = window.mask
                yield window.logits
            else:
                yield torch.zeros_like(first.logits)

    confusion, done = torch.zeros(classes, classes, dtype=torch.int64, device=truth.device), 0
    for band in join(grid, logits(), size=grid.size, probabilities=False):
        rows = truth[done : done + band.shape[1]]
        confusion += confusion_matrix(band.max(0).indices, rows, classes)
        done += len(rows)
    return [first.position], confusion[None]
