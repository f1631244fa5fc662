"""What every augmenter does: give the decoder more features for the masks of a batch."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Gives more features, and back-propagates the decoder's loss, because it may learn from it too.

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

    def backward(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Gradients of the decoder's loss for the decoder's parameters; and the augmenter's own update, if it learns.

        The decoder's optimizer steps afterwards.
        """

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
