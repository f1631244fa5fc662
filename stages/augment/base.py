"""What every augmenter does: give the decoder more features for the masks of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass
class Augmented:
    """More features for a batch.

    Attributes
    ----------
    features
        Any number of (B, C, h, w), in the backbone's scale; each belongs to the batch's masks.
    weight
        Of each one's cross-entropy, beside the 1 of the real features.
    terms
        Losses to log, by name, detached.
    """

    features: list[Tensor]
    weight: float = 1.0
    terms: dict[str, Tensor] = field(default_factory=dict)


class Augmenter(Protocol):
    """Gives more features, and makes the decoder's update, because it may learn from the same loss.

    Attributes
    ----------
    needs_images
        Whether :meth:`augment` wants the photographs.
    modules
        Networks that it trains, as the accelerator wraps them.
    """

    needs_images: bool
    modules: list[nn.Module]

    def augment(self, features: Tensor, masks: Tensor, images: Tensor | None, rng: torch.Generator) -> Augmented:
        """More features for real ones (B, C, h, w), masks (B, H, W) uint8 and images (B, 3, H, W) uint8 or None."""

    def update(self, loss: Tensor, decoder: torch.optim.Optimizer) -> None:
        """Back-propagate the decoder's loss and step its optimizer; and the augmenter's own, if it learns."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
