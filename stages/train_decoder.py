"""train-decoder: a segmentation decoder on cached features, alone or with an augmenter (Algorithm 1's second branch)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

import featurestore
import stages
from featurestore import FeatureStore, SpecMismatchError
from featurestore.dataset import Batch, FeatureLoader
from featurestore.files import file_sha256
from stages.augment.base import Augmenter
from stages.augment.featuregan import FrozenFeatureGAN, JointFeatureGAN
from stages.augment.none import NoAugmenter
from stages.checkpoint import CONFIG_NAME, Checkpoint, load_gan, load_optimizers, read_config, save_gan, save_weights
from stages.config import Config
from stages.errors import ConfigError
from stages.gan import Objective, Trainer
from stages.losses import cross_entropy
from stages.metrics import Scores, confusion_matrix, score
from stages.models.decoder import Decoder
from stages.runtime import generator as random_generator
from stages.runtime import make_accelerator, progress, refuse_several_processes, seed_everything, source_digest, write_json
from stages.tracking import TRACKERS, History, Means


class TrainDecoderConfig(Config):
    """Section ``train_decoder`` of params.yaml: what all decoders have in common."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2)  # one sample cannot be batch-normalised after ASPP's global pooling
    decoder: Literal["deeplab", "fcn"]
    width: int = Field(ge=1)
    atrous_rates: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)]
    lr: float = Field(gt=0)
    betas: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)]
    mixed_precision: Literal["no", "bf16"]


class VariantConfig(Config):
    """One entry of section ``variants``: how a decoder's features are augmented."""

    augmenter: Literal["none", "featuregan"]
    generator: Literal["joint", "frozen"] = "joint"
    ratio: int = Field(default=1, ge=1, le=16)
    weight: float = Field(default=1.0, gt=0)


def run(
    config: TrainDecoderConfig,
    variant: VariantConfig,
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
    checkpoint_minutes: float,
) -> Scores:
    """Train one decoder and leave it in ``out``, its scores in ``metrics``.

    Parameters
    ----------
    config, variant
        What all decoders share, and how this one's features are augmented.
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
        Folder of DVCLive's files and of ``test.json``.
    logs, scratch, device, workers, cache, checkpoint_minutes
        As for ``train-gan``.

    Returns
    -------
    Scores
        Of the last epoch on the test split.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        Parameters that the stores do not fit, or a damaged store, GAN or checkpoint.
    """
    # Data.
    accelerator = make_accelerator(device, config.mixed_precision, log_with=list(TRACKERS), project_dir=logs)
    refuse_several_processes(accelerator)
    stores = {split: featurestore.open(features / split) for split in ("train", "val", "test")}
    train, spec = stores["train"], stores["train"].spec
    check_stores(config, stores)
    for store in stores.values():
        store.verify()
    augmenter = build_augmenter(accelerator, variant, gan, train)
    load = partial(FeatureLoader, batch_size=config.batch_size, workers=workers, device=accelerator.device, cache=cache)
    batches = load(train, seed=seed, drop_last=True, images=augmenter.needs_images)
    held_out = {split: load(stores[split]) for split in ("val", "test")}

    # The decoder: its initial weights are the same for every variant of a seed.
    seed_everything(seed)
    architecture = {
        "head": config.decoder,
        "in_channels": spec.feature_shape[0],
        "num_classes": spec.num_classes,
        "width": config.width,
        "atrous_rates": config.atrous_rates,
    }
    decoder = Decoder(**architecture).to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload, arg-type]
    parameters = list(decoder.parameters())
    optimizer = torch.optim.Adam(parameters, config.lr, config.betas)

    # Resume, or start anew.
    identity = featurestore.fingerprint(
        config=config.model_dump(),
        variant=variant.model_dump(),
        seed=seed,
        stores=[store.fingerprint for store in stores.values()],
        gan=[file_sha256(file) for file in sorted(gan.glob("*.safetensors"))] if variant.augmenter == "featuregan" else [],
        torch=torch.__version__,
        code=source_digest(stages, featurestore),
    )
    checkpoint = Checkpoint(scratch / "train-decoder" / f"{name}-{seed}-{identity[:16]}", minutes=checkpoint_minutes)
    state = checkpoint.load()
    best: dict[str, Any] = {"miou": -1.0, "epoch": -1, "weights": {}}
    if state is not None:
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        augmenter.load_state(state["augmenter"])
        best = state["best"]
    history = History(accelerator, f"{name}-{seed}", live=metrics, rows=state["history"] if state else [])

    # Train.
    bar = progress((), f"train-decoder: {name} {seed}", config.epochs * len(batches), "step")
    bar.update(len(history.rows) * len(batches))
    for epoch in range(len(history.rows), config.epochs):
        rng = random_generator(accelerator.device, seed, epoch, 1)
        means = Means()
        decoder.train()
        for batch in batches.epoch(epoch):  # its order is a function of seed and epoch, also when a resumed run starts here
            real = batch.features.float().contiguous(memory_format=torch.channels_last)
            augmented = augmenter.augment(real, batch.masks, batch.images, rng)
            # Real and generated features pass separately, so that BatchNorm never mixes them (Algorithm 1).
            with accelerator.autocast():
                loss = real_loss = cross_entropy(decoder(real, spec.mask_shape).float(), batch.masks)
                extra_losses = [cross_entropy(decoder(more, spec.mask_shape).float(), batch.masks) for more in augmented.features]
            for extra_loss in extra_losses:
                loss = loss + augmented.weight * extra_loss
            optimizer.zero_grad()
            augmenter.backward(loss, parameters)
            optimizer.step()
            means.add({"decoder/ce_real": real_loss, **augmented.terms})
            if extra_losses:
                means.add({"decoder/ce_generated": torch.stack(extra_losses).mean()})
            bar.update()
        scores = evaluate(accelerator, decoder, held_out["val"], spec.class_names)
        by_class = {f"val/iou/{class_name.replace(' ', '_')}": iou for class_name, iou in scores.iou.items() if iou is not None}
        history.log({**means.result(), "val/pixel_accuracy": scores.pixel_accuracy, "val/miou": scores.miou, **by_class})
        if scores.miou > best["miou"]:
            weights = {key: tensor.detach().cpu().clone() for key, tensor in decoder.state_dict().items()}
            best = {"miou": scores.miou, "epoch": epoch, "weights": weights}
        checkpoint.save(
            decoder=decoder.state_dict(),
            optimizer=optimizer.state_dict(),
            augmenter=augmenter.state(),
            best=best,
            history=history.rows,
        )
    bar.close()

    # Test: the last epoch is what is reported, the best on val stands beside it.
    last = evaluate(accelerator, decoder, held_out["test"], spec.class_names)
    last_on_val = evaluate(accelerator, decoder, held_out["val"], spec.class_names)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    save_weights(decoder, out / "decoder.safetensors")
    (out / CONFIG_NAME).write_text(json.dumps({"architecture": architecture, "variant": name, "seed": seed}, indent=1) + "\n")
    if isinstance(augmenter, JointFeatureGAN):
        save_gan(out / "gan", augmenter.trainer.networks, read_config(gan), augmenter.trainer.optimizer_state())
    decoder.load_state_dict(best["weights"])
    save_weights(decoder, out / "decoder-best.safetensors")
    best_scores = evaluate(accelerator, decoder, held_out["test"], spec.class_names)

    # Metrics.
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
    write_json(metrics / "test.json", result)
    checkpoint.remove()
    return last


