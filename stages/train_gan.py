"""train-gan: Algorithm 1's first branch, the first ``frozen_epochs`` epochs, generator and discriminator alone."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

import featurestore
import stages
from featurestore import FeatureStore, SpecMismatchError
from featurestore.dataset import FeatureLoader
from stages.common.config import Beta, Config, Listed, Once, Seed
from stages.common.errors import ConfigError
from stages.common.runtime import generator as random_generator
from stages.common.runtime import (
    make_accelerator,
    progress,
    seed_everything,
    share,
    source_digest,
    verify_stores,
)
from stages.common.tracking import TRACKERS, History, Means
from stages.gan.flow_trainer import FlowTrainer, mean_amplitude, principal_components
from stages.gan.gan_trainer import GanTrainer
from stages.gan.monitor import MEASURED, Monitor, MonitorConfig
from stages.gan.networks import build_networks, class_means, feature_scale
from stages.gan.trainer import Trainer
from stages.models.flow_generator import FlowGenerator
from stages.models.generator import UPSAMPLING
from stages.segmentation.transforms import Transform
from stages.training.checkpoint import Checkpoint, save_gan, save_weights


class TrainGanConfig(Config):
    """Section ``train_gan`` of params.yaml."""

    family: Literal["gan", "flow"] = Field("gan", description="flow: flow matching")
    flow_components: int = Field(64, ge=1, description="principal components that a flow models")
    flow_width: int = Field(64, ge=2, description="channels of a flow's blocks")
    flow_steps: int = Field(16, ge=1, description="steps of a flow's integration")
    frozen_epochs: int = Field(75, ge=1, description="epochs before any decoder is trained")
    repeats: int = Field(1, ge=1, description="repeats of the training samples an epoch")
    batch_size: int = Field(32, ge=2, description="samples a step")
    gradient_accumulation: int = Field(1, ge=1, description="micro-batches a step, to save memory")
    z_dim: int = Field(256, ge=0, description="length of the noise vector; 0: no noise")
    noise: Literal["vector", "spatial"] = Field(
        "vector", description="spatial: z beside the classes at every pixel"
    )
    prior: Literal["none", "class-means"] = Field(
        "none", description="class-means: the generator adds to the means of the mask's classes"
    )
    ngf: int = Field(64, ge=1, description="generator width; its blocks have 16 * ngf channels")
    spade_hidden: int = Field(128, ge=1, description="hidden channels of SPADE")
    norm: Literal["batch", "instance"] = Field("batch", description="normalization inside SPADE")
    ndf: int = Field(64, ge=1, description="discriminator width")
    discriminator_layers: int = Field(3, ge=2, le=5, description="layers of a discriminator")
    discriminator_scales: int = Field(
        1, ge=1, le=2, description="discriminators, each at half size"
    )
    projection_channels: int = Field(
        0, ge=0, description="random mixtures that the discriminator sees; 0: all channels"
    )
    image_encoder: bool = Field(False, description="draw z from the image (VAE)")
    nef: int = Field(64, ge=1, description="image encoder width")
    init_gain: float = Field(0.02, gt=0, description="gain of the weights' initialization")
    feature_scale: Literal["channel", "global", "none"] = Field(
        "channel", description="features are divided by deviations before the GAN"
    )
    adversarial_loss: Literal[
        "hinge", "non-saturating", "wasserstein-clip", "wasserstein-gp", "segmentation"
    ] = Field("hinge", description="adversarial loss")
    lambda_feat: float = Field(7.0, ge=0, description="weight of feature matching")
    lambda_kld: float = Field(0.05, ge=0, description="weight of the image encoder's divergence")
    lambda_rec: float = Field(
        0.0, ge=0, description="weight of the squared difference from the real features; 0: off"
    )
    r1_gamma: float = Field(0.0, ge=0, description="weight of R1; 0: off")
    diffaugment: Annotated[tuple[Transform, ...], Listed, Once] = Field(
        (), description="transforms before the discriminator"
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of the generator's average a step; 0: off"
    )
    generator_lr: float = Field(2e-4, gt=0, description="learning rate of the generator")
    discriminator_lr: float = Field(8e-4, gt=0, description="learning rate of the discriminator")
    betas: Annotated[tuple[Beta, Beta], Listed] = Field((0.0, 0.9), description="of Adam")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="fp16 needs a GPU")
    seed: Seed = Field(0, description="seed of weights, order and noise")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.adversarial_loss == "segmentation" and (
            self.r1_gamma or self.discriminator_scales > 1
        ):
            raise ValueError(
                "r1_gamma and discriminator_scales belong to a patch discriminator; adversarial_loss segmentation has none"
            )
        if self.image_encoder and (not self.z_dim or self.noise == "spatial"):
            raise ValueError(
                "the image encoder gives a noise vector; set z_dim above 0 and noise to vector, or image_encoder to false"
            )
        if self.noise == "spatial" and not self.z_dim:
            raise ValueError(
                "spatial noise is z at every pixel; set z_dim above 0, or noise to vector"
            )
        if self.family == "flow" and (self.image_encoder or self.r1_gamma or self.diffaugment):
            raise ValueError(
                "image_encoder, r1_gamma and diffaugment are a GAN's; turn them off (false, 0, []), or set family to gan"
            )
        return self


ARCHITECTURE = (
    "family",
    "flow_components",
    "flow_width",
    "flow_steps",
    "z_dim",
    "noise",
    "prior",
    "ngf",
    "spade_hidden",
    "norm",
    "ndf",
    "discriminator_layers",
    "discriminator_scales",
    "projection_channels",
    "adversarial_loss",
    "image_encoder",
    "nef",
    "init_gain",
)


def run(
    config: TrainGanConfig,
    monitoring: MonitorConfig,
    *,
    features: Path,
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
) -> dict[str, float]:
    """Train FeatureGAN on a store's features and leave its networks in ``out``.

    Parameters
    ----------
    config, monitoring
        Networks, losses, schedule; how training is watched.
    features
        Folder of the stores ``train`` and ``val``; the latter's masks and features are what training is watched with.
    out
        Folder of ``generator``, ``discriminator``, ``image_encoder`` (``.safetensors``), the untrained
        ``generator-initial``, ``optimizers.pt`` and ``config.json``.
    metrics, logs
        Folders of DVCLive's and TensorBoard's files.
    scratch
        Where the state is kept; a killed run goes on from there.
    device, workers, cache, compile_networks, sharded
        Belong to the machine; for ``workers`` and ``cache`` see :class:`featurestore.dataset.FeatureLoader`, for the last two
        :class:`stages.gan.trainer.Trainer`.
    checkpoint_minutes
        Save the state no more often than this.

    Returns
    -------
    dict
        The last epoch's mean losses and measures.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        Parameters that the stores do not fit, or a damaged store or checkpoint.
    CollapseError, DivergenceError
        When the GAN collapsed and ``monitor.on_collapse`` is ``stop``; when a loss is no finite number any more.
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
        "train_gan.batch_size",
    )
    store, held_out = featurestore.open(features / "train"), featurestore.open(features / "val")
    check_store(config, store)
    verify_stores(store, held_out, workers=workers)
    batches = FeatureLoader(
        store,
        config.batch_size,
        seed=config.seed,
        drop_last=True,
        positions=store.positions("identity"),
        passes=config.repeats,
        images=config.image_encoder,
        workers=workers,
        device=accelerator.device,
        cache=cache,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )

    # Networks and optimizers.
    seed_everything(config.seed)
    architecture = describe(config, store)
    scale = feature_scale(store, config.feature_scale)
    networks = build_networks(
        architecture, scale, class_means(store, scale) if config.prior == "class-means" else None
    )
    settings = config.model_dump()
    machine: dict[str, Any] = {"compile_networks": compile_networks, "sharded": sharded}
    if isinstance(networks.generator, FlowGenerator):
        components = principal_components(store, scale, config.flow_components, config.seed)
        networks.generator.set_components(components)
        networks.generator.set_amplitude(mean_amplitude(store, networks.generator, config.seed))
    untrained = copy.deepcopy(networks.generator.state_dict())
    trainer: Trainer
    if networks.discriminator is None:
        adam: dict[str, Any] = {"lr": config.generator_lr, "betas": config.betas}
        trainer = FlowTrainer(accelerator, networks, **adam, ema_decay=config.ema_decay, **machine)
    else:
        trainer = GanTrainer.of(accelerator, networks, settings, **machine)
    monitor = Monitor(
        monitoring,
        accelerator,
        train=store,
        held_out=held_out,
        feature_scale=scale,
        seed=config.seed,
    )
    monitor.measure(trainer.generator())  # what later measures are compared with

    # Resume, or start anew.
    code = source_digest(stages, featurestore)
    stores = [store.fingerprint, held_out.fingerprint]
    watched = monitoring.model_dump(include=MEASURED)
    identity = featurestore.fingerprint(
        config=settings,
        watched=watched,
        stores=stores,
        torch=torch.__version__,
        code=code,
        ranks=accelerator.num_processes,
    )
    folder = scratch / "train-gan" / identity[:16]
    checkpoint = Checkpoint(folder, minutes=checkpoint_minutes, main=accelerator.is_main_process)
    state = checkpoint.load() or {"step": 0, "sums": {}, "history": []}
    if "gan" in state:
        trainer.load_state(state["gan"])
    history = History(accelerator, "train-gan", live=metrics, rows=state["history"])
    if history.rows and (collapsed := monitor.check(history.rows[-1], len(history.rows) - 1)):
        raise collapsed  # that stopped the run before; so it does until it may go on with a warning

    # Train.
    bar = progress((), "train-gan", config.frozen_epochs * len(batches), "step")
    bar.update(len(history.rows) * len(batches) + state["step"])
    for epoch in range(len(history.rows), config.frozen_epochs):
        means = Means(state.pop("sums", {}))
        first = state.pop("step", 0)
        for number, batch in enumerate(
            batches.epoch(epoch, first), first
        ):  # its order is a function of seed and epoch
            for part_number, part in enumerate(batch.split(config.gradient_accumulation)):
                rng = random_generator(accelerator.device, config.seed, epoch, number, part_number)
                with accelerator.accumulate(*trainer.modules.values()):
                    step = trainer.forward(part.features, part.masks, part.images, ratio=1, rng=rng)
                    trainer.update(step)
                means.add(step.terms)
                del step  # and with it the part of its graph that no back-propagation frees
            bar.update()
            if number + 1 < len(batches) and checkpoint.due():
                checkpoint.save(
                    gan=trainer.state(),
                    history=history.rows,
                    step=number + 1,
                    sums=means.state(accelerator.device),
                )
        row = means.result(accelerator)
        if monitor.due(epoch, config.frozen_epochs):
            row |= monitor.measure(trainer.generator())
        history.log(row)
        collapsed = monitor.check(row, epoch)
        if checkpoint.due() or collapsed:
            checkpoint.save(gan=trainer.state(), history=history.rows, step=0, sums={})
        if collapsed:
            raise collapsed
    bar.close()

    # Save.
    final = trainer.state()
    if accelerator.is_main_process:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        save_weights(untrained, out / "generator-initial.safetensors")
        described = {
            "architecture": architecture,
            "training": settings,
            "store": store.fingerprint,
            "features": store.spec.to_dict(),
        }
        save_gan(out, final, described)
    accelerator.wait_for_everyone()  # what comes next may read what the main process wrote
    accelerator.end_training()
    checkpoint.remove()
    return history.rows[-1]


