"""Several augmenters of one batch, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, LogitAdjustment, State, VariantConfig
from stages.common.runtime import generator as random_generator


class Combined(Augmenter):
    """Adds what each of its members adds, and adjusts the logits as each of them does.

    Members must not train networks: only the decoder is updated.
    """

    def __init__(
        self, config: VariantConfig, context: Context, members: Sequence[Augmenter]
    ) -> None:
        super().__init__(config, context)
        assert not any(member.modules for member in members)
        self.members = members
        self.needs_images = any(member.needs_images for member in members)

    @override
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        # The first member draws as it does without the others, each other one from its own source.
        seed, others = rng.initial_seed(), range(1, len(self.members))
        sources = [rng, *(random_generator(rng.device, seed, number) for number in others)]
        members = zip(self.members, sources, strict=True)
        added = [member.augment(batch, source).batches for member, source in members]
        return Augmented([labelled for batches in added for labelled in batches])

    @override
    def adjust_logits(self, masks: Tensor) -> LogitAdjustment | None:
        adjustments = [member.adjust_logits(masks) for member in self.members]

        def adjust(embeddings: Tensor, logits: Tensor, last: nn.Conv2d) -> Tensor:
            for adjustment in filter(None, adjustments):
                logits = adjustment(embeddings, logits, last)
            return logits

        return adjust if any(adjustments) else None

    @override
    def after_optimizer_step(self, added: Augmented) -> None:
        for member in self.members:
            member.after_optimizer_step(added)

    @override
    def state_dict(self) -> State:
        return {"members": [member.state_dict() for member in self.members]}

    @override
    def load_state_dict(self, state: State) -> None:
        for member, saved in zip(self.members, state["members"], strict=True):
            member.load_state_dict(saved)
