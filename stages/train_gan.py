"""train-gan: Algorithm 1's first branch, the first ``frozen_epochs`` epochs, generator and discriminator alone."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

import featurestore
import stages
from featurestore import FeatureStore, SpecMismatchError
from featurestore.dataset import FeatureLoader
from stages.checkpoint import Checkpoint, save_gan, save_weights
from stages.config import Config, Seed
from stages.errors import ConfigError
from stages.gan import Objective, Trainer, build_networks, feature_scale
from stages.models.generator import UPSAMPLING
from stages.runtime import generator as random_generator
from stages.runtime import make_accelerator, progress, refuse_several_processes, seed_everything, source_digest
from stages.tracking import TRACKERS, History, Means

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainGanConfig(Config):
    """Section ``train_gan`` of params.yaml."""

    frozen_epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    z_dim: int = Field(ge=1)
    ngf: int = Field(ge=1)
    spade_hidden: int = Field(ge=1)
    norm: Literal["batch", "instance"]
    ndf: int = Field(ge=1)
    discriminator_layers: int = Field(ge=2, le=5)
    image_encoder: bool
    nef: int = Field(ge=1)
    init_gain: float = Field(gt=0)
    feature_scale: Literal["channel", "global", "none"]
    adversarial_loss: Literal["hinge", "wasserstein-clip", "wasserstein-gp"]
    lambda_feat: float = Field(ge=0)
    lambda_kld: float = Field(ge=0)
    generator_lr: float = Field(gt=0)
    discriminator_lr: float = Field(gt=0)
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)]
    mixed_precision: Literal["no", "bf16"]
    seed: Seed


ARCHITECTURE = ("z_dim", "ngf", "spade_hidden", "norm", "ndf", "discriminator_layers", "image_encoder", "nef", "init_gain")


def run(
    config: TrainGanConfig,
    *,
    features: Path,
    out: Path,
    metrics: Path,
    logs: Path,
    scratch: Path,
    device: str,
    workers: int,
    cache: str,
    checkpoint_minutes: float,
) -> dict[str, float]:
    """Train FeatureGAN on a store's features and leave its networks in ``out``.

    Parameters
    ----------
    config
        Networks, losses, schedule.
    features
        The training store.
    out
        Folder of ``generator``, ``discriminator``, ``image_encoder`` (``.safetensors``), the untrained
        ``generator-initial``, ``optimizers.pt`` and ``config.json``.
    metrics, logs
        Folders of DVCLive's and TensorBoard's files.
    scratch
        Where the state is kept at the end of epochs; a killed run goes on from there.
    device, workers, cache
        Belong to the machine; for the last two see :class:`featurestore.dataset.FeatureLoader`.
    checkpoint_minutes
        Save the state no more often than this.

    Returns
    -------
    dict
        The last epoch's mean losses.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        Parameters that the store does not fit, or a damaged store or checkpoint.
    """
    # Data.
    accelerator = make_accelerator(device, config.mixed_precision, log_with=list(TRACKERS), project_dir=logs)
    refuse_several_processes(accelerator)
    store = featurestore.open(features)
    check_store(config, store)
    store.verify()  # seconds now, against a night on damaged features
    batches = FeatureLoader(
        store,
        config.batch_size,
        seed=config.seed,
        drop_last=True,
        images=config.image_encoder,
        workers=workers,
        device=accelerator.device,
        cache=cache,
    )

    # Networks and optimizers.
    seed_everything(config.seed)
    architecture = describe(config, store)
    networks = build_networks(architecture, feature_scale(store, config.feature_scale))
    untrained = copy.deepcopy(networks.generator)
    objective = Objective(config.adversarial_loss, config.lambda_feat, config.lambda_kld)
    trainer = Trainer(
        accelerator,
        networks,
        objective,
        generator_lr=config.generator_lr,
        discriminator_lr=config.discriminator_lr,
        betas=config.betas,
    )

    # Resume, or start anew.
    code = source_digest(stages, featurestore)
    identity = featurestore.fingerprint(config=config.model_dump(), store=store.fingerprint, torch=torch.__version__, code=code)
    checkpoint = Checkpoint(scratch / "train-gan" / identity[:16], minutes=checkpoint_minutes)
    state = checkpoint.load()
    if state is not None:
        trainer.load_state(state["gan"])
    history = History(accelerator, "train-gan", live=metrics, rows=state["history"] if state else [])

    # Train.
    bar = progress((), "train-gan", config.frozen_epochs * len(batches), "step")
    bar.update(len(history.rows) * len(batches))
    for epoch in range(len(history.rows), config.frozen_epochs):
        rng = random_generator(accelerator.device, config.seed, epoch)
        means = Means()
        for batch in batches.epoch(epoch):  # its order is a function of seed and epoch, also when a resumed run starts here
            step = trainer.forward(batch.features, batch.masks, batch.images, ratio=1, rng=rng)
            trainer.update(step)
            means.add(step.terms)
            bar.update()
        history.log(means.result())
        checkpoint.save(gan=trainer.state(), history=history.rows)
    bar.close()

    # Save.
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    save_weights(untrained, out / "generator-initial.safetensors")
    settings = {"architecture": architecture, "training": config.model_dump(), "store": store.fingerprint}
    save_gan(out, networks, settings, trainer.optimizer_state())
    accelerator.end_training()
    checkpoint.remove()
    return history.rows[-1]


def check_store(config: TrainGanConfig, store: FeatureStore) -> None:
    """Refuse a store that this configuration cannot be trained on.

    Raises
    ------
    ConfigError
        When the feature map does not divide by the generator's up-sampling, or there are fewer samples than a batch.
    SpecMismatchError
        When the image encoder needs images and the store has none.
    """
    check_input_size(store.spec.mask_shape, store.spec.output_stride)
    if len(store) < config.batch_size:
        message = f"{config.batch_size} is more than the {len(store)} samples of {store.path}; lower it"
        raise ConfigError("train_gan.batch_size", message, expected=len(store), found=config.batch_size)
    if config.image_encoder and not store.spec.has_images:
        raise SpecMismatchError("train_gan.image_encoder needs images; set extract.store_images to true", path=store.path)


def check_input_size(size: tuple[int, int], output_stride: int) -> None:
    """Refuse photographs (H, W) whose features the generator cannot make.

    Raises
    ------
    ConfigError
        When H or W is no multiple of the backbone's stride times the generator's up-sampling.
    """
    step = output_stride * UPSAMPLING
    if size[0] % step or size[1] % step or min(size) < 2 * step:  # smaller maps leave the discriminator a single pixel
        message = f"must be a multiple of {step} from {2 * step} on (backbone stride times the generator's up-sampling), found {size}"
        raise ConfigError("extract.input_size", message, expected=step, found=size)


def describe(config: TrainGanConfig, store: FeatureStore) -> dict[str, Any]:
    """Everything that :func:`stages.gan.build_networks` needs, JSON-ready."""
    spec = store.spec
    chosen = {key: value for key, value in config.model_dump().items() if key in ARCHITECTURE}
    return {
        "num_classes": spec.num_classes,
        "feature_shape": list(spec.feature_shape),
        "output_stride": spec.output_stride,
        "nonnegative": spec.nonnegative,
        **chosen,
    }
