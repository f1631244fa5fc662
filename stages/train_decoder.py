"""train-decoder: a segmentation decoder on cached features (Algorithm 1, second branch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from featurestore import FeatureStore, SpecMismatchError, StoreSpec
from featurestore.dataset import Batch, FeatureLoader
from featurestore.files import file_sha256, renew_folder
from stages.augment.base import (
    FOR_TRANSFORMS,
    Augmented,
    Augmenter,
    Context,
    DecoderOverrides,
    Labelled,
    LogitAdjustment,
    VariantConfig,
    repeat_real,
    transform_features,
)
from stages.augment.registry import build_augmenter, check_variant
from stages.augment.training_loader import training_loader
from stages.backbones.map_network import load_map_network
from stages.common.runtime import (
    Machine,
    distribute,
    seed_everything,
    verify_stores,
    write_json,
)
from stages.common.runtime import generator as random_generator
from stages.gan.monitor import MEASURED, MonitorConfig
from stages.models.decoder import Decoder
from stages.segmentation.class_weights import class_weights
from stages.segmentation.evaluation import evaluate, evaluate_images
from stages.segmentation.metrics import IMAGES_NAME, Scores, score, total
from stages.segmentation.upsampled_loss import upsampled_cross_entropy
from stages.training.best import Best
from stages.training.decoder_config import TrainDecoderConfig, check_decoder, describe
from stages.training.feature_source import StoredFeatures, TrainedBackbone
from stages.training.models import CONFIG_NAME, save_networks
from stages.training.rounds import Rounds
from stages.training.session import Session, check_batch
from stages.training.stores import Features, check_like, open_split
from stages.training.update import BatchNormGuard, adamw, backward, step_and_zero_grad


def run(
    config: TrainDecoderConfig,
    variant: VariantConfig,
    monitoring: MonitorConfig,
    *,
    name: str,
    seed: int,
    features: Features,
    gan: Path,
    out: Path,
    metrics: Path,
    logs: Path,
    machine: Machine,
    backbone_weights: str = "default",
) -> Scores:
    """Train one decoder, write it and its scores; return those of the last epoch on test.

    Parameters
    ----------
    config, variant, monitoring
        What all decoders share; how features are augmented; how a GAN that learns is monitored.
    name, seed
        Of this decoder. Initial weights and the order of the samples depend only on the seed.
    features, gan
        Stores ``train``, ``val`` and ``test``, or their folder; folder that ``train-gan`` wrote.
    out, metrics
        Folders of the results, see :func:`evaluate_and_save`; DVCLive writes to ``metrics``, too.
    logs, machine, backbone_weights
        As for :func:`stages.train_gan.run`, which raises the same errors.
    """
    config = overridden(config, variant)
    session = Session(__name__, f"{name}-{seed}", machine, config, metrics=metrics, logs=logs)
    accelerator, rank = session.accelerator, session.accelerator.process_index
    stores = open_checked(config, variant, name, features, machine, accelerator.num_processes)
    train, spec = stores["train"], stores["train"].spec
    seed_everything(seed)  # variants of a seed start with the same weights
    decoder = Decoder(**describe(config, spec))
    wrapped = distribute(accelerator, decoder, compile=machine.compile)
    source = feature_source(config, spec, backbone_weights, accelerator, machine)
    optimizer = optimizer_of(config, decoder, source)
    loss_of = partial(decoder_loss, wrapped, class_weights=weights_of(config, train, accelerator))
    steps, accumulation = steps_of_training(config, train), config.gradient_accumulation
    context = Context(name, accelerator, train, decoder, gan, seed, steps, machine)
    augmenter, best = build_augmenter(variant, context), Best()
    loader = training_loader(session, config, stores, variant, seed, augmenter, source)
    validation = scoring_loader(session, stores["val"], config, source)
    watched = None if source.networks else augmenter.monitored  # the monitor needs stored features
    augmented_epochs = variant.augmented_epochs(config.epochs)  # before the variant's "until"
    session.watch(monitoring, watched, stores, seed=seed, epochs=augmented_epochs)  # before resume
    rounds = Rounds(1 + variant.teacher_rounds, config.epochs, decoder, optimizer)  # before resume
    identity = identify(config, variant, monitoring, seed, stores, gan)
    state: dict[str, Any] = {"decoder": decoder, "source": source, "optimizer": optimizer}
    state |= {"augmenter": augmenter, "best": best}
    session.resume(loader, rounds.total_epochs, identity=identity, state=state)
    modules = (wrapped, *source.modules, *augmenter.modules)
    guard = BatchNormGuard(accelerator, modules)  # after resume; in fp16: no infinite statistics
    decoder_parameters = [*decoder.parameters(), *source.parameters]  # source: trained backbone

    # Random numbers depend only on seed, epoch, step, micro-batch, process and purpose.
    for epoch in session.epochs():
        decoder.train()
        for index, batch in session.batches(epoch):
            progress = (rounds.epoch_of_round(epoch) * len(loader) + index) / steps  # of this round
            set_learning_rates(optimizer, config, progress)
            for micro_index, micro_batch in enumerate(micro_batches(batch, accumulation)):
                seeds = (seed, epoch, index, micro_index)  # the augmenter adds its own rank
                seed_everything(*seeds, rank)  # dropout and image transforms
                with accelerator.accumulate(*modules):  # sets sync_gradients
                    real_batch = source.encode(micro_batch)  # only a trained backbone changes it
                    added = augment_or_repeat(augmenter, variant, real_batch, progress, seeds)
                    batches = [Labelled.of(real_batch), *added.batches]
                    rng = random_generator(accelerator.device, *seeds, FOR_TRANSFORMS, rank)
                    real, *others = transform_features(variant.augment, batches, rng, spec.folds)
                    adjust = augmenter.adjust_logits(real.masks)  # ISDA (Wang et al. 2019), or None
                    with accelerator.autocast():  # separate passes: BatchNorm must not mix batches
                        loss = ce_real = loss_of(real, adjust)
                        with decoder.running_statistics(updated=variant.statistics == "all"):
                            ce_added = [loss_of(other) for other in others]
                    for other, cross_entropy in zip(others, ce_added, strict=True):
                        loss = loss + other.weight * cross_entropy
                    backward(accelerator, *added.losses_with_parameters(loss, decoder_parameters))
                    if accelerator.sync_gradients:  # the last micro-batch
                        step_and_zero_grad(accelerator, optimizer, *added.optimizers, guard=guard)
                        augmenter.after_optimizer_step(added)  # EMA teacher, joint GAN, ISDA
                session.log({"decoder/ce_real": ce_real, **added.terms, **logged_mean(ce_added)})
                del added  # frees a discriminator's graph, which `backward` retained
            session.save_if_due(index + 1)
        on_val = evaluate(accelerator, decoder, source.encode_all(validation), validation.store)
        best.update(on_val.miou, epoch, {"decoder": decoder, **source.networks})
        if rounds.another_after(epoch):
            augmenter.start_round()  # its teacher is a copy of the decoder as it is now
            rounds.reset_training(best)  # first weights, no moments, no best epoch
        session.end_epoch(session.take_means() | val_row(on_val) | session.measure_if_due(epoch))

    scores = evaluate_and_save(
        config, session, context, augmenter, source, best, validation, stores["test"], out
    )
    session.finish()
    return scores


# -- the loop's parts ----------------------------------------------------------------------------


def steps_of_training(config: TrainDecoderConfig, train: FeatureStore) -> int:
    """Count the steps of a training, or of a round; other views of an image add none."""
    images = len(train.positions("identity"))
    return config.epochs * (config.repeats * images // config.batch_size)


def scoring_loader(
    session: Session, store: FeatureStore, config: TrainDecoderConfig, source: StoredFeatures
) -> FeatureLoader:
    """Read a split in batches that scores are computed of."""
    return session.scoring_loader(store, config.batch_size, images=source.needs_images)


def feature_source(
    config: TrainDecoderConfig,
    spec: StoreSpec,
    backbone_weights: str,
    accelerator: Accelerator,
    machine: Machine,
) -> StoredFeatures:
    """Read the features from the store, or compute them with a backbone that is trained.

    Raises
    ------
    ConfigError, DataError
        When the pretrained backbone cannot be loaded, or its weights did not make the store.
    """
    if config.backbone == "frozen":
        return StoredFeatures()
    return TrainedBackbone(
        accelerator,
        load_map_network(spec, backbone_weights, key="extract.weights"),
        batchnorm=config.backbone_batchnorm,
        transforms=config.image_augment,
        compile=machine.compile,
    )


def optimizer_of(
    config: TrainDecoderConfig, decoder: Decoder, source: StoredFeatures
) -> torch.optim.AdamW:
    """Build the optimizer of the decoder and of a trained backbone, each with its own rate."""
    rates = {decoder: config.lr, **dict.fromkeys(source.networks.values(), config.backbone_lr)}
    return adamw(rates, config.betas, config.weight_decay)


def augment_or_repeat(
    augmenter: Augmenter,
    variant: VariantConfig,
    real: Batch,
    progress: float,
    seeds: tuple[int, ...],
) -> Augmented:
    """Add batches, after a fraction ``progress`` of all steps; no added loss trains the backbone.

    After ``until`` the real batch is added as often, with the same weights in the loss.
    """
    constant = replace(real, features=real.features.detach())
    if progress < variant.until:
        return augmenter.augment(constant, augmenter.rng(real.features.device, *seeds))
    return repeat_real(constant, variant.added_weights)


def micro_batches(batch: Batch, count: int) -> Iterator[Batch]:
    """Divide a batch, with features in float32 and in the decoder's memory layout."""
    for samples in batch.chunk(count):
        extra, unlabelled = (
            None if others is None else next(micro_batches(others, 1))
            for others in (samples.extra, samples.unlabelled)
        )
        features = samples.features.float().contiguous(memory_format=torch.channels_last)
        yield replace(samples, features=features, extra=extra, unlabelled=unlabelled)


