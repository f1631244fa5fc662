"""The thesis's second approach (section 5.1): a generator of images in front of the backbone.

``train-gan`` pretrains it on the stored images, against a discriminator of images.
``train-decoder`` trains it jointly: the generated images pass the frozen backbone, and a
discriminator of features, untrained at the start, judges what the decoder learns from (figure 5.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from accelerate import Accelerator
from torch import Tensor, nn
from typing_extensions import Self, override

from stages.common.runtime import Machine
from stages.gan.gan_trainer import GanTrainer
from stages.gan.networks import Networks
from stages.models.image_generator import ImageFeatureGenerator, from_pixels
from stages.segmentation.folds import Folds

RGB: Folds = ((3, 1),)  # images, for transforms in front of the discriminator


class ImageTrainer(GanTrainer):
    """Pretraining: :class:`GanTrainer` on images in place of features; the backbone is not run."""

    @override
    @classmethod
    def of(
        cls,
        accelerator: Accelerator,
        networks: Networks,
        settings: Mapping[str, Any],
        machine: Machine,
        folds: Folds,
    ) -> Self:
        return super().of(accelerator, networks, settings, machine, RGB)

    @override
    def real(self, features: Tensor, images: Tensor | None) -> Tensor:
        assert images is not None
        return from_pixels(images)

    @override
    def _called(self, network: nn.Module) -> nn.Module:
        if network is self.networks.generator:
            return _Images(cast(ImageFeatureGenerator, network))
        return network


class JointImageTrainer(GanTrainer):
    """Joint training: :class:`GanTrainer` on the features of generated images."""

    @override
    def describe(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        return {**architecture, "discriminates": "features"}

    @override
    def load_pretraining(self, state: Mapping[str, Any]) -> None:
        # The generator's optimizer continues; the discriminator and its optimizer are new.
        fresh = {"discriminator": self.optimizers["discriminator"].state_dict()}
        self.load_training_state({**state, "optimizers": {**state["optimizers"], **fresh}})


class _Images(nn.Module):
    """The images of a generator as a module's forward, through which processes share gradients."""

    def __init__(self, generator: ImageFeatureGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, z: Tensor, masks: Tensor) -> Tensor:
        return self.generator.network(z, masks)
