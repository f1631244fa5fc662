"""What the trainers of all generators share: networks, optimizers, the average, and their state."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from typing_extensions import Self

from featurestore import FeatureStore
from stages.common.distributed import full_state, load_optimizer_state, shard_like
from stages.common.errors import ConfigError
from stages.common.runtime import Machine, distribute, load_scaler_state, scaler_state
from stages.gan.networks import Networks
from stages.gan.objective import Step
from stages.models.average import AverageNetwork
from stages.models.feature_generator import FeatureGenerator
from stages.segmentation.folds import Folds

Loss = tuple[Tensor, list[nn.Parameter]]  # a scalar, and the parameters that it trains


class Trainer(ABC):
    """Networks in training.

    Parameters
    ----------
    networks
        Fresh or loaded networks; they are changed in place.
    ema_decay
        Above 0: a second generator is the average of the first one's weights with this decay a
        step (:class:`AverageNetwork`), and is the one to generate with.
    machine
        ``compile`` and ``shard`` apply. With sharded weights all processes must call
        :meth:`state_dict` and :meth:`generator` together.

    Raises
    ------
    ConfigError
        When there is an average and weights are sharded.

    Attributes
    ----------
    modules
        What training calls, by network: wrapped where there are several processes.
    optimizers
        By name.
    generator_parameters, discriminator_parameters
        What the two losses of a step train; a flow has no discriminator.
    steps
        Number of steps taken.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        networks: Networks,
        *,
        ema_decay: float = 0.0,
        machine: Machine | None = None,
    ) -> None:
        machine = machine or Machine()
        self.accelerator = accelerator
        self.sharded = machine.shard and accelerator.num_processes > 1
        if self.sharded and ema_decay:
            message = "an average of sharded weights is not kept; set it to 0, or remove --shard"
            raise ConfigError("train_gan.ema_decay", message)
        self._replica = copy.deepcopy(networks.generator) if self.sharded else None
        self.networks = networks
        self.steps = 0
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.modules: dict[str, nn.Module] = {}
        for name, network in networks.by_name().items():
            network.train()
            module = self._called(network)
            if machine.compile:  # back-propagation passes a network twice
                torch._functorch.config.donated_buffer = False
            self.modules[name] = distribute(
                accelerator, module, compile=machine.compile, sharded=self.sharded
            )
        average = AverageNetwork(networks.generator, ema_decay) if ema_decay else None
        self._average = average
        trained = [networks.generator, networks.image_encoder]
        self.generator_parameters = _parameters(*trained)
        self.discriminator_parameters = _parameters(networks.discriminator)

    @staticmethod
    def fit(networks: Networks, store: FeatureStore, settings: Mapping[str, Any]) -> None:
        """Fit fresh networks' statistics to a store's features before the training."""

    @classmethod
    @abstractmethod
    def of(
        cls,
        accelerator: Accelerator,
        networks: Networks,
        settings: Mapping[str, Any],
        machine: Machine,
        folds: Folds,
    ) -> Self:
        """Build the trainer that section ``train_gan`` of the parameters describes.

        ``folds`` are the layers of the features; only transforms of features read them.
        """

    @abstractmethod
    def forward(
        self,
        features: Tensor,
        masks: Tensor,
        images: Tensor | None,
        *,
        weights: Tensor | None = None,
        ratio: int = 1,
        rng: torch.Generator,
    ) -> Step:
        """Compute the losses of a batch.

        Parameters
        ----------
        features
            (B, C, h, w) in the backbone's scale.
        masks
            (B, H, W) uint8.
        images
            (B, 3, H, W) uint8; read by an image encoder.
        weights
            (B,) weights of the samples, 0 to 1; None: all weigh 1.
        ratio
            Draws of z a mask.
        rng
            The same in all processes: the noise of a batch does not depend on their number.
        """

    def losses_with_parameters(self, step: Step) -> list[Loss]:
        """List a step's losses in the order of their back-propagation, with what each trains.

        The discriminator's comes first: the generator's graph is then freed by its own.
        """
        return [
            (step.discriminator_loss, self.discriminator_parameters),
            (step.generator_loss, self.generator_parameters),
        ]

    def after_optimizer_step(self) -> None:
        """Count a step of the optimizers and update the average."""
        self.steps += 1
        if self._average is not None:
            self._average.update(self.networks.generator, first=self.steps == 1)

    def describe(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Describe the networks in training, given the description of the pretrained ones."""
        return dict(architecture)

    def _called(self, network: nn.Module) -> nn.Module:
        """Return what training calls of a network."""
        return network

    def generator(self) -> FeatureGenerator:
        """Return the generator to generate with: the average if there is one.

        Of sharded weights it is a whole copy.
        """
        if self._replica is not None:
            self._replica.load_state_dict(full_state(self.networks.generator.state_dict()))
            return self._replica.to(self.accelerator.device)
        return self.networks.generator if self._average is None else self._average.module

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a training resumes from."""
        networks = self.networks.by_name().items()
        return {
            "networks": {name: full_state(network.state_dict()) for name, network in networks},
            "training": self.training_state(),
        }

    def training_state(self) -> dict[str, Any]:
        """Return what is not in the networks: optimizers, loss scale, number of steps, average."""
        optimizers = self.optimizers.items()
        return {
            "optimizers": {name: full_state(each.state_dict()) for name, each in optimizers},
            "scaler": scaler_state(self.accelerator),
            "steps": self.steps,
            "average": None if self._average is None else self._average.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, network in self.networks.by_name().items():
            network.load_state_dict(shard_like(state["networks"][name], network.state_dict()))
        self.load_training_state(state["training"])

    def load_pretraining(self, state: Mapping[str, Any]) -> None:
        """Continue from the :meth:`training_state` that ``train-gan`` saved."""
        self.load_training_state(state)

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""
        for name, optimizer in self.optimizers.items():
            load_optimizer_state(optimizer, state["optimizers"][name])
        load_scaler_state(self.accelerator, state["scaler"])
        self.steps = state["steps"]
        if self._average is not None:
            self._average.load_state_dict(state["average"])


def _parameters(*networks: nn.Module | None) -> list[nn.Parameter]:
    return [
        parameter
        for network in networks
        if network is not None
        for parameter in network.parameters()
        if parameter.requires_grad  # not those of a frozen backbone
    ]
