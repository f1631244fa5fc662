"""Small stores, and the training stages on a device, for the tests of this folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pydantic import TypeAdapter
from torch import Tensor

import featurestore
from featurestore import StoreSpec
from stages import train_decoder as decoder_stage
from stages import train_gan as gan_stage
from stages.augment.registry import Variant
from stages.common.runtime import Machine
from stages.gan.monitor import MonitorConfig
from stages.training.update import BatchNormGuard
from tests.factories import DECODER, GAN, MONITOR, SPEC

ALL_TRANSFORMS = ["flip", "translation", "cutout", "channel_dropout", "copy_paste"]
PENALIZED = {"adversarial_loss": "wasserstein-gp"}

# What train-gan trains: the store, and keys of section train_gan.
GANS: dict[str, tuple[str, dict[str, Any]]] = {
    "hinge": ("single", {}),
    "non-saturating": ("single", {"adversarial_loss": "non-saturating", "r1_gamma": 1.0}),
    "wasserstein-clip": ("single", {"adversarial_loss": "wasserstein-clip", "norm": "instance"}),
    "wasserstein-gp": ("single", PENALIZED),
    "segmentation": ("single", {"adversarial_loss": "segmentation", "noise": "spatial"}),
    "encoder": ("single", {"image_encoder": True, "ema_decay": 0.9}),
    "prior": ("single", {"prior": "class-means", "lambda_rec": 10.0, "z_dim": 0}),
    "projection": ("single", {"projection_channels": 5, "diffaugment": ALL_TRANSFORMS[:4]}),
    "accumulated": ("single", {"gradient_accumulation": 2}),
    "layered": ("layered", {"diffaugment": ALL_TRANSFORMS[:4], "feature_scale": "global"}),
    "concat": ("single", {"conditioning": "concat"}),
    "flow": ("single", {"family": "flow"}),
    "flow-average": ("layered", {"family": "flow", "ema_decay": 0.9}),
}
# The generators that variants read.
GENERATORS = {name: GANS[name] for name in ("hinge", "encoder", "layered", "flow")}

FROZEN = {"augmenter": "featuregan", "generator": "frozen"}
EDITED = {**FROZEN, "new_masks": ["swap"], "class_swap": True}
# What train-decoder trains: the generator's name (its store, too), and the variant.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("hinge", {"augmenter": "none"}),
    "augmented": ("hinge", {"augmenter": "none", "augment": ALL_TRANSFORMS, "view": "random"}),
    "duplicate": ("hinge", {"augmenter": "duplicate", "ratio": 2, "statistics": "real"}),
    "noise": ("hinge", {"augmenter": "noise", "deviation": "class"}),
    "channel-dropout": ("layered", {"augmenter": "channel-dropout", "augment": ALL_TRANSFORMS}),
    "linear-delta": ("hinge", {"augmenter": "linear-delta"}),
    "extrapolate": ("hinge", {"augmenter": "extrapolate"}),
    "interpolate": ("hinge", {"augmenter": "interpolate"}),
    "mixup": ("hinge", {"augmenter": "mixup", "augment": ALL_TRANSFORMS[:4]}),
    "upsample": ("hinge", {"augmenter": "upsample"}),
    "cvae": ("hinge", {"augmenter": "cvae", "fit_steps": 5}),
    "isda": ("hinge", {"augmenter": "isda"}),
    "calibration": ("hinge", {"augmenter": "calibration", "rare": 0.3}),
    "class-transfer": ("layered", {"augmenter": "class-transfer", "fraction": 0.5}),
    "hflip-views": ("layered", {"augmenter": "hflip-views"}),
    "self-training": ("layered", {"augmenter": "self-training", "rounds": 1}),
    "mean-teacher": (
        "hinge",
        {"augmenter": "self-training", "teacher": "ema", "augment": ALL_TRANSFORMS},
    ),
    "joint": ("hinge", {"augmenter": "featuregan", "until": 0.7}),
    "joint-2x": ("encoder", {"augmenter": "featuregan", "ratio": 2, "statistics": "real"}),
    "joint-apart": ("layered", {"augmenter": "featuregan", "segmentation_loss": False}),
    "frozen": ("encoder", FROZEN),
    "frozen-flow": ("flow", {**FROZEN, "ratio": 2}),
    "new-masks": ("hinge", {**FROZEN, "new_masks": ["flip", "shift", "scale", "paste", "swap"]}),
    "edited": ("layered", {**EDITED, "augment": ALL_TRANSFORMS[:4]}),
    "half-edited": ("hinge", {**EDITED, "fraction": 0.5, "ratio": 2}),
    "edited-flow": ("flow", {**EDITED, "new_masks": ["paste", "swap"]}),
    "varied-flow": ("flow", {**FROZEN, "vary": 0.5, "new_masks": ["swap"]}),
    "combined": ("hinge", {"augmenter": "combined", "of": [{"augmenter": "isda"}, EDITED]}),
    "pyramid": ("layered", {"augmenter": "none", "decoder": "deeplabv3plus"}),
    "fcn": ("hinge", {"augmenter": "none", "decoder": "fcn"}),
    "linear": ("layered", {"augmenter": "none", "decoder": "linear", "weight_decay": 0.1}),
}


@dataclass(frozen=True)
class Folders:
    """Stores and generators on disk.

    Attributes
    ----------
    stores
        Folders of the splits, by name.
    generators
        Folders that ``train-gan`` wrote, by name in :data:`GENERATORS`.
    """

    stores: Mapping[str, Path]
    generators: Mapping[str, Path]

    def of(self, name: str) -> tuple[Path, Path, dict[str, Any]]:
        """Return the stores, the generator and the settings of a variant."""
        generator, variant = VARIANTS[name]
        return self.stores[GENERATORS[generator][0]], self.generators[generator], variant


# -- stores ----------------------------------------------------------------------------------------


LAYERS = {"fine": (2, 16, 16), "middle": (5, 8, 8), "coarse": (3, 4, 4)}


def specs() -> dict[str, StoreSpec]:
    """Describe one layer of 12 channels, and three layers that are assembled into 16 channels."""
    names = ("belt", "can", "paper", "rare")
    single = dataclasses.replace(
        SPEC,
        feature_shape=(12, 8, 8),
        mask_shape=(64, 64),
        class_names=names,
        palette=tuple((60 * number, 0, 0) for number in range(len(names))),
    )
    layered = dataclasses.replace(
        single,
        feature_shape=(16, 8, 8),
        layer_names=tuple(LAYERS),
        layer_shapes=tuple(LAYERS.values()),
    )
    return {"single": single, "layered": layered}


def write_stores(root: Path) -> dict[str, Path]:
    """Write stores of noisy features that tell four classes apart.

    12 training samples, each mirrored too, of which two have the last class, 4 in val and in test,
    and 6 without labels.
    """
    for kind, spec in specs().items():
        rng = np.random.default_rng(0)
        centres = 3 * rng.random((spec.num_classes, 12))
        for split, count in (("train", 12), ("val", 4), ("test", 4), ("unlabelled", 6)):
            path = root / kind / split
            fingerprint = f"{kind} {split}"
            with featurestore.create(
                path, spec, fingerprint=fingerprint, samples_per_shard=5
            ) as writer:
                samples = [_sample(rng, spec, centres, number % 6 == 0) for number in range(count)]
                for view in ("identity", "hflip") if split == "train" else ("identity",):
                    for number, (features, mask, image) in enumerate(samples):
                        mirrored = view == "hflip"
                        if mirrored:
                            features = {name: x[..., ::-1] for name, x in features.items()}
                            mask, image = mask[:, ::-1], image[:, ::-1]
                        if split == "unlabelled":
                            mask = np.full_like(mask, 255)
                        writer.append(
                            id=f"{split} {number}",
                            view=view,
                            features=features if spec.layer_names else features[""],
                            mask=mask,
                            image=image,
                        )
    return {kind: root / kind for kind in specs()}


def _sample(
    rng: np.random.Generator, spec: StoreSpec, centres: np.ndarray, has_rare: bool
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Draw features by layer, a mask (64, 64) and an image (64, 64, 3)."""
    labels = rng.integers(0, 3, (4, 4))
    labels[0, 0] = 3 if has_rare else labels[0, 0]
    mask = labels.repeat(16, 0).repeat(16, 1).astype(np.uint8)
    mask[:2] = 255
    features = {}
    for name, (channels, height, width) in (
        LAYERS if spec.layer_names else {"": (12, 8, 8)}
    ).items():
        at_layer = mask[:: 64 // height, :: 64 // width].clip(0, 3)
        noise = 0.3 * rng.standard_normal((channels, height, width))
        values = centres[at_layer, :channels].transpose(2, 0, 1) + noise
        features[name] = np.maximum(values, 0).astype(np.float32)
    return features, mask, rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)


