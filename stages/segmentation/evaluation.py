"""Scoring a decoder on cached features."""

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


@torch.no_grad()
def predict(accelerator: Accelerator, decoder: Decoder, batch: Batch) -> Tensor:
    """(B, H, W) int64 classes.

    Scores are interpolated in float32, as a decoder in use does it (in bfloat16 a pixel of a thousand has two highest ones),
    and one sample at a time: those of a whole batch at the masks' size may be gigabytes.
    """
    real, size = (
        batch.features.float().contiguous(memory_format=torch.channels_last),
        tuple(batch.masks.shape[-2:]),
    )
    with accelerator.autocast():
        scores = decoder(real)
    return torch.cat(
        [
            F.interpolate(one[None].float(), size, mode="bilinear", align_corners=False).argmax(1)
            for one in scores
        ]
    )


def evaluate(
    accelerator: Accelerator,
    decoder: Decoder,
    batches: Iterable[Batch],
    class_names: tuple[str, ...],
) -> Scores:
    """Scores of a decoder over a whole split, of which each process has its part."""
    decoder.eval()
    total = torch.zeros(
        len(class_names), len(class_names), dtype=torch.int64, device=accelerator.device
    )
    for batch in batches:
        if len(batch):  # a last batch of fewer samples than processes leaves some without
            total += confusion_matrix(
                predict(accelerator, decoder, batch), batch.masks, len(class_names)
            )
    return score(accelerator.reduce(total, "sum"), class_names)


def evaluate_images(
    accelerator: Accelerator, decoder: Decoder, batches: Iterable[Batch], num_classes: int
) -> dict[int, list[int]]:
    """The confusion matrix of every sample by its position in the store: its entries above 0 as ``true, predicted, pixels, true, ...``."""
    decoder.eval()
    found: list[tuple[int, list[int]]] = []
    for batch in batches:
        if not len(batch):
            continue
        matrices = confusion_matrices(
            predict(accelerator, decoder, batch), batch.masks, num_classes
        ).cpu()
        for position, matrix in zip(batch.positions.tolist(), matrices, strict=True):
            places = matrix.nonzero()  # (n, 2)
            found.append(
                (
                    position,
                    torch.cat([places, matrix[places[:, :1], places[:, 1:]]], 1).flatten().tolist(),
                )
            )
    return dict(sorted(gather_object(found)))
