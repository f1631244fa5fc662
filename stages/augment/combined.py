"""Several augmenters of one batch, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
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
        self.extra_batches = sum(member.extra_batches for member in members)
        self.extra_sources = np.concatenate([member.extra_sources for member in members])

    def _sources(self, rng: torch.Generator) -> list[torch.Generator]:
        """Return each member's source of random numbers; the first draws as it does alone."""
        seed, others = rng.initial_seed(), range(1, len(self.members))
        return [rng, *(random_generator(rng.device, seed, number) for number in others)]

    @override
    def extra_positions(self, positions: list[int], rng: torch.Generator) -> list[int]:
        members = zip(self.members, self._sources(rng), strict=True)
        return [
            position
            for member, source in members
            for position in member.extra_positions(positions, source)
        ]

    @override
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        added, first = Augmented(), 0
        for member, source in zip(self.members, self._sources(rng), strict=True):
            last = first + member.extra_batches * len(batch)
            extra = batch.extra[first:last] if batch.extra is not None else None
            added.batches += member.augment(replace(batch, extra=extra), source).batches
            first = last
        return added

    @override
    def adjust_logits(self, masks: Tensor) -> LogitAdjustment | None:
        adjustments = [member.adjust_logits(masks) for member in self.members]

        def adjust(embeddings: Tensor, logits: Tensor, last: nn.Conv2d) -> Tensor:
            for adjustment in filter(None, adjustments):
                logits = adjustment(embeddings, logits, last)
            return logits

        return adjust if any(adjustments) else None

    @override
    def start_round(self) -> None:
        for member in self.members:
            member.start_round()

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
