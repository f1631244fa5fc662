"""A training step against a literal implementation of the thesis; an epoch with and without cache.

    python -m benchmarks.train [--size voc2012-lite] [--size thesis] [--folder FOLDER] [--json FILE]

Steps: the project and ``benchmarks/literal.py`` have networks of equal widths and batches of equal
shapes, and take turns in one process; the median step counts. Both compute in ``--precision``,
unless ``--literal-precision`` names another one for the literal implementation. In the unfrozen
step images pass a backbone that is trained, in float32 on our side. Epochs (with
``--folder``): the baseline decoder and the GAN read every image once, from a feature store or, as
the thesis did, as an image that passes the backbone.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import common, literal
from featurestore import StoreSpec
from featurestore.dataset import Batch
from stages.augment.base import Labelled
from stages.augment.featuregan import FeatureGANConfig, JointFeatureGAN
from stages.backbones.build import build_backbone
from stages.backbones.map_network import MapNetwork
from stages.common.runtime import Machine, distribute, make_accelerator, to_channels_last
from stages.gan.gan_trainer import GanTrainer
from stages.gan.networks import build_networks
from stages.gan.objective import Objective
from stages.models.decoder import Decoder
from stages.segmentation.upsampled_loss import upsampled_cross_entropy
from stages.train_decoder import decoder_loss
from stages.training.feature_source import TrainedBackbone
from stages.training.update import adamw, backward, step_and_zero_grad

CLASSES, STRIDE = 21, 8


@dataclass(frozen=True)
class Size:
    """What a preset says about widths and batches."""

    backbone: str
    channels: int
    batch: int
    z_dim: int
    ngf: int
    hidden: int
    ndf: int
    width: int
    side: int = 32  # of the feature maps


SIZES = {
    "voc2012-lite": Size("efficientnet_lite0", 320, 16, 64, 8, 64, 32, 64),
    "thesis": Size(
        "resnet101", 2048, 2, 256, 64, 128, 64, 256
    ),  # its batch is 32; two fit a small machine
    "small": Size("efficientnet_lite0", 320, 2, 8, 1, 8, 4, 8, side=8),
}


def draw_batch(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw features (B, C, h, w) float16 in 0..1, and masks (B, H, W) uint8 of square regions."""
    rng = np.random.default_rng(0)
    features = rng.random((size.batch, size.channels, size.side, size.side), np.float32)
    blocks = rng.integers(0, CLASSES, (size.batch, size.side // 4, size.side // 4)).astype(np.uint8)
    masks = blocks.repeat(4 * STRIDE, 1).repeat(4 * STRIDE, 2)
    return torch.from_numpy(features).to(device, torch.float16), torch.from_numpy(masks).to(device)


def store_spec(size: Size) -> StoreSpec:
    """Describe a store of drawn features."""
    pixels = STRIDE * size.side
    return StoreSpec(
        feature_shape=(size.channels, size.side, size.side),
        mask_shape=(pixels, pixels),
        class_names=tuple(map(str, range(CLASSES))),
        palette=((0, 0, 0),) * CLASSES,
        backbone=size.backbone,
        weights_digest="",
        output_stride=STRIDE,
        normalization_mean=(0, 0, 0),
        normalization_std=(1, 1, 1),
        resize="stretch",
        compute="fp32",
        nonnegative=False,
    )


def our_trainer(
    size: Size, device: str, precision: str, machine: Machine | None = None
) -> GanTrainer:
    networks = build_networks(
        {
            "num_classes": CLASSES,
            "feature_shape": (size.channels, size.side, size.side),
            "output_stride": STRIDE,
            "nonnegative": True,
            "family": "gan",
            "z_dim": size.z_dim,
            "noise": "vector",
            "prior": "none",
            "ngf": size.ngf,
            "spade_hidden": size.hidden,
            "norm": "batch",
            "ndf": size.ndf,
            "discriminator_layers": 3,
            "discriminator_scales": 1,
            "projection_channels": 0,
            "adversarial_loss": "hinge",
            "image_encoder": False,
            "init_gain": 0.02,
        }
    )
    objective = Objective("hinge", 7.0, 0.05)
    accelerator = make_accelerator(device, precision)
    return GanTrainer(
        accelerator,
        networks,
        objective,
        folds=((size.channels, 1),),
        generator_lr=2e-4,
        discriminator_lr=8e-4,
        betas=(0.0, 0.9),
        machine=machine,
    )


def gan_step(trainer: GanTrainer, features: Tensor, masks: Tensor, rng: torch.Generator) -> None:
    """Take one step of Algorithm 1's first branch."""
    step = trainer.forward(features, masks, None, ratio=1, rng=rng)
    backward(trainer.accelerator, *trainer.losses_with_parameters(step))
    step_and_zero_grad(trainer.accelerator, *trainer.optimizers.values())
    trainer.after_optimizer_step()


def new_decoder(size: Size) -> Decoder:
    return Decoder(head="deeplab", in_channels=size.channels, num_classes=CLASSES, width=size.width)


def batch_of(features: Tensor, masks: Tensor) -> Batch:
    """Convert features (B, C, h, w) to float32, channels last, as ``train_decoder`` does."""
    real = features.float().contiguous(memory_format=torch.channels_last)
    return Batch(torch.arange(len(masks)), real, masks, None)


def our_decoder_step(
    size: Size, device: str, precision: str, features: Tensor, masks: Tensor, machine: Machine
) -> Callable[[], object]:
    """Build the step of the baseline decoder, without a GAN."""
    accelerator = make_accelerator(device, precision)
    decoder = new_decoder(size)
    called = distribute(accelerator, decoder, compile=machine.compile)
    optimizer = adamw({decoder: 5e-4}, (0.9, 0.999), weight_decay=0.0)

    def step() -> None:
        batch = Labelled.of(batch_of(features, masks))
        with accelerator.autocast():
            loss = decoder_loss(called, batch)
        backward(accelerator, (loss, [*decoder.parameters()]))
        step_and_zero_grad(accelerator, optimizer)

    return step


def our_steps(
    size: Size,
    device: str,
    precision: str,
    features: Tensor,
    masks: Tensor,
    machine: Machine | None = None,
) -> dict[str, Callable[[], object]]:
    """Build the steps of both branches of Algorithm 1; ``machine.compile`` applies."""
    trainer = our_trainer(size, device, precision, machine)
    compiled = machine is not None and machine.compile
    decoder = new_decoder(size)
    called = distribute(trainer.accelerator, decoder, compile=compiled)
    optimizer = adamw({decoder: 5e-4}, (0.9, 0.999), weight_decay=0.0)
    rng = torch.Generator(trainer.accelerator.device).manual_seed(0)

    def gan() -> None:
        gan_step(trainer, features, masks, rng)

    def joint(ratio: int) -> None:
        variant = FeatureGANConfig(augmenter="featuregan", ratio=ratio)
        augmenter = JointFeatureGAN(variant, trainer, Path())
        batch = batch_of(features, masks)
        added = augmenter.augment(batch, rng)
        with trainer.accelerator.autocast():
            batches = [Labelled.of(batch), *added.batches]
            losses = torch.stack([decoder_loss(called, each) for each in batches])
        trained = list(decoder.parameters())
        backward(trainer.accelerator, *added.losses_with_parameters(losses.sum(), trained))
        step_and_zero_grad(trainer.accelerator, optimizer, *added.optimizers)
        augmenter.after_optimizer_step(added)

    return {"gan step": gan, "joint step 1:1": lambda: joint(1), "joint step 2:1": lambda: joint(2)}


def unfrozen_steps(
    size: Size, device: str, precisions: dict[str, str]
) -> dict[str, Callable[[], object]]:
    """Build the step of a baseline decoder with a trained backbone, ours and a literal one.

    The literal one is a loop as in PyTorch's tutorials: two modules, cross-entropy of upsampled
    logits, one AdamW.
    """
    where = make_accelerator(device, precisions["ours"]).device
    spec, (_, masks) = store_spec(size), draw_batch(size, where)
    rng = torch.Generator(where).manual_seed(0)
    shape = (size.batch, 3, *spec.mask_shape)
    images = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8, device=where)
    images = images.contiguous(memory_format=torch.channels_last)

    def network() -> MapNetwork:
        return MapNetwork(build_backbone(name=size.backbone, weights=None), spec)

    accelerator = make_accelerator(device, precisions["ours"])
    source = TrainedBackbone(accelerator, network(), batchnorm="eval", transforms=())
    decoder = to_channels_last(new_decoder(size), where)
    optimizer = adamw(
        {decoder: 5e-4, **dict.fromkeys(source.networks.values(), 5e-5)}, (0.9, 0.999), 0.0
    )

    def ours() -> None:
        batch = source.encode(Batch(torch.arange(size.batch), images[:, :0], masks, images))
        with accelerator.autocast():
            loss = decoder_loss(decoder, Labelled.of(batch))
        backward(accelerator, (loss, [*decoder.parameters(), *source.parameters]))
        step_and_zero_grad(accelerator, optimizer)

    plain = network()
    plain.backbone.unfreeze("eval", spec.mask_shape)
    plain = to_channels_last(plain, where).train()
    head = new_decoder(size).to(where)
    groups = [{"params": head.parameters()}, {"params": plain.parameters(), "lr": 5e-5}]
    adam = torch.optim.AdamW(groups, 5e-4, weight_decay=0.0)

    def literally() -> None:
        with literal_autocast(where, precisions["literal"]):
            logits = F.interpolate(
                head(plain(images)), masks.shape[1:], mode="bilinear", align_corners=False
            )
        adam.zero_grad()
        F.cross_entropy(logits.float(), masks.long(), ignore_index=255).backward()
        adam.step()

    return {"ours": ours, "literal": literally}


def literal_autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return PyTorch's autocast; fp16 without a loss scale, which does not change the time."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision in ("bf16", "fp16"))


def literal_steps(
    size: Size, device: str, precision: str, features: Tensor, masks: Tensor
) -> dict[str, Callable[[], object]]:
    where = features.device
    shape = (size.channels, size.side, size.side)
    generator = literal.Generator(shape, CLASSES, size.z_dim, size.ngf, size.hidden).to(where)
    discriminator = literal.Discriminator(size.channels, CLASSES, size.ndf).to(where)
    gan = literal.Training(generator, discriminator, None, CLASSES)
    joint = literal.Training(generator, discriminator, new_decoder(size).to(where), CLASSES)
    rng = torch.Generator(where).manual_seed(0)
    autocast = literal_autocast(where, precision)

    def step(training: literal.Training, ratio: int) -> Callable[[], object]:
        return lambda: training.step(
            features.float(),
            masks,
            torch.randn(ratio * len(masks), size.z_dim, generator=rng, device=where),
            autocast,
        )

    return {
        "gan step": step(gan, 1),
        "joint step 1:1": step(joint, 1),
        "joint step 2:1": step(joint, 2),
    }


def time_steps(
    name: str, size: Size, device: str, precisions: dict[str, str], steps: int
) -> list[dict[str, Any]]:
    """Median seconds of each kind of step, ours and the literal one in turns."""
    where = make_accelerator(device, precisions["ours"]).device
    features, masks = draw_batch(size, where)
    kinds = {
        "ours": our_steps(size, device, precisions["ours"], features, masks),
        "literal": literal_steps(size, device, precisions["literal"], features, masks),
    }
    for implementation, step in unfrozen_steps(size, device, precisions).items():
        kinds[implementation]["unfrozen decoder step"] = step
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(steps + 1):
        for implementation, named in kinds.items():
            for what, step in named.items():
                _synchronise(where)
                start = time.perf_counter()
                step()
                _synchronise(where)
                if number:  # the first warms up
                    seconds.setdefault((what, implementation), []).append(
                        time.perf_counter() - start
                    )
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return [
        {
            "what": what,
            "implementation": implementation,
            "size": name,
            "precision": precisions[implementation],
            "seconds": value,
            "speedup": medians[what, "literal"] / value,
        }
        for (what, implementation), value in sorted(medians.items())
    ]


def time_epochs(
    name: str, size: Size, device: str, precision: str, folder: Path, count: int
) -> list[dict[str, Any]]:
    """Time an epoch over ``count`` images, from cached features and with the backbone in it."""
    import featurestore
    from featurestore.dataset import FeatureLoader

    pixels = STRIDE * size.side
    with tempfile.TemporaryDirectory() as scratch:
        accelerator = make_accelerator(device, precision)
        backbone = common.backbone_for(size.backbone, Path(scratch)).to(accelerator.device)
        masks = torch.from_numpy(
            np.random.default_rng(0)
            .integers(0, CLASSES, (size.batch, pixels, pixels))
            .astype(np.uint8)
        )
        masks = masks.to(accelerator.device)

        @torch.no_grad()
        def online() -> Iterator[Tensor]:
            images = common.read_images(folder, count, pixels)
            for _ in range(count // size.batch):
                batch = (
                    torch.from_numpy(np.stack([next(images) for _ in range(size.batch)]))
                    .permute(0, 3, 1, 2)
                    .to(accelerator.device)
                )
                with accelerator.autocast():
                    (features,) = backbone(batch)
                yield features.clone()  # the backbone gives inference tensors, without gradients

        with featurestore.create(Path(scratch) / "store", store_spec(size)) as writer:
            for number, features in enumerate(online()):
                for row, sample in enumerate(features.to(torch.float16).cpu().numpy()):
                    writer.append(
                        id=f"{number}-{row}", features=sample, mask=masks[row].cpu().numpy()
                    )
        loader = FeatureLoader(
            featurestore.open(Path(scratch) / "store"),
            size.batch,
            seed=0,
            drop_last=True,
            device=accelerator.device,
            workers=1,
        )

        def cached() -> Iterator[Tensor]:
            return (batch.features for batch in loader.epoch(0))

        trainer = our_trainer(size, device, precision)
        decoder = to_channels_last(new_decoder(size), accelerator.device)
        optimizer = adamw({decoder: 5e-4}, (0.9, 0.999), weight_decay=0.0)
        rng = torch.Generator(accelerator.device).manual_seed(0)

        def decode(features: Tensor) -> None:
            with accelerator.autocast():
                scores = decoder(features.float().contiguous(memory_format=torch.channels_last))
                loss = upsampled_cross_entropy(scores, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        steps = {
            "decoder epoch": decode,
            "gan epoch": lambda features: gan_step(trainer, features, masks, rng),
        }
        rows = []
        for what, step in steps.items():
            seconds = {}
            for implementation, source in (("cached", cached), ("online", online)):
                step(next(iter(source())))  # warms up
                _synchronise(accelerator.device)
                start = time.perf_counter()
                for features in source():
                    step(features)
                _synchronise(accelerator.device)
                seconds[implementation] = time.perf_counter() - start
            for implementation, value in seconds.items():
                row = {
                    "what": f"{what}, {count // size.batch * size.batch} images",
                    "implementation": implementation,
                    "size": name,
                }
                rows.append(
                    {
                        **row,
                        "precision": precision,
                        "seconds": value,
                        "speedup": seconds["online"] / value,
                    }
                )
        return rows


COLUMNS = ("what", "implementation", "size", "precision", "seconds", "speedup")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@click.command(help=__doc__)
@click.option(
    "--size",
    "names",
    multiple=True,
    type=click.Choice(list(SIZES)),
    default=("voc2012-lite", "thesis"),
    show_default=True,
)
@click.option(
    "--precision",
    type=click.Choice(["no", "bf16"]),
    default="no",
    show_default=True,
    help="Of both, and of epochs.",
)
@click.option(
    "--literal-precision",
    type=click.Choice(["no", "bf16"]),
    help="Of the literal implementation. Default: the same.",
)
@click.option(
    "--steps", type=click.IntRange(1), default=5, show_default=True, help="Steps of each kind."
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Measure epochs too, on these.",
)
@click.option(
    "--images", type=click.IntRange(16), default=64, show_default=True, help="Images an epoch."
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(
    names: tuple[str, ...],
    precision: str,
    literal_precision: str | None,
    steps: int,
    folder: Path | None,
    images: int,
    device: str,
    file: Path | None,
) -> None:
    print(f"{common.machine()}\n", flush=True)
    precisions = {"ours": precision, "literal": literal_precision or precision}
    rows = [
        row for name in names for row in time_steps(name, SIZES[name], device, precisions, steps)
    ]
    if folder is not None:
        rows += [
            row
            for name in names
            for row in time_epochs(name, SIZES[name], device, precision, folder, images)
        ]
    common.report(rows, COLUMNS, file)


if __name__ == "__main__":
    main()
