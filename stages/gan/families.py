"""The families of generators: how fresh networks and their trainers are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from featurestore import FeatureStore
from stages.common.runtime import Machine
from stages.gan.flow_trainer import FlowTrainer
from stages.gan.gan_trainer import GanTrainer
from stages.gan.networks import Networks, build_networks, class_means, feature_scale
from stages.gan.trainer import Trainer
from stages.segmentation.folds import Folds

TRAINERS: dict[str, type[Trainer]] = {"gan": GanTrainer, "flow": FlowTrainer}


def create_networks(
    architecture: Mapping[str, Any],
    settings: Mapping[str, Any],
    store: FeatureStore,
    device: torch.device,
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
    """
    scale = feature_scale(store, settings["feature_scale"])
    means = class_means(store, scale, device) if settings["prior"] == "class-means" else None
    networks = build_networks(architecture, scale, means)
    TRAINERS[settings["family"]].fit(networks, store, settings)
    return networks


def build_trainer(
    accelerator: Accelerator,
    networks: Networks,
    settings: Mapping[str, Any],
    machine: Machine,
    folds: Folds,
) -> Trainer:
    """Build the trainer of the family that section ``train_gan`` names.

    ``folds`` are the layers of the features, see :mod:`stages.segmentation.folds`.
    """
    return TRAINERS[settings["family"]].of(accelerator, networks, settings, machine, folds)
