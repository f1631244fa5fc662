"""No augmentation: the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stages.augment.base import Augmented


class NoAugmenter:
    """Real features alone."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.needs_images = False
        self.modules: list[nn.Module] = []

    def augment(self, features: Tensor, masks: Tensor, images: Tensor | None, rng: torch.Generator) -> Augmented:
        """Nothing more."""
        return Augmented(features=[])

    def backward(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Gradients for the decoder."""
        self.accelerator.backward(loss, inputs=parameters)

    def state(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
