"""train-decoder: a segmentation decoder on cached features, alone or with an augmenter (Algorithm 1's second branch)."""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

import featurestore
import stages
from featurestore import FeatureStore, SpecMismatchError
from featurestore.dataset import FeatureLoader
from featurestore.files import file_sha256
from stages.augment.base import Adjust, Augmenter, Context, Part, VariantConfig, real_batches
from stages.augment.featuregan import JointFeatureGAN
from stages.augment.hflip_views import mirrored
from stages.augment.perturb import perturb
from stages.augment.registry import build_augmenter
from stages.common.config import Beta, Config, Listed
from stages.common.errors import ConfigError
from stages.common.runtime import (
    distribute,
    load_scaler_state,
    make_accelerator,
    progress,
    scaler_state,
    seed_everything,
    share,
    source_digest,
    verify_stores,
    write_json,
)
from stages.common.runtime import generator as random_generator
from stages.common.tracking import TRACKERS, History, Means
from stages.gan.monitor import MEASURED, Monitor, MonitorConfig
from stages.models.decoder import Decoder
from stages.segmentation.evaluation import evaluate, evaluate_images
from stages.segmentation.metrics import IMAGES_NAME, Scores, score, total
from stages.segmentation.upsampled_loss import upsampled_cross_entropy
from stages.training.checkpoint import CONFIG_NAME, Checkpoint, read_config, save_gan, save_weights


class TrainDecoderConfig(Config):
    """Section ``train_decoder`` of params.yaml: what all decoders have in common."""

    epochs: int = Field(50, ge=1, description="epochs; after the GAN's frozen_epochs")
    repeats: int = Field(1, ge=1, description="repeats of the training samples an epoch")
    batch_size: int = Field(
        32, ge=2, description="samples a step; BatchNorm after global pooling needs two"
    )
    gradient_accumulation: int = Field(1, ge=1, description="micro-batches a step, to save memory")
    decoder: Literal["deeplab", "fcn"] = Field("deeplab", description="head")
    width: int = Field(256, ge=1, description="channels of the deeplab head")
    atrous_rates: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Listed, Field(min_length=1)
    ] = Field((12, 24, 36), description="rates of the deeplab head; [6, 12] for 16 x 16 maps")
    lr: float = Field(5e-4, gt=0, description="learning rate")
    lr_schedule: Literal["constant", "poly"] = Field(
        "constant", description="poly: falls to 0 with the steps"
    )
    betas: Annotated[tuple[Beta, Beta], Listed] = Field((0.9, 0.999), description="of Adam")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="of the decoder and of a GAN trained with it; fp16 needs a GPU"
    )