# -- stages ----------------------------------------------------------------------------------------


def train_gan(
    features: Path,
    root: Path,
    device: str,
    machine: Mapping[str, Any] | None = None,
    **changes: Any,
) -> dict[str, float]:
    """Train a generator into ``root``, three steps by default; return the last epoch's losses."""
    return gan_stage.run(
        gan_stage.TrainGanConfig(**{**GAN, "frozen_epochs": 1, **changes}),
        MonitorConfig(**{**MONITOR, "every": 0}),
        features=features,
        out=root / "gan",
        metrics=root / "metrics",
        logs=root / "logs",
        machine=_machine(root, device, machine or {}),
    )


def train_decoder(
    features: Path,
    gan: Path,
    root: Path,
    device: str,
    variant: Mapping[str, Any],
    machine: Mapping[str, Any] | None = None,
    **changes: Any,
) -> None:
    """Train a decoder into ``root``, three steps by default.

    Without dropout, whose random numbers each device draws for itself.
    """
    decoder_stage.run(
        decoder_stage.TrainDecoderConfig(**{**DECODER, "epochs": 1, "dropout": 0.0, **changes}),
        TypeAdapter(Variant).validate_python(variant),
        MonitorConfig(**{**MONITOR, "every": 0}),
        name="mine",
        seed=0,
        features=features,
        gan=gan,
        out=root / "decoder",
        metrics=root / "metrics",
        logs=root / "logs",
        machine=_machine(root, device, machine or {}),
    )


