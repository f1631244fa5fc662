"""Unlabelled images for a GAN: masks that a decoder predicts, weighted by its confidence.

Pseudo-labels (Lee 2013): a linear decoder is fitted on the labelled images. An unlabelled sample
weighs as much in the GAN's losses as the mean probability of the predicted classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from featurestore import StoreSpec
from featurestore.dataset import Batch, FeatureLoader
from stages.common.distributed import agree
from stages.common.runtime import generator as random_generator
from stages.common.runtime import seed_everything, to_channels_last
from stages.models.decoder import Decoder
from stages.segmentation.transforms import Transform, augment
from stages.segmentation.upsampled_loss import upsampled_cross_entropy
from stages.training.update import adamw

STEPS, LR, DROPOUT = 400, 4e-3, 0.5  # chosen with 41 labels: docs/results/layers.md
TRANSFORMS: tuple[Transform, ...] = ("flip", "translation", "channel_dropout", "cutout")


@dataclass(frozen=True)
class Samples:
    """What a GAN learns from in a step.

    Attributes
    ----------
    features, masks, images
        (B, C, h, w), (B, H, W) uint8 and (B, 3, H, W) uint8; images may be None.
    weights
        (B,) weights of the samples, 0 to 1; None: all weigh 1.
    logged
        Values for the logs.
    """

    features: Tensor
    masks: Tensor
    images: Tensor | None
    weights: Tensor | None
    logged: dict[str, Tensor]


class SampleSource:
    """The labelled samples of each batch, all of weight 1."""

    def fit_unless_restored(self, loader: FeatureLoader, seed: int) -> None:
        """Learn what :meth:`take` needs from labelled samples, unless it is known.

        Parameters
        ----------
        loader
            Reads whole batches in every process.
        seed
            Of order, transforms and dropout.
        """

    def take(self, batch: Batch) -> Samples:
        """Choose what the GAN learns from a batch."""
        return Samples(batch.features, batch.masks, batch.images, None, {})

    def state_dict(self) -> dict[str, Any]:
        """Return what has been learnt."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""


class PseudoMasks(SampleSource):
    """Labelled samples, and unlabelled ones with the masks that a linear decoder predicts.

    Parameters
    ----------
    spec
        Properties of the store.
    device
        Where the decoder computes.
    """

    def __init__(self, spec: StoreSpec, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):  # other networks do not depend on it
            decoder = Decoder(
                head="linear",
                in_channels=spec.feature_shape[0],
                num_classes=spec.num_classes,
                dropout=DROPOUT,
                folds=spec.folds,
            )
        self.decoder, self.folds = to_channels_last(decoder, device), spec.folds
        self.fitted = False

    @override
    def fit_unless_restored(self, loader: FeatureLoader, seed: int) -> None:
        if self.fitted:
            return
        optimizer = adamw({self.decoder: LR}, (0.9, 0.999), weight_decay=0.0)
        self.decoder.train()
        for epoch in range(math.ceil(STEPS / len(loader))):
            for index, batch in enumerate(loader.epoch(epoch)):
                seed_everything(seed, epoch, index)  # dropout
                progress = (epoch * len(loader) + index) / STEPS
                for group in optimizer.param_groups:
                    group["lr"] = LR * max(1 - progress, 0) ** 0.9
                rng = random_generator(batch.features.device, seed, epoch, index)
                (features,), masks = augment(
                    [batch.features.float()], batch.masks, TRANSFORMS, rng, self.folds
                )
                optimizer.zero_grad()
                upsampled_cross_entropy(self.decoder(features), masks).backward()
                optimizer.step()
        state = {key: value.cpu() for key, value in self.decoder.state_dict().items()}
        self.decoder.load_state_dict(agree(state))
        self.fitted = True

    @torch.no_grad()
    def label(self, features: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Predict masks (B, H, W) uint8 of features (B, C, h, w), and their confidence (B,).

        The confidence is the mean probability of the predicted classes, 1 / K to 1.
        """
        self.decoder.eval()
        masks, confidences = [], []
        for logits in self.decoder(features.float()).split(1):  # saves memory
            fine = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            probability, mask = fine.softmax(1).max(1)
            masks.append(mask.to(torch.uint8))
            confidences.append(probability.mean())
        return torch.cat(masks), torch.stack(confidences)

    @override
    def take(self, batch: Batch) -> Samples:
        # Each unlabelled sample is behind a labelled one: several processes then divide the samples
        # as they divide the noise.
        other = batch.unlabelled
        assert other is not None
        height, width = batch.masks.shape[-2:]
        masks, confidence = self.label(other.features, (height, width))
        images = None
        if batch.images is not None and other.images is not None:
            images = _alternate(batch.images, other.images)
        return Samples(
            _alternate(batch.features, other.features),
            _alternate(batch.masks, masks),
            images,
            _alternate(torch.ones_like(confidence), confidence),
            {"pseudo_masks/confidence": confidence.mean()},
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"decoder": self.decoder.state_dict(), "fitted": self.fitted}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decoder.load_state_dict(state["decoder"])
        self.fitted = state["fitted"]


def _alternate(one: Tensor, other: Tensor) -> Tensor:
    """Take rows of two tensors (B, ...) in turns: (2*B, ...)."""
    return torch.stack([one, other], 1).flatten(0, 1)
