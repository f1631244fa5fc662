"""Feature augmentation: transformations of real and added features, right before the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from stages.augment.base import Labelled
from stages.segmentation.transforms import augment


def augment_features(
    policy: Sequence[str], batches: list[Labelled], rng: torch.Generator
) -> list[Labelled]:
    """Transform the features of batches together with their masks.

    Parameters
    ----------
    policy
        Names in :data:`stages.segmentation.transforms.TRANSFORMS`; none: nothing is changed.
    batches
        Real and added features.
    rng
        Source of all random numbers, on the features' device.
    """
    return [_augment(policy, batch, rng) for batch in batches] if policy else batches


def _augment(policy: Sequence[str], batch: Labelled, rng: torch.Generator) -> Labelled:
    state, features, targets = rng.get_state(), batch.features, []
    for masks, fraction in batch.targets:  # each mask is transformed as the features are
        rng.set_state(state)
        (features,), transformed = augment([batch.features], masks, policy, rng)
        targets.append((transformed, fraction))
    return replace(batch, features=features, targets=targets)
