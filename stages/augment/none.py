"""No augmentation: the baseline."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stages.augment.base import Augmented
from stages.runtime import step_optimizers


class NoAugmenter:
    """Real features alone."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.needs_images = False
        self.modules: list[nn.Module] = []

    def augment(self, features: Tensor, masks: Tensor, images: Tensor | None, rng: torch.Generator) -> Augmented:
        """Nothing more."""
        return Augmented(features=[])

    def update(self, loss: Tensor, decoder: torch.optim.Optimizer) -> None:
        """The decoder's update alone."""
        self.accelerator.backward(loss)
        step_optimizers(self.accelerator, decoder)

    def state(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
