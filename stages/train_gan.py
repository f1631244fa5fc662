"""train-gan: generator and discriminator without a decoder (Algorithm 1, first branch)."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

import featurestore
from featurestore import FeatureStore, SpecMismatchError
from stages.common.config import Beta, Config, Once, Seed
from stages.common.errors import ConfigError
from stages.common.runtime import Machine, seed_everything, verify_stores
from stages.common.runtime import generator as random_generator
from stages.gan.families import build_trainer, create_networks
from stages.gan.monitor import MEASURED, MonitorConfig
from stages.models.generator import UPSAMPLING
from stages.segmentation.transforms import Transform
from stages.training.models import save_gan, save_weights
from stages.training.session import Session, check_batch
from stages.training.update import backward, step_optimizers


class TrainGanConfig(Config):
    """Section ``train_gan`` of params.yaml."""

    family: Literal["gan", "flow"]
    flow_components: int = Field(ge=1)
    flow_width: int = Field(ge=2)
    flow_steps: int = Field(ge=1)
    frozen_epochs: int = Field(ge=1)
    passes: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    gradient_accumulation: int = Field(ge=1)
    z_dim: int = Field(ge=0)
    noise: Literal["vector", "spatial"]
    prior: Literal["none", "class-means"]
    ngf: int = Field(ge=1)
    spade_hidden: int = Field(ge=1)
    norm: Literal["batch", "instance"]
    ndf: int = Field(ge=1)
    discriminator_layers: int = Field(ge=2, le=5)
    discriminator_scales: int = Field(ge=1, le=2)
    projection_channels: int = Field(ge=0)
    image_encoder: bool
    nef: int = Field(ge=1)
    init_gain: float = Field(gt=0)
    feature_scale: Literal["channel", "global", "none"]
    adversarial_loss: Literal[
        "hinge", "non-saturating", "wasserstein-clip", "wasserstein-gp", "segmentation"
    ]
    lambda_feat: float = Field(ge=0)
    lambda_kld: float = Field(ge=0)
    lambda_rec: float = Field(ge=0)
    r1_gamma: float = Field(ge=0)
    diffaugment: Annotated[tuple[Transform, ...], Field(strict=False), Once]
    ema_decay: float = Field(ge=0, lt=1)
    generator_lr: float = Field(gt=0)
    discriminator_lr: float = Field(gt=0)
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)]
    mixed_precision: Literal["no", "bf16", "fp16"]
    seed: Seed

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        patch_keys = self.r1_gamma or self.discriminator_scales > 1
        if self.adversarial_loss == "segmentation" and patch_keys:
            raise ValueError(
                "r1_gamma and discriminator_scales belong to a patch discriminator;"
                " adversarial_loss segmentation has none"
            )
        if self.image_encoder and (not self.z_dim or self.noise == "spatial"):
            raise ValueError(
                "the image encoder gives a noise vector; set z_dim above 0 and noise to vector,"
                " or image_encoder to false"
            )
        if self.noise == "spatial" and not self.z_dim:
            raise ValueError(
                "spatial noise is z at every pixel; set z_dim above 0, or noise to vector"
            )
        if self.family == "flow" and (self.image_encoder or self.r1_gamma or self.diffaugment):
            raise ValueError(
                "image_encoder, r1_gamma and diffaugment are a GAN's; turn them off"
                " (false, 0, []), or set family to gan"
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
    machine: Machine,
) -> dict[str, float]:
    """Train FeatureGAN on a store's features and write its networks to ``out``.

    Parameters
    ----------
    config, monitoring
        Networks, losses, schedule; how training is monitored.
    features
        Folder of the stores ``train`` and ``val``; the monitor compares with ``val``.
    out
        Folder of ``generator``, ``discriminator``, ``image_encoder`` (``.safetensors``), the
        untrained ``generator-initial``, ``optimizers.pt`` and ``config.json``.
    metrics, logs
        Folders of DVCLive's and TensorBoard's files.
    machine
        How this machine computes; an interrupted run resumes from ``machine.scratch``.

    Returns
    -------
    dict
        Mean losses and measures of the last epoch.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        Parameters that do not fit the stores, or a damaged store or checkpoint.
    CollapseError, DivergenceError
        When the GAN collapsed and ``monitor.on_collapse`` is ``stop``; when a loss is not finite.
    """
    session = Session(__name__, "train-gan", machine, config, metrics=metrics, logs=logs)
    accelerator = session.accelerator
    store, held_out = featurestore.open(features / "train"), featurestore.open(features / "val")
    check_store(config, store, accelerator.num_processes)
    verify_stores(store, held_out, workers=machine.workers)
    loader = session.loader(
        store,
        config.batch_size,
        seed=config.seed,
        drop_last=True,
        positions=store.positions("identity"),
        repeats=config.passes,
        images=config.image_encoder,
    )

    seed_everything(config.seed)
    settings, architecture = config.model_dump(), describe(config, store)
    networks = create_networks(architecture, settings, store)
    untrained = copy.deepcopy(networks.generator.state_dict())
    trainer = build_trainer(accelerator, networks, settings, machine)
    stores = {"train": store, "val": held_out}
    session.watch(
        monitoring, trainer.generator, stores, seed=config.seed, epochs=config.frozen_epochs
    )
    identity = {
        "config": settings,
        "monitor": monitoring.model_dump(include=MEASURED),
        "stores": [store.fingerprint, held_out.fingerprint],
    }
    session.resume(loader, config.frozen_epochs, identity=identity, state={"trainer": trainer})

    # Train. The order of the batches and all noise are functions of seed, epoch and step.
    for epoch in session.epochs():
        for number, batch in session.batches(epoch):
            for micro, samples in enumerate(batch.split(config.gradient_accumulation)):
                rng = random_generator(accelerator.device, config.seed, epoch, number, micro)
                with accelerator.accumulate(*trainer.modules.values()):
                    step = trainer.forward(
                        samples.features, samples.masks, samples.images, ratio=1, rng=rng
                    )
                    backward(accelerator, *trainer.losses(step))
                    if step_optimizers(accelerator, *trainer.optimizers.values()):
                        trainer.after_step()
                session.log(step.terms)
                del step  # and what is left of its graph
            session.save_if_due(number + 1)
        session.end_epoch({**session.means(), **session.measure(epoch)})

    state = trainer.state_dict()
    if accelerator.is_main_process:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        save_weights(untrained, out / "generator-initial.safetensors")
        trained_on = {"store": store.fingerprint, "features": store.spec.to_dict()}
        save_gan(out, state, {"architecture": architecture, "training": settings, **trained_on})
    session.finish()
    return session.history.rows[-1]


def check_store(config: TrainGanConfig, store: FeatureStore, processes: int = 1) -> None:
    """Refuse a store, or a number of processes, that this configuration cannot be trained with.

    Raises
    ------
    ConfigError
        When the feature map does not divide by the generator's up-sampling, a batch does not divide
        over the processes, or there are fewer samples or channels than the parameters need.
    SpecMismatchError
        When the image encoder needs images and the store has none.
    """
    check_batch(config, store, processes, "train_gan")
    check_input_size(store.spec.mask_shape, store.spec.output_stride)
    channels, *size = store.spec.feature_shape
    scales = config.discriminator_scales
    least = 2 * scales * UPSAMPLING
    if min(size) < least:
        message = f"{scales} scales need features of {least} x {least} or more, found {size}"
        raise ConfigError("train_gan.discriminator_scales", message, expected=least, actual=size)
    limited = {"projection_channels": "lower it, or 0 to see all"}
    if config.family == "flow":
        limited["flow_components"] = "lower it"
    for key, remedy in limited.items():
        value = getattr(config, key)
        if value > channels:
            message = f"{value} is more than the {channels} channels of {store.path}; {remedy}"
            raise ConfigError(f"train_gan.{key}", message, expected=channels, actual=value)
    if config.image_encoder and not store.spec.has_images:
        message = "train_gan.image_encoder needs images; set extract.store_images to true"
        raise SpecMismatchError(message, path=store.path)


def check_input_size(size: tuple[int, int], output_stride: int) -> None:
    """Refuse images (H, W) whose features the generator cannot make.

    Raises
    ------
    ConfigError
        When H or W is no multiple of the backbone's stride times the generator's up-sampling, or
        the discriminator would see a single pixel.
    """
    step = output_stride * UPSAMPLING
    if size[0] % step or size[1] % step or min(size) < 2 * step:
        message = (
            f"must be a multiple of {step} from {2 * step} on (backbone stride times the"
            f" generator's up-sampling), found {size}"
        )
        raise ConfigError("extract.input_size", message, expected=step, actual=size)


def describe(config: TrainGanConfig, store: FeatureStore) -> dict[str, Any]:
    """Collect what :func:`stages.gan.networks.build_networks` needs, JSON-ready."""
    spec = store.spec
    chosen = {key: value for key, value in config.model_dump().items() if key in ARCHITECTURE}
    return {
        "num_classes": spec.num_classes,
        "feature_shape": list(spec.feature_shape),
        "output_stride": spec.output_stride,
        "nonnegative": spec.nonnegative,
        **chosen,
    }