def check_store(config: TrainGanConfig, store: FeatureStore) -> None:
    """Refuse a store that this configuration cannot be trained on.

    Raises
    ------
    ConfigError
        When the feature map does not divide by the generator's up-sampling, or an epoch has fewer samples than a batch.
    SpecMismatchError
        When the image encoder needs images and the store has none.
    """
    check_input_size(store.spec.mask_shape, store.spec.output_stride)
    smallest, found = 2 * config.discriminator_scales * UPSAMPLING, store.spec.feature_shape[1:]
    if min(found) < smallest:
        message = f"{config.discriminator_scales} scales need features of {smallest} x {smallest} or more, found {found}"
        raise ConfigError(
            "train_gan.discriminator_scales", message, expected=smallest, actual=found
        )
    seen = config.repeats * len(store.positions("identity"))
    if seen < config.batch_size:
        message = f"{config.batch_size} is more than the {seen} samples that an epoch takes from {store.path}; lower it, or raise repeats"
        raise ConfigError("train_gan.batch_size", message, expected=seen, actual=config.batch_size)
    channels = store.spec.feature_shape[0]
    if config.family == "flow" and config.flow_components > channels:
        message = f"{config.flow_components} is more than the {channels} channels of {store.path}; lower it"
        raise ConfigError(
            "train_gan.flow_components", message, expected=channels, actual=config.flow_components
        )
    if config.projection_channels > channels:
        message = f"{config.projection_channels} is more than the {channels} channels of {store.path}; lower it, or 0 to see all"
        raise ConfigError(
            "train_gan.projection_channels",
            message,
            expected=channels,
            actual=config.projection_channels,
        )
    if config.image_encoder and not store.spec.has_images:
        raise SpecMismatchError(
            "train_gan.image_encoder needs images; set extract.store_images to true",
            path=store.path,
        )


def check_input_size(size: tuple[int, int], output_stride: int) -> None:
    """Refuse images (H, W) whose features the generator cannot make.

    Raises
    ------
    ConfigError
        When H or W is no multiple of the backbone's stride times the generator's up-sampling.
    """
    step = output_stride * UPSAMPLING
    if (
        size[0] % step or size[1] % step or min(size) < 2 * step
    ):  # smaller maps leave the discriminator a single pixel
        message = f"must be a multiple of {step} from {2 * step} on (backbone stride times the generator's up-sampling), found {size}"
        raise ConfigError("extract.input_size", message, expected=step, actual=size)


def describe(config: TrainGanConfig, store: FeatureStore) -> dict[str, Any]:
    """Everything that :func:`stages.gan.networks.build_networks` needs, JSON-ready."""
    spec = store.spec
    chosen = {key: value for key, value in config.model_dump().items() if key in ARCHITECTURE}
    return {
        "num_classes": spec.num_classes,
        "feature_shape": list(spec.feature_shape),
        "output_stride": spec.output_stride,
        "nonnegative": spec.nonnegative,
        **chosen,
    }
