"""What every augmenter does: give the decoder more to learn from than the features of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from featurestore import FeatureStore
from featurestore.dataset import Batch
from stages.common.config import Config, Listed, Once
from stages.common.runtime import step_optimizers
from stages.models.decoder import Decoder
from stages.segmentation.transforms import Transform


class VariantConfig(Config):
    """What every entry of section ``variants`` may say; each augmenter adds keys of its own."""

    augmenter: str
    augment: Annotated[tuple[Transform, ...], Listed, Once] = Field(
        (), description="transforms of real and added features, before the decoder"
    )
    view: Literal["identity", "random"] = Field(
        "identity", description="random: each real sample is mirrored with probability 0.5"
    )
    statistics: Literal["all", "real"] = Field(
        "all", description="batches in the decoder's running BatchNorm statistics"
    )
    until: float = Field(
        1.0, gt=0, le=1, description="fraction of the steps with added batches; then real ones"
    )

    @model_validator(mode="after")
    def _adds_batches(self) -> Self:
        for key in ("until", "statistics"):
            if (
                getattr(self, key) != VariantConfig.model_fields[key].default
                and not self.added_batches
            ):
                raise ValueError(f"{key} applies only to variants that add batches; remove it")
        return self

    @property
    def needs_gan(self) -> bool:
        """Whether it reads what ``train-gan`` wrote."""
        return False

    @property
    def added_batches(self) -> int:
        """How many the decoder sees beside each real one."""
        return 0

    @property
    def added_weights(self) -> tuple[float, ...]:
        """Of each of these batches, beside the 1 of the real one."""
        return ()

    @property
    def needs_mirrored(self) -> bool:
        """Whether it reads features of mirrored images."""
        return self.view == "random"

    @property
    def needs_classes(self) -> int:
        """How many classes a data set must have for it."""
        return 2

    @property
    def needs_family(self) -> str | None:
        """Which family of generators it works with alone."""
        return None


class SourceConfig(VariantConfig):
    """Of the augmenters that add features."""

    weight: float = Field(1.0, gt=0, description="weight of the added features' loss; real ones: 1")

    @property
    def added_batches(self) -> int:
        """One."""
        return 1

    @property
    def added_weights(self) -> tuple[float, ...]:
        """The same for all."""
        return (self.weight,) * self.added_batches


@dataclass
class Part:
    """Features and what the decoder should make of them.

    Attributes
    ----------
    features
        (B, C, h, w) in the backbone's scale.
    targets
        Masks (B, H, W) uint8, each with its share of the loss.
    weight
        Of the loss, beside the 1 of the real features.
    """

    features: Tensor
    targets: list[tuple[Tensor, float]]
    weight: float = 1.0


@dataclass
class Augmented:
    """What an augmenter adds to a batch.

    Attributes
    ----------
    parts
        Any number of them.
    terms
        Losses to log, by name, detached.
    """

    parts: list[Part] = field(default_factory=list)
    terms: dict[str, Tensor] = field(default_factory=dict)


def real_batches(batch: Batch, weights: Sequence[float]) -> Augmented:
    """The batch itself, once for each weight."""
    return Augmented([Part(batch.features, [(batch.masks, 1.0)], weight) for weight in weights])


def stored(
    store: FeatureStore, positions: Sequence[int] | np.ndarray, device: torch.device, weight: float
) -> Part:
    """Real samples (S,) of a store, and their masks."""
    features = torch.from_numpy(store.gather("features", positions)).to(device).float()
    return Part(
        features, [(torch.from_numpy(store.gather("masks", positions)).to(device), 1.0)], weight
    )


@dataclass(frozen=True)
class Context:
    """What augmenters are made from.

    Attributes
    ----------
    variant
        Its name.
    accelerator
        Of the training.
    store, positions
        The training features: which samples of which store.
    decoder
        The network in training.
    gan
        Folder that ``train-gan`` wrote.
    seed, steps
        Of the training: its seed, and how many steps it takes in all.
    machine
        ``compile_networks`` and ``sharded``, see :class:`stages.gan.trainer.Trainer`.
    """

    variant: str
    accelerator: Accelerator
    store: FeatureStore
    positions: np.ndarray
    decoder: Decoder
    gan: Path
    seed: int
    steps: int
    machine: dict[str, bool]

    def key(self, name: str) -> str:
        """Where the parameters say this of the variant."""
        return f"variants.{self.variant}.{name}"


# What the last convolution reads (B, A, h, w), its scores (B, K, h, w), the convolution itself -> other scores (B, K, h, w).
Adjust = Callable[[Tensor, Tensor, nn.Conv2d], Tensor]


class Augmenter:
    """Adds nothing: the baseline, and the base of all others.

    It also makes the decoder's update, because an augmenter may learn from the same loss.

    Attributes
    ----------
    needs_images
        Whether :meth:`augment` wants the images.
    same_draws
        Whether the processes of a training are to give it the same random numbers, because it shares them out itself.
    modules
        Networks that it trains, as the accelerator wraps them.
    """

    needs_images = False
    same_draws: ClassVar[bool] = False
    modules: tuple[nn.Module, ...] = ()

    def __init__(self, config: VariantConfig, context: Context) -> None:
        self.accelerator = context.accelerator

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """More for a batch, whose features are float32; ``rng`` is the source of all randomness, on the features' device."""
        return Augmented()

    def adjust(self, masks: Tensor) -> Adjust | None:
        """How to change the scores of real features in training; masks (B, H, W)."""
        return None

    def update(self, loss: Tensor, decoder: torch.optim.Optimizer) -> None:
        """Back-propagate the decoder's loss and step its optimizer; and the augmenter's own, if it learns."""
        self.accelerator.backward(loss)
        step_optimizers(self.accelerator, decoder)
        self.advance()

    def advance(self) -> None:
        """Take note of a back-propagation; ``accelerator.sync_gradients`` says whether the decoder was updated by it."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
