"""Self-training: unlabelled images, with the labels that a teacher predicts.

Noisy Student (Xie et al. 2020) trains decoders in rounds: the finished decoder of a round is the
teacher of the next one. Mean Teacher (Tarvainen and Valpola 2017) has one round; the teacher is an
average of the decoder in training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self, override

from featurestore.dataset import Batch
from stages.augment.base import (
    Augmented,
    Context,
    FeatureAugmenter,
    SourceConfig,
    State,
    VariantConfig,
)
from stages.common.runtime import generator as random_generator
from stages.models.average import AverageNetwork
from stages.models.decoder import Decoder


class SelfTrainingConfig(SourceConfig):
    """Which decoder is the teacher."""

    augmenter: Literal["self-training"]
    teacher: Literal["decoder", "ema"] = Field(
        "decoder", description="decoder: of the round before; ema: average of the decoder's weights"
    )
    rounds: int = Field(
        2, ge=1, le=10, description="further trainings, each with the last decoder as the teacher"
    )
    ema_decay: float = Field(
        0.99, gt=0, lt=1, description="decay of the average per step, at most 1 - 1 / step"
    )

    needs_stored_features: ClassVar[bool] = True
    needs_unlabelled: ClassVar[bool] = True

    @model_validator(mode="after")
    def _of_one_teacher(self) -> Self:
        unused = "rounds" if self.teacher == "ema" else "ema_decay"
        if unused in self.model_fields_set:
            raise ValueError(f"{unused} has no effect with teacher {self.teacher}; remove it")
        return self

    @property
    @override
    def teacher_rounds(self) -> int:
        return self.rounds if self.teacher == "decoder" else 0


def draw_labels(
    logits: Tensor, size: tuple[int, int], sources: Iterable[torch.Generator]
) -> Tensor:
    """Draw the class of each pixel from a teacher's distribution.

    The mean cross-entropy with drawn labels is the cross-entropy with the distribution itself, the
    soft labels. Drawn labels are masks, which every transform and loss takes.

    Parameters
    ----------
    logits
        (B, K, h, w).
    size
        (H, W) of the masks; the logits are upsampled bilinearly.
    sources
        Source of each sample's random numbers, on the logits' device.

    Returns
    -------
    Tensor
        (B, H, W) uint8.
    """
    masks = []
    for sample, rng in zip(logits.float().split(1), sources, strict=True):  # saves memory
        fine = F.interpolate(sample, size, mode="bilinear", align_corners=False)
        cumulated = fine.softmax(1).cumsum(1)[:, :-1]  # (1, K-1, H, W)
        uniform = torch.rand((1, 1, *size), generator=rng, device=logits.device)
        masks.append((uniform >= cumulated).sum(1, dtype=torch.uint8))
    return torch.cat(masks)


class SelfTraining(FeatureAugmenter):
    """Add a batch of unlabelled images with labels of the teacher, once there is one.

    The teacher sees the features unchanged. The decoder sees them as ``augment`` transforms them.
    """

    config: SelfTrainingConfig

    def __init__(self, config: VariantConfig, context: Context) -> None:
        super().__init__(config, context)
        self._teacher: AverageNetwork[Decoder] | None = None
        self._updates = 0  # of the average

    @property
    @override
    def noise_rank(self) -> int:
        return 0  # each sample has its own random numbers, whichever process has the sample

    @override
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        unlabelled = batch.unlabelled
        if self._teacher is None or unlabelled is None:
            return Augmented()
        with torch.no_grad(), self.accelerator.autocast():
            logits = self._teacher.module(unlabelled.features)
        height, width = unlabelled.masks.shape[-2:]
        first = self.accelerator.process_index * len(logits)  # row of the whole batch
        sources = (
            random_generator(logits.device, rng.initial_seed(), first + row)
            for row in range(len(logits))
        )
        return self.add(draw_labels(logits, (height, width), sources), unlabelled.features)

    @override
    def start_round(self) -> None:
        if self.config.teacher == "decoder":
            self._teacher = self._copy()

    @override
    def after_optimizer_step(self, added: Augmented) -> None:
        if self.config.teacher != "ema":
            return
        self._teacher = self._teacher or self._copy()
        self._updates += 1
        self._teacher.decay = min(self.config.ema_decay, 1 - 1 / self._updates)
        self._teacher.update(self.decoder, first=self._updates == 1)

    def _copy(self) -> AverageNetwork[Decoder]:
        teacher = AverageNetwork(self.decoder, self.config.ema_decay)
        teacher.module.eval()
        return teacher

    @override
    def state_dict(self) -> State:
        teacher = None if self._teacher is None else self._teacher.state_dict()
        return {"teacher": teacher, "updates": self._updates}

    @override
    def load_state_dict(self, state: State) -> None:
        self._updates = state["updates"]
        if state["teacher"] is not None:
            self._teacher = self._copy()
            self._teacher.load_state_dict(state["teacher"])
