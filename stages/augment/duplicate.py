"""The same real features once more: the control for every augmenter, because the decoder sees as many samples as theirs."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, SourceConfig, repeat_real


class DuplicateConfig(SourceConfig):
    """Variants ``duplicate*``."""

    augmenter: Literal["duplicate"]
    ratio: int = Field(default=1, ge=1, le=16)  # copies of the batch

    @model_validator(mode="after")
    def _adds_to_the_end(self) -> Self:
        if self.until < 1:
            raise ValueError(
                "until does nothing here: the real batches that would take the copies' place are the copies; leave it out"
            )
        return self

    @property
    def added_batches(self) -> int:
        """The copies."""
        return self.ratio


class Duplicate(Augmenter):
    """Real features again."""

    def __init__(self, config: DuplicateConfig, context: Context) -> None:
        super().__init__(config, context)
        self.ratio, self.weight = config.ratio, config.weight

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """The batch itself, ``ratio`` times."""
        return repeat_real(batch, [self.weight] * self.ratio)
