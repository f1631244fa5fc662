"""train-gan: generator and discriminator without a decoder (Algorithm 1, first branch)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from featurestore import FeatureStore, SpecMismatchError
from featurestore.dataset import FeatureLoader, PairedLoader
from featurestore.files import renew_folder
from stages.common.config import Beta, Config, LayerName, Listed, Once, Seed
from stages.common.errors import ConfigError
from stages.common.runtime import Machine, Precision, seed_everything, verify_stores
from stages.common.runtime import generator as random_generator
from stages.gan.families import build_trainer, create_networks
from stages.gan.monitor import MEASURED, MonitorConfig
from stages.segmentation.transforms import Transform
from stages.training.models import save_gan, save_weights
from stages.training.pseudo_masks import PseudoMasks, SampleSource
from stages.training.session import Session, check_batch
from stages.training.stores import Features, check_like, open_split
from stages.training.update import BatchNormGuard, backward, step_and_zero_grad

EVERY_PROCESS_READS_ALL = {"rank": 0, "ranks": 1, "cache": "none"}
LEAST_SIDE = 8  # of the feature maps that a discriminator sees
# Keys that a generator of images, and one without SPADE, do not read.
OTHERS_THAN_IMAGE = (
    "conditioning",
    "prior",
    "noise",
    "flow_components",
    "flow_width",
    "flow_steps",
    "discriminator_norm",
    "lambda_info",
)
OTHERS_THAN_CONCAT = ("family", "prior", "noise")


class TrainGanConfig(Config):
    """Section ``train_gan`` of params.yaml."""

    layers: Annotated[tuple[LayerName, ...], Listed, Once] = Field(
        (), description="stored layers that are generated; []: all"
    )
    family: Literal["gan", "flow", "image"] = Field(
        "gan",
        description="flow: flow matching; image: a generator of images in front of the backbone",
    )
    conditioning: Literal["spade", "concat"] = Field(
        "spade", description="concat: mask and z are only concatenated, at the start"
    )
    flow_components: int = Field(64, ge=1, description="principal components that a flow models")
    flow_width: int = Field(64, ge=2, description="channels of a flow's blocks")
    flow_steps: int = Field(16, ge=1, description="steps of a flow's integration")
    frozen_epochs: int = Field(75, ge=1, description="epochs before any decoder is trained")
    repeats: int = Field(1, ge=1, description="repeats of the training samples per epoch")
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
        1, ge=1, le=2, description="discriminators; the second sees half the size"
    )
    projection_channels: int = Field(
        0, ge=0, description="random mixtures that the discriminator sees; 0: all channels"
    )
    discriminator_norm: Literal["spectral", "none"] = Field(
        "spectral", description="normalization of the discriminator's weights"
    )
    image_encoder: bool = Field(False, description="draw z from the image (VAE)")
    nef: int = Field(64, ge=1, description="image encoder width")
    init_gain: float = Field(0.02, gt=0, description="gain of the weights' initialization")
    feature_scale: Literal["channel", "global", "none"] = Field(
        "channel", description="features are divided by root mean squares before the GAN"
    )
    adversarial_loss: Literal[
        "hinge", "non-saturating", "wasserstein-clip", "wasserstein-gp", "segmentation"
    ] = Field("hinge", description="adversarial loss")
    lambda_feat: float = Field(7.0, ge=0, description="weight of feature matching")
    lambda_kld: float = Field(0.05, ge=0, description="weight of the image encoder's divergence")
    kld_reduction: Literal["mean", "sum"] = Field(
        "mean", description="divergence over the batch: averaged, or summed (SPADE)"
    )
    lambda_info: float = Field(
        0.0, ge=0, description="weight of InfoGAN's loss, the error of an estimated z; 0: off"
    )
    lambda_rec: float = Field(
        0.0, ge=0, description="weight of the squared difference from the real features; 0: off"
    )
    r1_gamma: float = Field(0.0, ge=0, description="weight of R1; 0: off")
    diffaugment: Annotated[tuple[Transform, ...], Listed, Once] = Field(
        (), description="transforms before the discriminator"
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of the generator's average per step; 0: off"
    )
    unlabelled: bool = Field(
        False, description="also learn from unlabelled images, with masks of a linear decoder"
    )
    generator_lr: float = Field(2e-4, gt=0, description="learning rate of the generator")
    discriminator_lr: float = Field(8e-4, gt=0, description="learning rate of the discriminator")
    betas: Annotated[tuple[Beta, Beta], Listed] = Field((0.0, 0.9), description="of Adam")
    mixed_precision: Precision = Field("no", description="tf32 and fp16 need a GPU")
    seed: Seed = Field(0, description="seed of weights, order and noise")

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
        if self.family == "image" and self.adversarial_loss == "segmentation":
            raise ValueError(
                "adversarial_loss segmentation needs a discriminator of features; set it to hinge,"
                " or family to gan"
            )
        if self.family == "image":
            self._refuse("family image", "family to gan", OTHERS_THAN_IMAGE)
        if self.conditioning == "concat":
            self._refuse("conditioning concat", "conditioning to spade", OTHERS_THAN_CONCAT)
        return self

    @model_validator(mode="after")
    def _losses_apply(self) -> Self:
        if self.family == "flow" and (self.lambda_info or self.discriminator_norm == "none"):
            raise ValueError(
                "a flow has no discriminator; set lambda_info to 0 and discriminator_norm to"
                " spectral, or family to gan"
            )
        if self.lambda_info and not self.z_dim:
            raise ValueError(
                "lambda_info needs a z to find in generated features; set z_dim above 0, or"
                " lambda_info to 0"
            )
        if self.kld_reduction == "sum" and not self.image_encoder:
            raise ValueError(
                "kld_reduction applies to the divergence of an image encoder; set image_encoder to"
                " true, or kld_reduction to mean"
            )
        return self

    def _refuse(self, kind: str, remedy: str, keys: Sequence[str]) -> None:
        """Refuse keys of other generators that do not have their defaults."""
        for key in keys:
            found, default = getattr(self, key), type(self).model_fields[key].default
            if found != default:
                message = (
                    f"{key} {found} does not work with {kind}; set it to {default}, or {remedy}"
                )
                raise ValueError(message)

    @property
    def reads_images(self) -> str:
        """Key and value that make the training read the stored images; empty: it reads none."""
        if self.family == "image":
            return "family image"
        return "image_encoder" if self.image_encoder else ""


ARCHITECTURE = (
    "family",
    "conditioning",
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
    "discriminator_norm",
    "lambda_info",
    "adversarial_loss",
    "image_encoder",
    "nef",
    "init_gain",
)


def run(
    config: TrainGanConfig,
    monitoring: MonitorConfig,
    *,
    features: Features,
    out: Path,
    metrics: Path,
    logs: Path,
    machine: Machine,
    backbone_weights: str = "default",
) -> dict[str, float]:
    """Train FeatureGAN on a store's features and write its networks to ``out``.

    Parameters
    ----------
    config, monitoring
        Networks, losses, schedule; how training is monitored.
    features
        Stores ``train``, ``val`` and, with ``unlabelled``, that one, or their folder. The monitor
        compares with ``val``.
    out
        Folder of ``generator``, ``discriminator``, ``image_encoder`` (``.safetensors``), the
        untrained ``generator-initial``, ``optimizers.pt`` and ``config.json``.
    metrics, logs
        Folders of DVCLive's and TensorBoard's files.
    machine
        How this machine computes; an interrupted run resumes from ``machine.scratch``.
    backbone_weights
        ``extract.weights``: of the backbone behind a generator of images.

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
    stores = open_checked(config, features, machine, accelerator.num_processes)
    store = stores["train"]
    loader = training_loader(session, config, stores)
    seed_everything(config.seed)
    settings, architecture = config.model_dump(), describe(config, store)
    networks = create_networks(architecture, settings, store, accelerator.device, backbone_weights)
    untrained = copy.deepcopy(networks.generator.state_dict())
    trainer = build_trainer(accelerator, networks, settings, machine, store.spec.folds)  # for flips
    epochs = config.frozen_epochs  # no decoder learns yet
    # Measures the untrained generator, or its average: so before ``resume``.
    session.watch(monitoring, trainer.generator, stores, seed=config.seed, epochs=epochs)
    identity = identify(config, monitoring, stores)
    source = PseudoMasks(store.spec, accelerator.device) if config.unlabelled else SampleSource()
    session.resume(loader, epochs, identity=identity, state={"trainer": trainer, "source": source})
    source.fit_unless_restored(  # the linear decoder that predicts pseudo-masks
        labelled_loader(session, config, store, **EVERY_PROCESS_READS_ALL), config.seed
    )
    # After ``resume``: it copies statistics. In fp16 an overflow must leave no infinite ones.
    guard = BatchNormGuard(accelerator, trainer.modules.values())

    # The order of the batches and all noise are functions of seed, epoch, step and micro-batch.
    # All processes draw the noise of the whole batch, and ``forward`` takes this process's part.
    for epoch in session.epochs():
        for index, batch in session.batches(epoch):
            for micro_index, micro_batch in enumerate(batch.chunk(config.gradient_accumulation)):
                rng = random_generator(accelerator.device, config.seed, epoch, index, micro_index)
                samples = source.take(micro_batch)  # with `unlabelled` twice as many
                with accelerator.accumulate(*trainer.modules.values()):  # sets sync_gradients
                    output = trainer.forward(
                        *(samples.features, samples.masks, samples.images),
                        weights=samples.weights,  # confidence in pseudo-masks; None: all 1
                        rng=rng,
                    )
                    backward(  # Algorithm 1: both gradients before either step
                        accelerator,
                        # Flow matching has no discriminator; without parameters it is left out.
                        (output.discriminator_loss, trainer.discriminator_parameters),
                        (output.generator_loss, trainer.generator_parameters),
                    )
                    if accelerator.sync_gradients:  # the last micro-batch
                        step_and_zero_grad(accelerator, *trainer.optimizers.values(), guard=guard)
                        trainer.after_optimizer_step()  # generator's average, WGAN's clipping
                session.log({**output.terms, **samples.logged})  # adds to the means of the epoch
                del output  # frees the discriminator's graph, which `backward` retained
            session.save_if_due(index + 1)
        # Writes the row, may save, and stops a collapsed GAN.
        session.end_epoch({**session.take_means(), **session.measure_if_due(epoch)})

    trained = trainer.state_dict()  # in all processes: sharded weights are gathered
    if accelerator.is_main_process:
        renew_folder(out)
        save_weights(untrained, out / "generator-initial.safetensors")  # the report compares it
        trained_on = {"store": store.fingerprint, "features": store.spec.to_dict()}
        save_gan(out, trained, {"architecture": architecture, "training": settings, **trained_on})
    session.finish()
    return session.history.rows[-1]


