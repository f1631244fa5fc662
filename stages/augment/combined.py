"""Several augmenters of the same batch, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featurestore.dataset import Batch
from stages.augment.base import Adjust, Augmented, Augmenter, Context, VariantConfig
from stages.common.runtime import generator as random_generator


class Combined(Augmenter):
    """What each of the members adds to the real features, and each one's change of the real features' scores.

    The update is the decoder's alone, so a member must not learn from the loss.
    """

    def __init__(
        self, config: VariantConfig, context: Context, members: Sequence[Augmenter]
    ) -> None:
        super().__init__(config, context)
        assert all(type(member).update is Augmenter.update for member in members)
        self.members = members
        self.needs_images = any(member.needs_images for member in members)

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """The members' parts in their order; the first draws what it would alone, the others apart from it and from each other."""
        own = [
            rng,
            *(
                random_generator(rng.device, rng.initial_seed(), number)
                for number in range(1, len(self.members))
            ),
        ]
        parts = [
            member.augment(batch, draws).parts
            for member, draws in zip(self.members, own, strict=True)
        ]
        return Augmented([part for some in parts for part in some])

    def adjust(self, masks: Tensor) -> Adjust | None:
        """One change of the scores after the other; masks (B, H, W)."""
        changes = [
            change for member in self.members if (change := member.adjust(masks)) is not None
        ]

        def all_of_them(embeddings: Tensor, scores: Tensor, last: nn.Conv2d) -> Tensor:
            for change in changes:
                scores = change(embeddings, scores, last)
            return scores

        return all_of_them if changes else None

    def advance(self) -> None:
        """All members'."""
        for member in self.members:
            member.advance()

    def state(self) -> dict[str, Any]:
        """All members'."""
        return {"members": [member.state() for member in self.members]}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        for member, own in zip(self.members, state["members"], strict=True):
            member.load_state(own)
