"""The families of generators: how fresh networks and their trainers are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from featurestore import FeatureStore
from stages.backbones.map_network import load_map_network
from stages.common.runtime import Machine
from stages.gan.flow_trainer import FlowTrainer
from stages.gan.gan_trainer import GanTrainer
from stages.gan.image_trainer import ImageTrainer, JointImageTrainer
from stages.gan.networks import (
    Networks,
    build_networks,
    class_means,
    feature_discriminator,
    feature_scale,
)
from stages.gan.trainer import Trainer
from stages.segmentation.folds import Folds

TRAINERS: dict[str, type[Trainer]] = {
    "gan": GanTrainer,
    "flow": FlowTrainer,
    "image": ImageTrainer,
}
JOINT_TRAINERS: dict[str, type[Trainer]] = {"gan": GanTrainer, "image": JointImageTrainer}


def create_networks(
    architecture: Mapping[str, Any],
    settings: Mapping[str, Any],
    store: FeatureStore,
    device: torch.device,
    backbone_weights: str,
) -> Networks:
    """Build fresh networks for the features of a store.

    Parameters
    ----------
    architecture
        As :func:`stages.train_gan.describe` returns it.
    settings
        Section ``train_gan`` of the parameters.
    store
        Training features.
    device
        Where their statistics are computed.
    backbone_weights
        ``extract.weights``; read for a generator of images.

    Raises
    ------
    ConfigError, DataError
        When a generator of images cannot load the backbone that made the features.
    """
    scale = feature_scale(store, settings["feature_scale"])
    means = class_means(store, scale, device) if settings["prior"] == "class-means" else None
    backbone = None
    if settings["family"] == "image":
        with torch.random.fork_rng(devices=[]):  # other networks do not depend on the backbone
            backbone = load_map_network(store.spec, backbone_weights, key="extract.weights")
    networks = build_networks(architecture, scale, means, backbone)
    TRAINERS[settings["family"]].fit(networks, store, settings)
    return networks


def build_trainer(
    accelerator: Accelerator,
    networks: Networks,
    settings: Mapping[str, Any],
    machine: Machine,
    folds: Folds,
) -> Trainer:
    """Build the pretraining's trainer of the family that section ``train_gan`` names.

    ``folds`` are the layers of the features, see :mod:`stages.segmentation.folds`.
    """
    return TRAINERS[settings["family"]].of(accelerator, networks, settings, machine, folds)


def build_joint_trainer(
    accelerator: Accelerator,
    networks: Networks,
    architecture: Mapping[str, Any],
    settings: Mapping[str, Any],
    machine: Machine,
    folds: Folds,
) -> Trainer:
    """Build the trainer that trains pretrained networks further while a decoder learns.

    Where the pretraining's discriminator judged images, an untrained one of features replaces it.
    """
    if architecture.get("discriminates") == "images":
        networks = replace(networks, discriminator=feature_discriminator(architecture))
    return JOINT_TRAINERS[settings["family"]].of(accelerator, networks, settings, machine, folds)