def labelled_loader(
    session: Session, config: TrainGanConfig, store: FeatureStore, **options: Any
) -> FeatureLoader:
    """Read the labelled training samples, without mirrored images."""
    options = {
        "seed": config.seed,
        "drop_last": True,
        "positions": store.positions("identity"),
        "repeats": config.repeats,
        "images": bool(config.reads_images),
        **options,
    }
    return session.loader(store, config.batch_size, **options)


def training_loader(
    session: Session, config: TrainGanConfig, stores: Mapping[str, FeatureStore]
) -> FeatureLoader | PairedLoader:
    """Read the labelled samples and, with ``unlabelled``, as many unlabelled ones beside them."""
    loader = labelled_loader(session, config, stores["train"])
    if not config.unlabelled:
        return loader
    return session.paired(
        loader,
        stores["unlabelled"],
        config.batch_size,
        seed=config.seed,
        drop_last=True,
        images=bool(config.reads_images),
    )


def open_checked(
    config: TrainGanConfig, features: Features, machine: Machine, processes: int
) -> dict[str, FeatureStore]:
    """Open and check the stores of training and validation; errors are those of :func:`run`."""
    splits = ("train", "val", *(["unlabelled"] if config.unlabelled else []))
    stores = {split: open_split(features, split, config.layers) for split in splits}
    check_store(config, stores["train"], processes)
    if config.unlabelled:
        check_like(stores["unlabelled"], stores["train"])
    verify_stores(*stores.values(), workers=machine.workers)
    return stores


