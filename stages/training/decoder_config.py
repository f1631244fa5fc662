"""Section ``train_decoder`` of params.yaml, the decoder it describes, and what that needs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from featurestore import FeatureStore, StoreSpec
from stages.common.config import Beta, Config, LayerName, Listed, Once
from stages.common.errors import ConfigError
from stages.common.runtime import Precision
from stages.models.decoder import Head
from stages.models.deeplabv3plus import has_pyramid
from stages.segmentation.image_transforms import ImageTransform


class TrainDecoderConfig(Config):
    """Section ``train_decoder`` of params.yaml: what all decoders have in common."""

    epochs: int = Field(50, ge=1, description="epochs, besides the GAN's frozen_epochs")
    repeats: int = Field(1, ge=1, description="repeats of the training samples per epoch")
    batch_size: int = Field(
        32, ge=2, description="samples a step; BatchNorm after global pooling needs two"
    )
    gradient_accumulation: int = Field(1, ge=1, description="micro-batches a step, to save memory")
    layers: Annotated[tuple[LayerName, ...], Listed, Once] = Field(
        (), description="stored layers that the decoder reads; []: all"
    )
    decoder: Head = Field(
        "deeplab", description="head; deeplabv3plus needs a layer finer than the grid"
    )
    width: int = Field(256, ge=1, description="channels of the deeplab heads")
    atrous_rates: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Listed, Field(min_length=1)
    ] = Field((12, 24, 36), description="rates of the deeplab heads; [6, 12] for 16 x 16 maps")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="null: 0.5 for deeplab, 0.1 for the others"
    )
    lr: float = Field(5e-4, gt=0, description="learning rate")
    lr_schedule: Literal["constant", "poly"] = Field(
        "constant", description="poly: falls to 0 with the steps"
    )
    backbone: Literal["frozen", "trained"] = Field(
        "frozen", description="trained: images pass the backbone in every step"
    )
    backbone_lr: float = Field(5e-5, ge=0, description="learning rate of a trained backbone")
    backbone_batchnorm: Literal["eval", "train"] = Field(
        "eval", description="BatchNorm of a trained backbone; eval keeps its statistics"
    )
    image_augment: Annotated[tuple[ImageTransform, ...], Listed, Once] = Field(
        ("flip", "crop", "colour"), description="image transforms of a trained backbone"
    )
    betas: Annotated[tuple[Beta, Beta], Listed] = Field((0.9, 0.999), description="of Adam")
    weight_decay: float = Field(0.0, ge=0, description="of convolution weights (AdamW)")
    class_weight_cap: float = Field(
        1.0, ge=1, description="largest weight of a rare class in the loss; 1: all weigh 1"
    )
    mixed_precision: Precision = Field(
        "no", description="of decoder and GAN; tf32 and fp16 need a GPU"
    )


def describe(config: TrainDecoderConfig, spec: StoreSpec) -> dict[str, Any]:
    """Describe the decoder by the arguments of :class:`stages.models.decoder.Decoder`."""
    return {
        "head": config.decoder,
        "in_channels": spec.feature_shape[0],
        "num_classes": spec.num_classes,
        "width": config.width,
        "atrous_rates": config.atrous_rates,
        "dropout": config.dropout,
        "folds": spec.folds,
    }


def check_decoder(config: TrainDecoderConfig, store: FeatureStore) -> None:
    """Refuse a decoder that needs layers which the store lacks.

    Raises
    ------
    ConfigError
        When ``deeplabv3plus`` has no layer on the grid, or none that is finer.
    """
    spec = store.spec
    if config.decoder != "deeplabv3plus" or has_pyramid(spec.folds):
        return
    grid = " x ".join(map(str, spec.feature_shape[1:]))
    stored = ", ".join(
        f"{layer.name or spec.backbone} {layer.shape[1]} x {layer.shape[2]}"
        for layer in spec.layers
    )
    message = (
        f"deeplabv3plus needs a layer on the grid {grid} and a finer one, found {stored} in"
        f" {store.path}; add a layer of stride 4 to extract.layers, or choose another decoder"
    )
    raise ConfigError("train_decoder.decoder", message, actual=spec.folds)
