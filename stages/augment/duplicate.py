"""The same real features again: the control for every augmenter.

The decoder sees as many samples as with the augmenter that it is compared with.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self, override

from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, SourceConfig, repeat_real


class DuplicateConfig(SourceConfig):
    """Number of copies of the real batch."""

    augmenter: Literal["duplicate"]
    ratio: int = Field(1, ge=1, le=16, description="copies of the batch")

    @model_validator(mode="after")
    def _adds_to_the_end(self) -> Self:
        if self.until < 1:
            raise ValueError(
                "until has no effect on duplicate, whose added batches are real; remove it"
            )
        return self

    @property
    @override
    def added_weights(self) -> tuple[float, ...]:
        return (self.weight,) * self.ratio


class Duplicate(Augmenter):
    """Adds the real batch again, ``ratio`` times."""

    @override
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        return repeat_real(batch, self.config.added_weights)
