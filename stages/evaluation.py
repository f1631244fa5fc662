"""Scoring a decoder on cached features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator

from featurestore.dataset import Batch
from stages.metrics import Scores, confusion_matrix, score
from stages.models.decoder import Decoder


@torch.no_grad()
def evaluate(accelerator: Accelerator, decoder: Decoder, batches: Iterable[Batch], class_names: tuple[str, ...]) -> Scores:
    """Scores of a decoder over a whole split, of which each process has its part."""
    decoder.eval()
    total = torch.zeros(len(class_names), len(class_names), dtype=torch.int64, device=accelerator.device)
    for batch in batches:
        if not len(batch):  # a last batch of fewer samples than processes
            continue
        real = batch.features.float().contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            logits = decoder(real, tuple(batch.masks.shape[-2:]))
        total += confusion_matrix(logits.argmax(1), batch.masks, len(class_names))
    return score(accelerator.reduce(total, "sum"), class_names)
