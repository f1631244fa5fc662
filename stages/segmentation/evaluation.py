"""Predictions and scores of a decoder on cached features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F

from featurestore.dataset import Batch
from stages.models.decoder import Decoder
from stages.segmentation.metrics import Scores, confusion_matrices, confusion_matrix, score

SAMPLES = 8  # whose logits a GPU upsamples at a time


@torch.no_grad()
def predict(accelerator: Accelerator, decoder: Decoder, batch: Batch) -> Tensor:
    """Predict the class of each mask pixel of a batch.

    Logits are upsampled in float32, as a decoder in use does: in bfloat16 a pixel in a thousand has
    two highest logits. A few samples are upsampled at a time, because the logits of a whole batch
    at the masks' size may take gigabytes; on a CPU one, which fits into its caches.

    Returns
    -------
    Tensor
        (B, H, W) int64.
    """
    features = batch.features.float().contiguous(memory_format=torch.channels_last)
    size = tuple(batch.masks.shape[-2:])
    with accelerator.autocast():
        logits = decoder(features)
    upsampled = (
        F.interpolate(samples.float(), size, mode="bilinear", align_corners=False)
        for samples in logits.split(1 if logits.device.type == "cpu" else SAMPLES)
    )
    return torch.cat([samples.argmax(1) for samples in upsampled])


def evaluate(
    accelerator: Accelerator,
    decoder: Decoder,
    batches: Iterable[Batch],
    class_names: tuple[str, ...],
) -> Scores:
    """Score a decoder on a whole split; each process reads its fraction of the batches."""
    decoder.eval()
    classes = len(class_names)
    total = torch.zeros(classes, classes, dtype=torch.int64, device=accelerator.device)
    for batch in filter(len, batches):  # a last, small batch leaves some processes without samples
        total += confusion_matrix(predict(accelerator, decoder, batch), batch.masks, classes)
    return score(accelerator.reduce(total, "sum"), class_names)


def evaluate_images(
    accelerator: Accelerator, decoder: Decoder, batches: Iterable[Batch], num_classes: int
) -> dict[int, list[int]]:
    """Compute the confusion matrix of every sample, by its position in the store.

    Returns
    -------
    dict
        The entries above 0 of each matrix as ``true, predicted, pixels, true, ...``.
    """
    decoder.eval()
    entries: list[tuple[int, list[int]]] = []
    for batch in filter(len, batches):
        predicted = predict(accelerator, decoder, batch)
        matrices = confusion_matrices(predicted, batch.masks, num_classes).cpu()
        for position, matrix in zip(batch.positions.tolist(), matrices, strict=True):
            counts = torch.cat([matrix.nonzero(), matrix[matrix > 0][:, None]], 1)  # (n, 3)
            entries.append((position, counts.flatten().tolist()))
    return dict(sorted(gather_object(entries)))
