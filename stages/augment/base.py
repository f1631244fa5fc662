"""What every augmenter does: give the decoder more to learn from than the features of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from featurestore import FeatureStore
from featurestore.dataset import Batch
from stages.common.config import Config, Once
from stages.common.runtime import Machine
from stages.models.decoder import Decoder
from stages.models.feature_generator import FeatureGenerator
from stages.segmentation.transforms import Transform


class VariantConfig(Config):
    """What every entry of section ``variants`` may say; each augmenter adds keys of its own."""

    augmenter: str
    perturb: Annotated[tuple[Transform, ...], Field(strict=False), Once] = ()
    view: Literal["identity", "random"] = "identity"  # random: mirrored or not, by chance
    statistics: Literal["all", "real"] = "all"  # batches that update running BatchNorm statistics
    until: float = Field(default=1.0, gt=0, le=1)  # fraction of the steps that add features

    @model_validator(mode="after")
    def _adds_batches(self) -> Self:
        for key in ("until", "statistics"):
            default = VariantConfig.model_fields[key].default
            if getattr(self, key) != default and not self.added_batches:
                raise ValueError(f"{key} applies only to variants that add batches; remove it")
        return self

    @property
    def needs_gan(self) -> bool:
        """Whether training reads what ``train-gan`` wrote."""
        return False

    @property
    def added_batches(self) -> int:
        """Number of batches that the decoder sees in addition to each real one."""
        return 0

    @property
    def added_weights(self) -> tuple[float, ...]:
        """Weight of each added batch in the loss; a real batch weighs 1."""
        return ()

    @property
    def needs_mirrored(self) -> bool:
        """Whether training reads features of mirrored images."""
        return self.view == "random"

    @property
    def needs_classes(self) -> int:
        """Least number of classes in a data set for this variant."""
        return 2

    @property
    def needs_family(self) -> str | None:
        """Only family of generators that this variant works with; None: any."""
        return None


class SourceConfig(VariantConfig):
    """Keys of the augmenters that add features."""

    weight: float = Field(default=1.0, gt=0)  # of the added cross-entropy; the real one weighs 1

    @property
    def added_batches(self) -> int:
        """Number of batches that the decoder sees in addition to each real one."""
        return 1

    @property
    def added_weights(self) -> tuple[float, ...]:
        """Weight of each added batch in the loss."""
        return (self.weight,) * self.added_batches


@dataclass
class Labelled:
    """Features with the masks that the decoder should predict from them.

    Attributes
    ----------
    features
        (B, C, h, w) in the backbone's scale.
    targets
        Masks (B, H, W) uint8, each with its fraction of the loss.
    weight
        Weight of the loss; real features weigh 1.
    """

    features: Tensor
    targets: list[tuple[Tensor, float]]
    weight: float = 1.0

    @classmethod
    def of(cls, batch: Batch, weight: float = 1.0) -> Self:
        """Take the real features of a batch with their own masks."""
        return cls(batch.features, [(batch.masks, 1.0)], weight)


@dataclass
class Augmented:
    """What an augmenter adds to a batch.

    Attributes
    ----------
    batches
        Added features with their masks, any number of batches.
    terms
        Losses to log by name, detached.
    loss
        Loss that is added to the decoder's.
    parameters
        Parameters that the sum trains, in addition to the decoder's.
    separate_losses
        Losses that are back-propagated before the sum, each with the parameters that it trains.
    optimizers
        Optimizers that step together with the decoder's.
    """

    batches: list[Labelled] = field(default_factory=list)
    terms: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    parameters: Sequence[nn.Parameter] = ()
    separate_losses: Sequence[tuple[Tensor, Sequence[nn.Parameter]]] = ()
    optimizers: Sequence[torch.optim.Optimizer] = ()


def repeat_real(batch: Batch, weights: Sequence[float]) -> Augmented:
    """Repeat the real batch once for each weight."""
    return Augmented([Labelled.of(batch, weight) for weight in weights])


def read_samples(
    store: FeatureStore, positions: Sequence[int] | np.ndarray, device: torch.device, weight: float
) -> Labelled:
    """Read real samples of a store at ``positions`` (S,), with their masks."""
    features = torch.from_numpy(store.gather("features", positions)).to(device).float()
    masks = torch.from_numpy(store.gather("masks", positions)).to(device)
    return Labelled(features, [(masks, 1.0)], weight)


@dataclass(frozen=True)
class Context:
    """What augmenters are built from.

    Attributes
    ----------
    variant
        Name of the variant.
    accelerator
        The training's accelerator.
    store
        Training features.
    decoder
        The network in training.
    gan
        Folder that ``train-gan`` wrote.
    seed, steps
        Seed of the training, and its total number of steps.
    machine
        How this machine computes.
    """

    variant: str
    accelerator: Accelerator
    store: FeatureStore
    decoder: Decoder
    gan: Path
    seed: int
    steps: int
    machine: Machine

    @property
    def positions(self) -> np.ndarray:
        """Positions (N,) of the training samples in the store, mirrored views left out."""
        return self.store.positions("identity")

    def key(self, name: str) -> str:
        """Name a parameter of this variant as it is written in params.yaml."""
        return f"variants.{self.variant}.{name}"


# (B, A, h, w) inputs of the last convolution, (B, K, h, w) logits, that convolution -> logits.
LogitAdjustment = Callable[[Tensor, Tensor, nn.Conv2d], Tensor]


class Augmenter:
    """Adds nothing: the baseline, and the base class of all others.

    Attributes
    ----------
    needs_images
        Whether :meth:`augment` reads the images of a batch.
    shares_noise
        Whether all processes of a training get the same random numbers, because the augmenter
        divides them itself.
    modules
        Networks that it trains, as the accelerator wraps them.
    monitored
        Returns the generator that it trains, for the monitor; None: it trains none.
    """

    needs_images: bool = False
    shares_noise: bool = False
    modules: Sequence[nn.Module] = ()
    monitored: Callable[[], FeatureGenerator] | None = None

    def __init__(self, config: VariantConfig, context: Context) -> None:
        self.config = config
        self.accelerator = context.accelerator
        self.spec = context.store.spec

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """Add features, and losses, to a batch.

        Parameters
        ----------
        batch
            Real features (B, C, h, w) float32 and masks (B, H, W).
        rng
            Source of all random numbers, on the features' device.
        """
        return Augmented()

    def adjust_logits(self, masks: Tensor) -> LogitAdjustment | None:
        """Return how to change the logits of real features in training; masks (B, H, W)."""
        return None

    def after_step(self, added: Augmented) -> None:
        """Advance, after the optimizers took a step on what :meth:`augment` added."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""

    def save(self, out: Path) -> None:
        """Write trained networks beside the decoder in ``out``; all processes call it."""
