"""Base classes of augmenters and their configurations, and what they give to the training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self, override

from featurestore import FeatureStore
from featurestore.dataset import Batch
from stages.common.config import Config, LayerName, Listed, Once
from stages.common.runtime import Machine
from stages.common.runtime import generator as random_generator
from stages.models.decoder import Decoder, Head
from stages.models.feature_generator import FeatureGenerator
from stages.segmentation import transforms
from stages.segmentation.class_statistics import ClassStatistics
from stages.segmentation.folds import Folds
from stages.segmentation.image_transforms import ImageTransform
from stages.segmentation.regions import Regions
from stages.segmentation.transforms import Transform
from stages.training.update import Loss

FOR_AUGMENTER, FOR_TRANSFORMS = 1, 2  # purposes of random numbers, a part of their seeds
State = dict[str, Any]  # what a resumed training restores: tensors and plain values


class DecoderOverrides(Config):
    """Keys of ``train_decoder`` that a variant may set for itself; default: as in that section."""

    decoder: Head | None = Field(None, description="head")
    layers: Annotated[tuple[LayerName, ...], Listed, Once] | None = Field(
        None, description="stored layers that the decoder reads"
    )
    width: int | None = Field(None, ge=1, description="channels of the head")
    lr: float | None = Field(None, gt=0, description="learning rate")
    backbone: Literal["frozen", "trained"] | None = Field(
        None, description="trained: images pass the backbone in every step"
    )
    backbone_lr: float | None = Field(None, ge=0, description="rate of a trained backbone")
    backbone_batchnorm: Literal["eval", "train"] | None = Field(
        None, description="BatchNorm of a trained backbone"
    )
    image_augment: Annotated[tuple[ImageTransform, ...], Listed, Once] | None = Field(
        None, description="image transforms of a trained backbone"
    )
    weight_decay: float | None = Field(None, ge=0, description="weight decay")
    dropout: float | None = Field(None, ge=0, lt=1, description="dropout of the head")


class VariantConfig(DecoderOverrides):
    """Keys of every entry of section ``variants``; each augmenter adds further keys."""

    augmenter: str = Field(description="what adds features, images or a loss to each step")
    augment: Annotated[tuple[Transform, ...], Listed, Once] = Field(
        (), description="transforms of real and added features, before the decoder"
    )
    view: Literal["identity", "random"] = Field(
        "identity", description="random: each real sample is one of its stored views"
    )
    statistics: Literal["all", "real"] = Field(
        "all", description="batches that update BatchNorm's running statistics"
    )
    until: float = Field(
        1.0,
        gt=0,
        le=1,
        description="fraction of the steps with added batches; afterwards: real ones",
    )

    @model_validator(mode="after")
    def _adds_batches(self) -> Self:
        for key in ("until", "statistics"):
            default = VariantConfig.model_fields[key].default
            if getattr(self, key) != default and not self.added_batches:
                raise ValueError(f"{key} applies only to variants that add batches; remove it")
        return self

    @property
    def members(self) -> tuple[VariantConfig, ...]:
        """Variants that this one combines."""
        return ()

    @property
    def needs_gan(self) -> bool:
        """Whether training reads what ``train-gan`` wrote."""
        return any(member.needs_gan for member in self.members)

    @property
    def listed(self) -> Literal["variants", "unlabelled_variants", "gan_variants"]:
        """List of section ``compare`` that names it, by what its training reads."""
        if self.needs_gan:
            return "gan_variants"
        return "unlabelled_variants" if self.needs_unlabelled else "variants"

    @property
    def added_batches(self) -> int:
        """Number of batches that the decoder sees in addition to each real one."""
        return len(self.added_weights)

    def augmented_epochs(self, epochs: int) -> int:
        """Count the epochs in which batches are added, and a joint GAN learns."""
        return math.ceil(round(self.until * epochs, 6))  # 55.000000000000006 is 55

    @property
    def added_weights(self) -> tuple[float, ...]:
        """Weight of each added batch in the loss; a real batch weighs 1."""
        return tuple(weight for member in self.members for weight in member.added_weights)

    @property
    def needs_mirrored(self) -> bool:
        """Whether training adds features of mirrored images."""
        return any(member.needs_mirrored for member in self.members)

    @property
    def needs_stored_features(self) -> bool:
        """Whether training reads stored features beside those of the batch."""
        return any(member.needs_stored_features for member in self.members)

    @property
    def needs_unlabelled(self) -> bool:
        """Whether training reads unlabelled images."""
        return any(member.needs_unlabelled for member in self.members)

    @property
    def teacher_rounds(self) -> int:
        """Further trainings, each with the decoder of the one before as a teacher."""
        return max((member.teacher_rounds for member in self.members), default=0)

    @property
    def needs_classes(self) -> int:
        """Least number of classes in a data set for this variant."""
        return max((member.needs_classes for member in self.members), default=2)

    @property
    def needs_family(self) -> tuple[str, ...]:
        """Families of generators that this variant works with; empty: all."""
        return next((each.needs_family for each in self.members if each.needs_family), ())


class SourceConfig(VariantConfig):
    """Keys of the augmenters that add features."""

    weight: float = Field(1.0, gt=0, description="weight of the added features' loss; real ones: 1")

    @property
    @override
    def added_weights(self) -> tuple[float, ...]:
        return (self.weight,)


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
        """Label the real features of a batch with its masks."""
        return cls(batch.features, [(batch.masks, 1.0)], weight)

    @property
    def masks(self) -> Tensor:
        """Masks (B, H, W) uint8 of features with one target."""
        return self.targets[0][0]


@dataclass
class Augmented:
    """What an augmenter adds to a batch.

    Attributes
    ----------
    batches
        Added features with their masks, any number of batches.
    terms
        Losses to log by name, detached.
    generator_loss
        Loss of a generator in training; it is added to the decoder's.
    generator_parameters
        Parameters that the sum trains, in addition to the decoder's.
    discriminator_losses
        Losses that are back-propagated before the sum, each with the parameters that it trains.
    optimizers
        Optimizers that step together with the decoder's.
    """

    batches: list[Labelled] = field(default_factory=list)
    terms: dict[str, Tensor] = field(default_factory=dict)
    generator_loss: Tensor | None = None
    generator_parameters: Sequence[nn.Parameter] = ()
    discriminator_losses: Sequence[Loss] = ()
    optimizers: Sequence[torch.optim.Optimizer] = ()

    def losses_with_parameters(
        self, loss: Tensor, parameters: Sequence[nn.Parameter]
    ) -> list[Loss]:
        """List what to back-propagate, in this order, each loss with the parameters it trains.

        Parameters
        ----------
        loss
            The decoder's, of real and added features.
        parameters
            What it trains, beside :attr:`generator_parameters`.
        """
        if self.generator_loss is not None:
            loss = self.generator_loss + loss
        return [*self.discriminator_losses, (loss, [*parameters, *self.generator_parameters])]


def repeat_real(batch: Batch, weights: Sequence[float]) -> Augmented:
    """Repeat the real batch once for each weight."""
    return Augmented([Labelled.of(batch, weight) for weight in weights])


def transform_features(
    policy: Sequence[str], batches: list[Labelled], rng: torch.Generator, folds: Folds
) -> list[Labelled]:
    """Transform the features of batches, real and added, together with their masks.

    Parameters
    ----------
    policy
        Names in :data:`stages.segmentation.transforms.TRANSFORMS`; none: nothing is changed.
    batches
        Features with their masks.
    rng
        Source of all random numbers, on the features' device.
    folds
        Layers of the features, as ``folds`` of the store's spec gives them.
    """
    return [_augment(policy, batch, rng, folds) for batch in batches] if policy else batches


def _augment(
    policy: Sequence[str], batch: Labelled, rng: torch.Generator, folds: Folds
) -> Labelled:
    state, features, targets = rng.get_state(), batch.features, []
    for masks, fraction in batch.targets:  # each mask is transformed as the features are
        rng.set_state(state)
        (features,), transformed = transforms.augment([batch.features], masks, policy, rng, folds)
        targets.append((transformed, fraction))
    return Labelled(features, targets, batch.weight)


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
        """Positions (N,) of the training samples in the store, of view ``identity``."""
        return self.store.positions("identity")

    def class_statistics(self) -> ClassStatistics:
        """Compute the statistics of the classes over all training samples."""
        return ClassStatistics.of(self.store, self.positions, self.accelerator.device)


# (B, A, h, w) inputs of the last convolution, (B, K, h, w) logits, that convolution -> logits.
LogitAdjustment = Callable[[Tensor, Tensor, nn.Conv2d], Tensor]


class Augmenter:
    """Adds nothing: the baseline, and the base class of all others.

    Attributes
    ----------
    needs_images
        Whether :meth:`augment` reads the images of a batch.
    modules
        Networks that it trains, as the accelerator wraps them.
    monitored
        Returns the generator that it trains, for the monitor; None: it trains none.
    extra_batches
        Number of extra samples, further real ones of the store, that :meth:`augment` needs for
        each sample of the batch.
    extra_sources
        (E,) positions in the store of all samples that may be extra ones.
    """

    needs_images: bool = False
    extra_batches: int = 0
    extra_sources: np.ndarray = np.empty(0, np.int64)
    modules: Sequence[nn.Module] = ()
    monitored: Callable[[], FeatureGenerator] | None = None

    def __init__(self, config: VariantConfig, context: Context) -> None:
        self.config, self.accelerator, self.decoder = config, context.accelerator, context.decoder
        self.store, self.spec = context.store, context.store.spec

    @property
    def noise_rank(self) -> int:
        """Process whose random numbers :meth:`augment` gets; each process has its own."""
        return self.accelerator.process_index

    def rng(self, device: torch.device, *seeds: int) -> torch.Generator:
        """Build the source of random numbers of :meth:`augment` for one micro-batch."""
        return random_generator(device, *seeds, FOR_AUGMENTER, self.noise_rank)

    def extra_positions(self, positions: list[int], rng: torch.Generator) -> list[int]:
        """Choose the extra samples of a batch, so that the loader reads them ahead.

        Parameters
        ----------
        positions
            Positions of the B samples of the batch in the store.
        rng
            :meth:`rng` of the micro-batch, on the CPU.

        Returns
        -------
        list of int
            Positions of ``extra_batches * B`` samples.
        """
        return []

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """Add features, and losses, to a batch.

        Parameters
        ----------
        batch
            Real features (B, C, h, w) float32 and masks (B, H, W), and the extra samples.
        rng
            Source of all random numbers, on the features' device.
        """
        return Augmented()

    def adjust_logits(self, masks: Tensor) -> LogitAdjustment | None:
        """Return how to change the logits of real features in training; masks (B, H, W)."""
        return None

    def start_round(self) -> None:
        """Learn from the decoder, whose training has ended, before it is trained anew."""

    def after_optimizer_step(self, added: Augmented) -> None:
        """Advance, after the optimizers took a step on what :meth:`augment` added."""

    def state_dict(self) -> State:
        """Return what a resumed training needs."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` returned."""

    def save(self, out: Path) -> None:
        """Write trained networks beside the decoder in ``out``; all processes call it."""