def run(
    config: TrainDecoderConfig,
    variant: VariantConfig,
    monitoring: MonitorConfig,
    *,
    name: str,
    seed: int,
    features: Path,
    gan: Path,
    out: Path,
    metrics: Path,
    logs: Path,
    scratch: Path,
    device: str,
    workers: int,
    cache: str,
    compile_networks: bool,
    sharded: bool,
    checkpoint_minutes: float,
) -> Scores:
    """Train one decoder and leave it in ``out``, its scores in ``metrics``.

    Parameters
    ----------
    config, variant, monitoring
        What all decoders share, how this one's features are augmented, how a jointly trained GAN is watched.
    name, seed
        Of this decoder. Initial weights and the order of the samples depend on the seed alone, so that variants of a
        seed differ by their augmentation alone.
    features
        Folder of the stores ``train``, ``val`` and ``test``.
    gan
        Folder that ``train-gan`` wrote; read by the featuregan variants.
    out
        Folder of ``decoder.safetensors`` (last epoch), ``decoder-best.safetensors`` (best mIoU on val), ``config.json``,
        and ``gan/`` of a jointly trained GAN.
    metrics
        Folder of DVCLive's files, of ``test.json`` and of ``images.json``, the confusion matrix of each test image.
    logs, scratch, device, workers, cache, compile_networks, sharded, checkpoint_minutes
        As for ``train-gan``.

    Returns
    -------
    Scores
        Of the last epoch on the test split.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        Parameters that the stores do not fit, or a damaged store, GAN or checkpoint.
    CollapseError, DivergenceError
        When a jointly trained GAN collapsed and ``monitor.on_collapse`` is ``stop``; when a loss is no finite number any more.
    """
    # Data.
    accelerator = make_accelerator(
        device,
        config.mixed_precision,
        log_with=list(TRACKERS),
        project_dir=logs,
        gradient_accumulation_steps=config.gradient_accumulation,
    )
    share(
        config.batch_size,
        accelerator.num_processes,
        config.gradient_accumulation,
        "train_decoder.batch_size",
    )
    stores = {split: featurestore.open(features / split) for split in ("train", "val", "test")}
    train, spec = stores["train"], stores["train"].spec
    check_stores(config, stores)
    verify_stores(*stores.values(), workers=workers)
    positions = train.positions("identity")
    load = partial(
        FeatureLoader,
        batch_size=config.batch_size,
        workers=workers,
        device=accelerator.device,
        cache=cache,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )
    held_out = {
        "val": load(stores["val"]),
        "test": load(stores["test"], cache="none"),
    }  # the latter is read at the end alone

    # The decoder: its initial weights are the same for every variant of a seed.
    seed_everything(seed)
    architecture = {
        "head": config.decoder,
        "in_channels": spec.feature_shape[0],
        "num_classes": spec.num_classes,
        "width": config.width,
        "atrous_rates": config.atrous_rates,
    }
    decoder = Decoder(**architecture)  # type: ignore[arg-type]
    if compile_networks:
        decoder.compile()
    trained = distribute(
        accelerator, decoder
    )  # what is called in training; the decoder itself where there is one process
    optimizer = torch.optim.Adam(decoder.parameters(), config.lr, config.betas, fused=True)
    steps = config.epochs * (config.repeats * len(positions) // config.batch_size)
    machine = {"compile_networks": compile_networks, "sharded": sharded}
    augmenter = build_augmenter(
        variant, Context(name, accelerator, train, positions, decoder, gan, seed, steps, machine)
    )
    views = (
        positions
        if variant.view == "identity"
        else np.stack([positions, mirrored(train, positions)], axis=1)
    )
    batches = load(
        train,
        seed=seed,
        drop_last=True,
        positions=views,
        passes=config.repeats,
        images=augmenter.needs_images,
    )
    monitor = build_monitor(monitoring, augmenter, stores, seed)
    learning = math.ceil(
        variant.until * config.epochs
    )  # epochs of a jointly trained GAN, after which it rests

    # Resume, or start anew.
    identity = featurestore.fingerprint(
        config=config.model_dump(),
        variant=variant.model_dump(),
        watched=monitoring.model_dump(include=MEASURED),
        seed=seed,
        ranks=accelerator.num_processes,
        stores=[store.fingerprint for store in stores.values()],
        gan=[file_sha256(file) for file in sorted(gan.glob("*.safetensors"))]
        if variant.needs_gan
        else [],
        torch=torch.__version__,
        code=source_digest(stages, featurestore),
    )
    folder = scratch / "train-decoder" / f"{name}-{seed}-{identity[:16]}"
    checkpoint = Checkpoint(folder, minutes=checkpoint_minutes, main=accelerator.is_main_process)
    best: dict[str, Any] = {"miou": -1.0, "epoch": -1, "weights": {}}
    state = checkpoint.load() or {"step": 0, "sums": {}, "history": [], "best": best}
    best = state["best"]
    if "decoder" in state:
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        load_scaler_state(accelerator, state["scaler"])
        augmenter.load_state(state["augmenter"])
    history = History(accelerator, f"{name}-{seed}", live=metrics, rows=state["history"])
    if (
        monitor is not None
        and 0 < len(history.rows) <= learning
        and (collapsed := monitor.check(history.rows[-1], len(history.rows) - 1))
    ):
        raise collapsed  # that stopped the run before; so it does until it may go on with a warning

    def save(step: int, means: Means) -> None:
        checkpoint.save(
            decoder=decoder.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=scaler_state(accelerator),
            augmenter=augmenter.state(),
            best=best,
            history=history.rows,
            step=step,
            sums=means.state(accelerator.device),
        )

    # Train.
    bar = progress((), f"train-decoder: {name} {seed}", config.epochs * len(batches), "step")
    bar.update(len(history.rows) * len(batches) + state["step"])
    for epoch in range(len(history.rows), config.epochs):
        means = Means(state.pop("sums", {}))
        first = state.pop("step", 0)
        decoder.train()
        for number, batch in enumerate(
            batches.epoch(epoch, first), first
        ):  # its order is a function of seed and epoch
            done = (epoch * len(batches) + number) / steps
            schedule(optimizer, config, done)
            for part_number, part in enumerate(batch.split(config.gradient_accumulation)):
                rank = 0 if augmenter.same_draws else accelerator.process_index
                rng = random_generator(
                    accelerator.device, seed, epoch, number, part_number, 1, rank
                )
                seed_everything(
                    seed, epoch, number, part_number, accelerator.process_index
                )  # dropout
                with accelerator.accumulate(trained, *augmenter.modules):
                    part.features = part.features.float().contiguous(
                        memory_format=torch.channels_last
                    )
                    augmented = (
                        augmenter.augment(part, rng)
                        if done < variant.until
                        else real_batches(part, variant.added_weights)
                    )
                    # Real and added features pass separately, so that BatchNorm never mixes them (Algorithm 1).
                    parts = [Part(part.features, [(part.masks, 1.0)]), *augmented.parts]
                    own = random_generator(
                        accelerator.device,
                        seed,
                        epoch,
                        number,
                        part_number,
                        2,
                        accelerator.process_index,
                    )
                    real, *added = perturb(variant.augment, parts, own)
                    with accelerator.autocast():
                        real_loss = decoder_loss(
                            trained, real, augmenter.adjust(real.targets[0][0])
                        )
                        with decoder.running_statistics(kept=variant.statistics == "all"):
                            added_losses = [decoder_loss(trained, some) for some in added]
                    loss = real_loss
                    for some, added_loss in zip(added, added_losses, strict=True):
                        loss = loss + some.weight * added_loss
                    augmenter.update(loss, optimizer)
                means.add({"decoder/ce_real": real_loss, **augmented.terms})
                if added_losses:
                    means.add({"decoder/ce_added": torch.stack(added_losses).mean()})
            bar.update()
            if number + 1 < len(batches) and checkpoint.due():
                save(number + 1, means)
        scores = evaluate(accelerator, decoder, held_out["val"], spec.class_names)
        by_class = {
            f"val/iou/{class_name.replace(' ', '_')}": iou
            for class_name, iou in scores.iou.items()
            if iou is not None
        }
        row = {
            **means.result(accelerator),
            "val/pixel_accuracy": scores.pixel_accuracy,
            "val/miou": scores.miou,
            **by_class,
        }
        if monitor is not None and epoch < learning and monitor.due(epoch, learning):
            assert isinstance(augmenter, JointFeatureGAN)
            row |= monitor.measure(augmenter.trainer.generator())
        history.log(row)
        if scores.miou > best["miou"]:
            weights = {
                key: tensor.detach().cpu().clone() for key, tensor in decoder.state_dict().items()
            }
            best = {"miou": scores.miou, "epoch": epoch, "weights": weights}
        collapsed = monitor.check(row, epoch) if monitor is not None and epoch < learning else None
        if checkpoint.due() or collapsed:
            save(0, Means())
        if collapsed:
            raise collapsed
    bar.close()

    # Test: the last epoch is what is reported, the best on val stands beside it.
    last_on_val = evaluate(accelerator, decoder, held_out["val"], spec.class_names)
    by_image = evaluate_images(accelerator, decoder, held_out["test"], spec.num_classes)
    last = score(total(by_image.values(), spec.num_classes), spec.class_names)
    final = augmenter.state()
    if accelerator.is_main_process:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        save_weights(decoder.state_dict(), out / "decoder.safetensors")
        described = {
            "architecture": architecture,
            "mixed_precision": config.mixed_precision,
            "variant": name,
            "seed": seed,
        }
        described["features"] = spec.to_dict()
        write_json(out / CONFIG_NAME, described)
        if isinstance(augmenter, JointFeatureGAN):
            save_gan(out / "gan", final, read_config(gan))
    decoder.load_state_dict(best["weights"])
    best_scores = evaluate(accelerator, decoder, held_out["test"], spec.class_names)

    # Metrics.
    accelerator.wait_for_everyone()  # what comes next may read what the main process wrote
    accelerator.end_training()
    result = {
        "variant": name,
        "seed": seed,
        "epochs": config.epochs,
        **last.to_dict(),
        "val": last_on_val.to_dict(),
        "best_on_val": {
            "epoch": best["epoch"],
            "pixel_accuracy": best_scores.pixel_accuracy,
            "miou": best_scores.miou,
            "iou": best_scores.iou,
        },
    }
    if accelerator.is_main_process:
        save_weights(decoder.state_dict(), out / "decoder-best.safetensors")
        write_json(metrics / "test.json", result)
        ids = stores["test"].ids
        write_json(
            metrics / IMAGES_NAME,
            {ids[position]: counts for position, counts in by_image.items()},
            indent=None,
        )
    checkpoint.remove()
    return last


def decoder_loss(decoder: nn.Module, part: Part, adjust: Adjust | None = None) -> Tensor:
    """Cross-entropy of the decoder's scores for a part's features with its targets, by their shares."""
    scores = decoder(part.features.contiguous(memory_format=torch.channels_last), adjust=adjust)
    return torch.stack(
        [share * upsampled_cross_entropy(scores, masks) for masks, share in part.targets]
    ).sum()


def schedule(optimizer: torch.optim.Optimizer, config: TrainDecoderConfig, done: float) -> None:
    """Set the learning rate when a share ``done`` of all steps lies behind: constant, or falling to 0 (Chen et al. 2017, section 4.1)."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr * ((1 - done) ** 0.9 if config.lr_schedule == "poly" else 1)


def build_monitor(
    config: MonitorConfig, augmenter: Augmenter, stores: dict[str, FeatureStore], seed: int
) -> Monitor | None:
    """What watches a jointly trained GAN; None where none is trained."""
    if not isinstance(augmenter, JointFeatureGAN):
        return None
    trainer = augmenter.trainer
    scale = trainer.networks.generator.feature_scale
    monitor = Monitor(
        config,
        trainer.accelerator,
        train=stores["train"],
        held_out=stores["val"],
        feature_scale=scale,
        seed=seed,
    )
    monitor.measure(trainer.generator())  # what later measures are compared with
    return monitor


def check_stores(config: TrainDecoderConfig, stores: dict[str, FeatureStore]) -> None:
    """Refuse stores that do not belong together, or are smaller than a batch.

    Raises
    ------
    SpecMismatchError
        When two splits have different specs, or one has no label at all.
    ConfigError
        When an epoch has fewer training samples than a batch.
    """
    train = stores["train"]
    for store in stores.values():
        if store.spec != train.spec:
            message = f"its spec differs from that of {train.path}; run the extract stage again"
            raise SpecMismatchError(
                message, path=store.path, expected=train.spec, actual=store.spec
            )
        if not store.stats.class_pixels.any():
            raise SpecMismatchError(
                "not one labelled pixel in its masks, so nothing to learn or to score",
                path=store.path,
            )
    seen = config.repeats * len(train.positions("identity"))
    if seen < config.batch_size:
        message = f"{config.batch_size} is more than the {seen} samples that an epoch takes from {train.path}; lower it, or raise repeats"
        raise ConfigError(
            "train_decoder.batch_size", message, expected=seen, actual=config.batch_size
        )