def identify(
    config: TrainGanConfig, monitoring: MonitorConfig, stores: Mapping[str, FeatureStore]
) -> dict[str, object]:
    """Collect what the result depends on: an interrupted run resumes only if it is the same."""
    return {
        "config": config.model_dump(),
        "monitor": monitoring.model_dump(include=MEASURED),
        "stores": [store.fingerprint for store in stores.values()],
    }


def check_store(config: TrainGanConfig, store: FeatureStore, processes: int = 1) -> None:
    """Refuse a store, or a number of processes, that this configuration cannot be trained with.

    Raises
    ------
    ConfigError
        When the feature map is too small, a batch does not divide over the processes, or there are
        fewer samples or channels than the parameters need.
    SpecMismatchError
        When the training needs images and the store has none.
    """
    check_batch(config, store, processes, "train_gan")
    check_input_size(store.spec.mask_shape, store.spec.output_stride)
    channels, *size = store.spec.feature_shape
    scales = config.discriminator_scales
    least = scales * LEAST_SIDE
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
    if config.reads_images and not store.spec.has_images:
        key = config.reads_images
        message = f"train_gan.{key} needs images; set extract.store_images to true"
        raise SpecMismatchError(message, path=store.path)


def check_input_size(size: tuple[int, int], output_stride: int) -> None:
    """Refuse images (H, W) whose feature maps are too small for the discriminator.

    Raises
    ------
    ConfigError
        When the feature map has less than 8 rows or columns.
    """
    height, width = (-(-side // output_stride) for side in size)
    if min(height, width) < LEAST_SIDE:
        least = LEAST_SIDE * output_stride
        message = (
            f"{size} gives features of {height} x {width} at stride {output_stride}, and the GAN"
            f" needs {LEAST_SIDE} x {LEAST_SIDE}; use {least} x {least} pixels or more"
        )
        raise ConfigError("extract.input_size", message, expected=least, actual=size)


def describe(config: TrainGanConfig, store: FeatureStore) -> dict[str, Any]:
    """Collect what :func:`stages.gan.networks.build_networks` needs, JSON-ready."""
    spec = store.spec
    # The backbone behind a generator of images is built from the spec.
    images = {"discriminates": "images", "features": spec.to_dict()}
    chosen = {key: value for key, value in config.model_dump().items() if key in ARCHITECTURE}
    return {
        "num_classes": spec.num_classes,
        "feature_shape": list(spec.feature_shape),
        "output_stride": spec.output_stride,
        "nonnegative": spec.nonnegative,
        **chosen,
        **(images if config.family == "image" else {}),
    }