class FeatureAugmenter(Augmenter):
    """Base class of the augmenters that add features to each batch."""

    config: SourceConfig

    def add(self, masks: Tensor, *features: Tensor) -> Augmented:
        """Add batches of features, each (B, C, h, w), all with the same masks (B, H, W)."""
        weight = self.config.weight
        return Augmented([Labelled(batch, [(masks, 1.0)], weight) for batch in features])

    def clamp(self, features: Tensor) -> Tensor:
        """Keep features (B, C, h, w) at 0 or above, if the backbone's are."""
        return features.clamp(min=0) if self.spec.nonnegative else features


class SampleAugmenter(FeatureAugmenter, ABC):
    """Base class of the augmenters that add one further real sample for each of the batch."""

    extra_batches = 1

    @override
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        assert batch.extra is not None
        return self.add(batch.extra.masks, batch.extra.features)

    @abstractmethod
    @override
    def extra_positions(self, positions: list[int], rng: torch.Generator) -> list[int]: ...


class RegionAugmenter(FeatureAugmenter, ABC):
    """Base class of the augmenters that add a copy of the batch with every region shifted.

    A region is the pixels of a class in an image (:mod:`stages.segmentation.regions`).
    """

    @override
    @torch.no_grad()
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        regions = Regions.of(batch.features, batch.masks, self.spec.num_classes)
        shifts = self.shifts(batch, regions, rng)
        return self.add(batch.masks, self.clamp(regions.shifted(shifts)))

    @abstractmethod
    def shifts(self, batch: Batch, regions: Regions, rng: torch.Generator) -> Tensor:
        """Compute by which vector each region of a batch is shifted: (B, K, C)."""
