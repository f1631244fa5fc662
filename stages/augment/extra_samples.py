"""The samples that an augmenter needs beside a batch, for the loader to read ahead."""

from __future__ import annotations

import torch

from featurestore.dataset import ExtraSamples
from stages.augment.base import Augmenter


def extra_samples(
    augmenter: Augmenter, seed: int, micro_batches: int, epochs: int
) -> ExtraSamples | None:
    """Describe an augmenter's extra samples to the loader; None where it needs none.

    Parameters
    ----------
    augmenter
        Chooses them, for each micro-batch.
    seed
        Of the training.
    micro_batches
        Number of micro-batches of a batch.
    epochs
        Number of epochs, from the first on, in which extra samples are read.
    """
    if not augmenter.extra_batches:
        return None
    cpu = torch.device("cpu")

    def choose(epoch: int, index: int, positions: list[int]) -> list[int]:
        size, chosen = len(positions) // micro_batches, []
        for number in range(micro_batches if epoch < epochs else 0):
            rng = augmenter.rng(cpu, seed, epoch, index, number)
            chunk = positions[number * size : (number + 1) * size]
            chosen += augmenter.extra_positions(chunk, rng)
        return chosen

    return ExtraSamples(augmenter.extra_sources, choose)