def build_augmenter(accelerator: Accelerator, variant: VariantConfig, gan: Path, train: FeatureStore) -> Augmenter:
    """The augmenter of a variant, on the accelerator's device.

    Raises
    ------
    DataError
        When the variant needs a GAN and there is none, or a damaged one.
    SpecMismatchError
        When the GAN was trained on other features than those of ``train``.
    """
    if variant.augmenter == "none":
        return NoAugmenter(accelerator)
    networks, config = load_gan(gan)
    if config["store"] != train.fingerprint:
        message = "this GAN was trained on other features than those of the training store; run train-gan again"
        raise SpecMismatchError(message, path=gan, expected=train.fingerprint, found=config["store"])
    if variant.generator == "frozen":
        return FrozenFeatureGAN(accelerator, networks, ratio=variant.ratio, weight=variant.weight)
    settings = config["training"]
    trainer = Trainer(
        accelerator,
        networks,
        Objective(settings["adversarial_loss"], settings["lambda_feat"], settings["lambda_kld"]),
        generator_lr=settings["generator_lr"],
        discriminator_lr=settings["discriminator_lr"],
        betas=settings["betas"],
    )
    trainer.load_optimizer_state(load_optimizers(gan))
    return JointFeatureGAN(trainer, ratio=variant.ratio, weight=variant.weight)


@torch.no_grad()
def evaluate(accelerator: Accelerator, decoder: Decoder, batches: Iterable[Batch], class_names: tuple[str, ...]) -> Scores:
    """Scores of a decoder over a whole split."""
    decoder.eval()
    total: Tensor | None = None
    for batch in batches:
        real = batch.features.float().contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            logits = decoder(real, tuple(batch.masks.shape[-2:]))
        confusion = confusion_matrix(logits.argmax(1), batch.masks, len(class_names))
        total = confusion if total is None else total + confusion
    assert total is not None
    return score(total, class_names)


def check_stores(config: TrainDecoderConfig, stores: dict[str, FeatureStore]) -> None:
    """Refuse stores that do not belong together, or are smaller than a batch.

    Raises
    ------
    SpecMismatchError
        When two splits have different specs, or one has no label at all.
    ConfigError
        When there are fewer training samples than a batch.
    """
    train = stores["train"]
    for store in stores.values():
        if store.spec != train.spec:
            message = f"its spec differs from that of {train.path}; run the extract stage again"
            raise SpecMismatchError(message, path=store.path, expected=train.spec, found=store.spec)
        if not store.stats.class_pixels.any():
            raise SpecMismatchError("not one labelled pixel in its masks, so nothing to learn or to score", path=store.path)
    if len(train) < config.batch_size:
        message = f"{config.batch_size} is more than the {len(train)} samples of {train.path}; lower it"
        raise ConfigError("train_decoder.batch_size", message, expected=len(train), found=config.batch_size)
