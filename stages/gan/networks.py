"""FeatureGAN's networks, and the statistics of features that they are built with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featurestore import FeatureStore, StoreSpec
from stages.backbones.map_network import MapNetwork, build_map_network
from stages.models.concat_generator import ConcatGenerator
from stages.models.discriminator import Discriminator
from stages.models.feature_generator import FeatureGenerator
from stages.models.flow_generator import FlowGenerator
from stages.models.generator import Generator
from stages.models.image_discriminator import ImageDiscriminator
from stages.models.image_encoder import ImageEncoder
from stages.models.image_generator import ImageFeatureGenerator, ImageGenerator
from stages.segmentation.class_statistics import ClassStatistics

# What descriptions of networks lack that were saved before a key existed.
ADDED = {
    "conditioning": "spade",
    "discriminates": "features",
    "discriminator_norm": "spectral",
    "lambda_info": 0.0,
}


@dataclass
class Networks:
    """The networks of a FeatureGAN; a flow has no discriminator, the image encoder is optional."""

    generator: FeatureGenerator
    discriminator: Discriminator | ImageDiscriminator | None = None
    image_encoder: ImageEncoder | None = None

    def by_name(self) -> dict[str, nn.Module]:
        """Return the networks that exist, by the names of their files."""
        named = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "image_encoder": self.image_encoder,
        }
        return {name: network for name, network in named.items() if network is not None}


def build_networks(
    architecture: Mapping[str, Any],
    feature_scale: Tensor | None = None,
    class_means: Tensor | None = None,
    backbone: MapNetwork | None = None,
) -> Networks:
    """Build fresh networks.

    Parameters
    ----------
    architecture
        As :func:`stages.train_gan.describe` gives it.
    feature_scale
        (C,); None where a state dict will bring it.
    class_means
        (K + 1, C), as :func:`class_means` gives them; None too where a state dict will bring them.
    backbone
        Network of the store's features, for a generator of images; None where a state dict will
        bring its weights.
    """
    settings = {**ADDED, **architecture}
    channels = settings["feature_shape"][0]
    scale = torch.ones(channels) if feature_scale is None else feature_scale
    if settings["family"] == "flow":
        flow = FlowGenerator(
            num_classes=settings["num_classes"],
            feature_shape=tuple(settings["feature_shape"]),
            nonnegative=settings["nonnegative"],
            feature_scale=scale,
            components=settings["flow_components"],
            width=settings["flow_width"],
            steps=settings["flow_steps"],
        )
        return Networks(flow)
    if settings["prior"] == "class-means" and class_means is None:
        class_means = torch.zeros(settings["num_classes"] + 1, channels)
    generator = _generator(settings, scale, class_means, backbone)
    discriminator: Discriminator | ImageDiscriminator
    if settings["discriminates"] == "images":
        discriminator = ImageDiscriminator(ndf=settings["ndf"], **_shared(settings))
    else:
        discriminator = feature_discriminator(settings)
    encoder = None
    if settings["image_encoder"]:
        encoder = ImageEncoder(
            z_dim=settings["z_dim"], nef=settings["nef"], init_gain=settings["init_gain"]
        )
    return Networks(generator, discriminator, encoder)


def feature_discriminator(architecture: Mapping[str, Any]) -> Discriminator:
    """Build a fresh discriminator of features."""
    settings = {**ADDED, **architecture}
    return Discriminator(
        feature_channels=settings["feature_shape"][0],
        output_stride=settings["output_stride"],
        ndf=settings["ndf"],
        layers=settings["discriminator_layers"],
        kind="segmentation" if settings["adversarial_loss"] == "segmentation" else "patch",
        scales=settings["discriminator_scales"],
        projection_channels=settings["projection_channels"],
        norm=settings["discriminator_norm"],
        estimated_z=settings["z_dim"] if settings["lambda_info"] else 0,
        **_shared(settings),
    )


def _generator(
    settings: Mapping[str, Any],
    scale: Tensor,
    class_means: Tensor | None,
    backbone: MapNetwork | None,
) -> FeatureGenerator:
    """Build the generator of a GAN; see :func:`build_networks`."""
    shared = {
        **_shared(settings),
        "z_dim": settings["z_dim"],
        "ngf": settings["ngf"],
        "norm": settings["norm"],
    }
    of_features = {"nonnegative": settings["nonnegative"], "feature_scale": scale}
    if settings["family"] == "image":
        spec = StoreSpec.from_dict(settings["features"])
        hidden = settings["spade_hidden"]
        return ImageFeatureGenerator(
            network=ImageGenerator(image_size=spec.mask_shape, spade_hidden=hidden, **shared),
            backbone=backbone or build_map_network(spec, None),
            bf16=spec.compute == "bf16",
            **of_features,
        )
    of_features["feature_shape"] = tuple(settings["feature_shape"])
    if settings["conditioning"] == "concat":
        return ConcatGenerator(**of_features, **shared)
    return Generator(
        noise=settings["noise"],
        spade_hidden=settings["spade_hidden"],
        class_means=class_means,
        **of_features,
        **shared,
    )


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings that all networks but the image encoder have."""
    return {"num_classes": settings["num_classes"], "init_gain": settings["init_gain"]}


def class_means(store: FeatureStore, scale: Tensor, device: torch.device) -> Tensor:
    """Compute on a device the mean feature vector of each class, (K + 1, C), over ``scale`` (C,).

    Void, and a class without a pixel, get the mean of all labelled pixels.
    """
    statistics = ClassStatistics.of(store, store.positions("identity"), device)
    means, pixels = statistics.means.double().cpu(), statistics.pixels.cpu()
    overall = torch.einsum("kc,k->c", means, pixels) / pixels.sum().clamp(min=1)
    means = torch.where(pixels[:, None] > 0, means, overall)
    return (torch.cat([means, overall[None]]) / scale).float()


def feature_scale(store: FeatureStore, rule: str) -> Tensor:
    """Compute (C,) by which features are divided before the GAN sees them.

    ``channel``: root mean square of each channel; ``global``: of all channels; ``none``: 1. A
    channel that is always zero keeps the scale 1.
    """
    mean_square = torch.from_numpy(store.stats.mean**2 + store.stats.variance)
    if rule == "none":
        return torch.ones(len(mean_square))
    if rule == "global":
        mean_square = mean_square.mean().expand(len(mean_square))
    scale = mean_square.sqrt()
    return torch.where(scale > 0, scale, 1.0).float()
