"""What all trainers of generators share: networks on their device, optimizers, the average, and their state."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stages.common.distributed import divide_like, load_optimizer_state, whole
from stages.common.errors import ConfigError
from stages.common.runtime import distribute, load_scaler_state, scaler_state, step_optimizers
from stages.gan.networks import AnyGenerator, Networks
from stages.gan.objective import Step


class Trainer(ABC):
    """Networks in training.

    Parameters
    ----------
    networks
        Fresh or loaded ones; they are changed in place.
    ema_decay
        Where above 0, a second generator follows the first one's weights as their exponential moving average with this
        decay a step (Yazıcı et al. 2019); it is the one to generate with. Buffers (running statistics) are copied.
    compile_networks
        Whether ``torch.compile`` compiles them.
    sharded
        Whether several processes divide weights and optimizer states, see :func:`stages.common.runtime.distribute`. Then
        all of them must ask for :meth:`state` and :meth:`generator` together.

    Raises
    ------
    ConfigError
        When there is an average and weights are divided.

    Attributes
    ----------
    modules
        What training calls, by network: wrapped where there are several processes.
    optimizers
        By name; a subclass fills it in.
    steps
        How many were taken.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        networks: Networks,
        *,
        ema_decay: float,
        compile_networks: bool,
        sharded: bool,
    ) -> None:
        self.accelerator = accelerator
        self.sharded = sharded and accelerator.num_processes > 1
        if self.sharded and ema_decay:
            raise ConfigError(
                "train_gan.ema_decay",
                "an average of divided weights is not kept; set it to 0, or leave --shard out",
            )
        self._replica = copy.deepcopy(networks.generator) if self.sharded else None
        self.networks = networks
        self.steps = 0
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self._average: AveragedModel | None = None
        if ema_decay:
            self._average = AveragedModel(
                networks.generator.to(accelerator.device),
                multi_avg_fn=get_ema_multi_avg_fn(ema_decay),
            )
        self.modules: dict[str, nn.Module] = {}
        for name, network in networks.by_name().items():
            network.train()
            module = self._called(name, network)
            if compile_networks:
                torch._functorch.config.donated_buffer = (
                    False  # back-propagation through a network may come twice
                )
                module.compile()
            self.modules[name] = distribute(accelerator, module, sharded=self.sharded)

    @abstractmethod
    def forward(
        self,
        features: Tensor,
        masks: Tensor,
        images: Tensor | None,
        *,
        ratio: int,
        rng: torch.Generator,
    ) -> Step:
        """Losses of a batch of features (B, C, h, w) in the backbone's scale, masks (B, H, W) and images, ``ratio`` draws a mask."""

    @abstractmethod
    def update(self, step: Step) -> None:
        """Back-propagate them and step the optimizers."""

    def _called(self, name: str, network: nn.Module) -> nn.Module:
        """What training calls of a network."""
        return network

    def _step(self, *others: torch.optim.Optimizer) -> bool:
        """Step all optimizers, and others with them: see :func:`stages.common.runtime.step_optimizers`."""
        if not step_optimizers(self.accelerator, *self.optimizers.values(), *others):
            return False
        self.steps += 1
        if self._average is not None:
            self._average.update_parameters(self.networks.generator)
        return True

    def generator(self) -> AnyGenerator:
        """The generator to generate with: the average where there is one, a whole copy where weights are divided."""
        if self._replica is not None:
            self._replica.load_state_dict(whole(self.networks.generator.state_dict()))
            return self._replica.to(self.accelerator.device)
        return (
            self.networks.generator
            if self._average is None
            else cast(AnyGenerator, self._average.module)
        )

    # -- state -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that training goes on from."""
        return {
            "networks": {
                name: whole(network.state_dict())
                for name, network in self.networks.by_name().items()
            },
            "training": self.training_state(),
        }

    def training_state(self) -> dict[str, Any]:
        """What is not in the networks: optimizers, loss scaling, the number of steps, the average."""
        return {
            "optimizers": {
                name: whole(optimizer.state_dict()) for name, optimizer in self.optimizers.items()
            },
            "scaler": scaler_state(self.accelerator),
            "steps": self.steps,
            "average": None if self._average is None else self._average.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        for name, network in self.networks.by_name().items():
            network.load_state_dict(divide_like(state["networks"][name], network.state_dict()))
        self.load_training_state(state["training"])

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`training_state`."""
        for name, optimizer in self.optimizers.items():
            load_optimizer_state(optimizer, state["optimizers"][name])
        load_scaler_state(self.accelerator, state["scaler"])
        self.steps = state["steps"]
        if self._average is not None:
            self._average.load_state_dict(state["average"])