def weights_of(
    config: TrainDecoderConfig, store: FeatureStore, accelerator: Accelerator
) -> Tensor | None:
    """Compute the weights (K,) of the classes from all training masks; None: all weigh 1."""
    pixels = store.stats.class_pixels
    return class_weights(pixels, config.class_weight_cap, accelerator.device)


def decoder_loss(
    decoder: nn.Module,
    batch: Labelled,
    adjust: LogitAdjustment | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy of a batch's logits with its masks, weighted by their fractions.

    ``class_weights`` (K,) weigh the pixels of each class.
    """
    features = batch.features.contiguous(memory_format=torch.channels_last)
    logits = decoder(features, adjust=adjust)
    losses = [
        fraction * upsampled_cross_entropy(logits, masks, class_weights)
        for masks, fraction in batch.targets
    ]
    return torch.stack(losses).sum()


def logged_mean(ce_added: list[Tensor]) -> dict[str, Tensor]:
    """Name the mean cross-entropy of the added batches as it is logged, if there are any."""
    return {"decoder/ce_added": torch.stack(ce_added).mean()} if ce_added else {}


def set_learning_rates(
    optimizer: torch.optim.Optimizer, config: TrainDecoderConfig, progress: float
) -> None:
    """Set the rates after a fraction ``progress`` of all steps.

    ``poly`` falls to 0 (Chen et al. 2017, section 4.1).
    """
    factor = (1 - progress) ** 0.9 if config.lr_schedule == "poly" else 1
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def val_row(scores: Scores) -> dict[str, float]:
    """Name the scores of the validation split as they are logged."""
    by_class = {name.replace(" ", "_"): iou for name, iou in scores.iou.items() if iou is not None}
    return {
        "val/pixel_accuracy": scores.pixel_accuracy,
        "val/miou": scores.miou,
        **{f"val/iou/{name}": iou for name, iou in by_class.items()},
    }


# -- before and after the loop -------------------------------------------------------------------


def overridden(config: TrainDecoderConfig, variant: VariantConfig) -> TrainDecoderConfig:
    """Return the parameters of all decoders with those that a variant sets for itself."""
    overrides = {key: getattr(variant, key) for key in DecoderOverrides.model_fields}
    return config.model_copy(update={k: v for k, v in overrides.items() if v is not None})


def identify(
    config: TrainDecoderConfig,
    variant: VariantConfig,
    monitoring: MonitorConfig,
    seed: int,
    stores: dict[str, FeatureStore],
    gan: Path,
) -> dict[str, object]:
    """Collect what the result depends on: an interrupted run resumes only if it is the same."""
    weights = sorted(gan.glob("*.safetensors")) if variant.needs_gan else []
    return {
        "config": config.model_dump(),
        "variant": variant.model_dump(),
        "monitor": monitoring.model_dump(include=MEASURED),
        "seed": seed,
        "stores": [store.fingerprint for store in stores.values()],
        "gan": [file_sha256(file) for file in weights],
    }


def open_checked(
    config: TrainDecoderConfig,
    variant: VariantConfig,
    name: str,
    features: Features,
    machine: Machine,
    processes: int,
) -> dict[str, FeatureStore]:
    """Open and check the stores of all splits.

    Raises
    ------
    SpecMismatchError
        When two splits have different specs, one has no labelled pixel, or a backbone is trained
        and there are no images.
    ConfigError
        When a batch does not divide over the processes, or is larger than an epoch; when the stores
        lack a layer that the decoder needs; when the variant does not work with a trained backbone.
    FeatureStoreError
        When a store is missing or damaged.
    """
    splits = ("train", "val", "test", *(["unlabelled"] if variant.needs_unlabelled else []))
    stores = {split: open_split(features, split, config.layers) for split in splits}
    train = stores["train"]
    for store in stores.values():
        check_like(store, train)
        if store is not stores.get("unlabelled") and not store.stats.class_pixels.any():
            message = "its masks have no labelled pixel: nothing to learn or to score"
            raise SpecMismatchError(message, path=store.path)
    check_batch(config, train, processes, "train_decoder")
    check_decoder(config, train)
    if config.backbone == "trained":
        check_variant(variant, name)
        train.check_images()
    verify_stores(*stores.values(), workers=machine.workers)
    return stores


def evaluate_and_save(
    config: TrainDecoderConfig,
    session: Session,
    context: Context,
    augmenter: Augmenter,
    source: StoredFeatures,
    best: Best,
    validation: FeatureLoader,
    store: FeatureStore,
    out: Path,
) -> Scores:
    """Score the decoder of the last epoch, and the best one, and write all results.

    Parameters
    ----------
    context
        Variant, seed and decoder.
    store
        The test split.
    out
        Folder of ``decoder.safetensors`` (last epoch), ``decoder-best.safetensors`` (best mIoU on
        the validation split), ``config.json``, ``gan/`` of a jointly trained GAN, and
        ``backbone.safetensors`` and ``backbone-best.safetensors`` of a trained one. The session's
        folder of metrics gets ``test.json`` and ``images.json``, the confusion matrix of each test
        image.

    Returns
    -------
    Scores
        Scores of the last epoch on the test split.
    """
    accelerator, decoder, spec = session.accelerator, context.decoder, store.spec
    run, main = {"variant": context.variant, "seed": context.seed}, accelerator.is_main_process
    networks = {"decoder": decoder, **source.networks}
    test = session.scoring_loader(  # read only twice
        store, config.batch_size, cache="none", images=source.needs_images
    )
    on_val = evaluate(accelerator, decoder, source.encode_all(validation), validation.store)
    by_image = evaluate_images(accelerator, decoder, source.encode_all(test), store)
    scores = score(total(by_image.values(), spec.num_classes), spec.class_names)
    if main:
        renew_folder(out)
        save_networks(networks, out)
        settings = {
            "architecture": describe(config, spec),
            "backbone": config.backbone,
            "mixed_precision": config.mixed_precision,
        }
        write_json(out / CONFIG_NAME, {**settings, **run, "features": spec.to_dict()})
    augmenter.save(out)
    best.restore(networks)
    best_scores = evaluate(accelerator, decoder, source.encode_all(test), store)
    if main:
        save_networks(networks, out, "-best")
        result = {
            **run,
            "epochs": config.epochs,
            **scores.to_dict(),
            "val": on_val.to_dict(),
            "best_on_val": {
                "epoch": best.epoch,
                "pixel_accuracy": best_scores.pixel_accuracy,
                "miou": best_scores.miou,
                "iou": best_scores.iou,
            },
        }
        write_json(session.metrics / "test.json", result)
        write_json(session.metrics / IMAGES_NAME, by_image, indent=None)
    return scores
