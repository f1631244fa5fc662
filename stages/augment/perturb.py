"""Changes of real and added features alike, right before the decoder: one augmenter on top of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from stages.augment.base import Labelled
from stages.segmentation.transforms import augment


def perturb(policy: Sequence[str], parts: list[Labelled], rng: torch.Generator) -> list[Labelled]:
    """Every part with the transformations of ``policy`` (:mod:`stages.segmentation.transforms`) done to its features and its masks."""
    return [_perturbed(policy, part, rng) for part in parts] if policy else parts


def _perturbed(policy: Sequence[str], part: Labelled, rng: torch.Generator) -> Labelled:
    state, features, targets = rng.get_state(), part.features, []
    for masks, share in part.targets:  # all masks of a part undergo what its features do
        rng.set_state(state)
        (features,), changed = augment([part.features], masks, policy, rng)
        targets.append((changed, share))
    return replace(part, features=features, targets=targets)