def _machine(root: Path, device: str, changes: Mapping[str, Any]) -> Machine:
    settings = {"device": device, "checkpoint_minutes": 60, "scratch": root / "scratch", **changes}
    return Machine(**settings)


# -- steps -----------------------------------------------------------------------------------------


@contextmanager
def equal_draws() -> Iterator[None]:
    """Let the random numbers of a generator be equal on all devices: draw them on the CPU."""
    sources: dict[int, torch.Generator] = {}

    def on_cpu(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def drawn(*size: Any, generator: Any = None, device: Any = None, **options: Any) -> Any:
            if generator is None:
                return draw(*size, device=device, **options)
            seed = generator.initial_seed()
            source = sources.setdefault(seed, torch.Generator().manual_seed(seed))
            return draw(*size, generator=source, **options).to(device or "cpu")

        return drawn

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rand", "randn", "randint", "randperm"):
            patch.setattr(torch, name, on_cpu(getattr(torch, name)))
        yield


@dataclass
class Update:
    """One step of the optimizers, on the CPU; one entry an optimizer.

    Attributes
    ----------
    gradients
        Of each parameter, without the loss scale of fp16.
    before, after
        Values of each parameter.
    rates
        Learning rates.
    scale
        Loss scale of fp16; 1 in other precisions.
    """

    gradients: list[list[Tensor]]
    before: list[list[Tensor]]
    after: list[list[Tensor]]
    rates: list[float]
    scale: float

    def is_skipped(self) -> bool:
        """Return whether no parameter changed."""
        groups = zip(self.before, self.after, strict=True)
        return all(torch.equal(x, y) for pair in groups for x, y in zip(*pair, strict=True))


@contextmanager
def recorded(stage: ModuleType) -> Iterator[list[Update]]:
    """Record every step of the optimizers of a stage."""
    updates: list[Update] = []
    take_step = stage.step_and_zero_grad

    def step(
        accelerator: Accelerator, *optimizers: torch.optim.Optimizer, guard: BatchNormGuard
    ) -> None:
        scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        parameters = [
            [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for optimizer in optimizers
        ]
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        gradients = [
            [p.new_zeros(p.shape) if p.grad is None else p.grad / scale for p in group]
            for group in parameters
        ]
        before = _copied(parameters)
        take_step(accelerator, *optimizers, guard=guard)
        updates.append(Update(_copied(gradients), before, _copied(parameters), rates, scale))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "step_and_zero_grad", step)
        yield updates


def _copied(groups: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [
        [
            tensor.detach().float().cpu().clone(memory_format=torch.contiguous_format)
            for tensor in group
        ]
        for group in groups
    ]
