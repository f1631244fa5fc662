"""Several augmenters of the same batch, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, LogitAdjustment, VariantConfig
from stages.common.runtime import generator as random_generator


class Combined(Augmenter):
    """What each of the members adds to the real features, and each one's change of the real features' scores.

    The update is the decoder's alone, so a member must not learn from the loss.
    """

    def __init__(
        self, config: VariantConfig, context: Context, members: Sequence[Augmenter]
    ) -> None:
        super().__init__(config, context)
        assert not any(member.modules for member in members)
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
        added = [
            member.augment(batch, draws).batches
            for member, draws in zip(self.members, own, strict=True)
        ]
        return Augmented([labelled for batches in added for labelled in batches])

    def adjust_logits(self, masks: Tensor) -> LogitAdjustment | None:
        """One change of the scores after the other; masks (B, H, W)."""
        changes = [
            change for member in self.members if (change := member.adjust_logits(masks)) is not None
        ]

        def all_of_them(embeddings: Tensor, scores: Tensor, last: nn.Conv2d) -> Tensor:
            for change in changes:
                scores = change(embeddings, scores, last)
            return scores

        return all_of_them if changes else None

    def after_step(self, added: Augmented) -> None:
        """All members'."""
        for member in self.members:
            member.after_step(added)

    def state_dict(self) -> dict[str, Any]:
        """All members'."""
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        for member, own in zip(self.members, state["members"], strict=True):
            member.load_state_dict(own)
