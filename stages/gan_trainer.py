"""FeatureGAN in training: its networks with their two Adams, and one update of Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stages.distributed import draw_noise
from stages.gan import Networks
from stages.models.generator import Generator
from stages.objective import Objective, Step, forward
from stages.runtime import distribute, load_scaler_state, scaler_state
from stages.runtime import generator as random_generator

CLIP = 0.01  # Arjovsky et al. 2017


def make_trainer(accelerator: Accelerator, networks: Networks, settings: Mapping[str, Any], *, compile_networks: bool) -> Trainer:
    """A trainer as section ``train_gan`` of the parameters describes it."""
    objective = Objective(**{field.name: settings[field.name] for field in fields(Objective) if field.name in settings})
    chosen = {name: settings[name] for name in ("generator_lr", "discriminator_lr", "betas", "ema_decay")}
    return Trainer(accelerator, networks, objective, **chosen, compile_networks=compile_networks)


class Trainer:
    """The networks with their optimizers, on the accelerator's device.

    Parameters
    ----------
    networks
        Fresh or loaded ones; they are changed in place.
    objective
        The losses.
    generator_lr, discriminator_lr, betas
        Of the Adams (thesis: 2e-4, 8e-4, (0, 0.9)).
    ema_decay
        Where above 0, a second generator follows the first one's weights as their exponential moving average with this
        decay a step (Yazıcı et al. 2019); it is the one to generate with. Buffers (running statistics) are copied.
    compile_networks
        Whether ``torch.compile`` compiles generator and discriminator.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        networks: Networks,
        objective: Objective,
        *,
        generator_lr: float,
        discriminator_lr: float,
        betas: tuple[float, float],
        ema_decay: float = 0.0,
        compile_networks: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.networks = networks
        self.objective = objective
        self.steps = 0
        self.average: AveragedModel | None = None
        if ema_decay:
            generator = networks.generator.to(accelerator.device)
            self.average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        # What is called is wrapped where there are several processes; ``networks`` stay as they are.
        self.modules: dict[str, nn.Module] = {}
        for name, network in networks.by_name().items():
            network.train()
            if compile_networks and name != "image_encoder":
                network.compile()
            self.modules[name] = distribute(accelerator, network)
        trained = [networks.generator, *([networks.image_encoder] if networks.image_encoder is not None else [])]
        self.generator_parameters = [parameter for network in trained for parameter in network.parameters()]
        self.discriminator_parameters = list(networks.discriminator.parameters())
        self.generator_optimizer = accelerator.prepare_optimizer(
            torch.optim.Adam(self.generator_parameters, generator_lr, betas, fused=True)
        )
        self.discriminator_optimizer = accelerator.prepare_optimizer(
            torch.optim.Adam(self.discriminator_parameters, discriminator_lr, betas, fused=True)
        )

    def forward(self, features: Tensor, masks: Tensor, images: Tensor | None, *, ratio: int, rng: torch.Generator) -> Step:
        """:func:`stages.objective.forward` on features (B, C, h, w) in the backbone's scale, under the accelerator's precision.

        ``ratio`` is the number of draws of z a mask. ``rng`` is the same in all processes: the noise of a batch does not
        depend on how many share it.
        """
        real = (features.float() / self.networks.generator.feature_scale).contiguous(memory_format=torch.channels_last)
        noise = draw_noise(rng, ratio, len(real), self.networks.generator.z_dim, real.device)
        if self.accelerator.process_index:  # all else that is random differs
            rng = random_generator(real.device, rng.initial_seed(), self.accelerator.process_index)
        with self.accelerator.autocast():
            return forward(
                self.objective,
                generator=self.modules["generator"],
                discriminator=self.modules["discriminator"],
                image_encoder=self.modules.get("image_encoder"),
                real=real,
                masks=masks,
                images=images,
                noise=noise,
                rng=rng,
                step=self.steps,
            )

    def update(self, step: Step, *, extra_loss: Tensor | None = None, also: Sequence[Tensor] | None = None) -> None:
        """Back-propagate both losses and step both optimizers.

        Both gradients are taken before either network moves: Algorithm 1 computes all
        scores first. Each is taken for its own parameters alone, so nothing is computed
        to be thrown away.

        Parameters
        ----------
        extra_loss
            Added to the generator's loss (the segmentation terms of the second branch).
        also
            Further parameters of that loss (the decoder's), for which gradients are wanted; their optimizer is the caller's.
        """
        total = step.generator_loss if extra_loss is None else step.generator_loss + extra_loss
        # The discriminator's goes first: the larger graph is then freed by its own back-propagation.
        self.accelerator.backward(step.discriminator_loss, inputs=self.discriminator_parameters, retain_graph=True)
        self.accelerator.backward(total, inputs=[*self.generator_parameters, *(also or [])])
        for optimizer in (self.generator_optimizer, self.discriminator_optimizer):
            optimizer.step()  # this and zero_grad wait for the last part of an accumulated batch
            optimizer.zero_grad()
        if not self.accelerator.sync_gradients:
            return
        self.steps += 1
        if self.objective.adversarial_loss == "wasserstein-clip":
            with torch.no_grad():
                for parameter in self.discriminator_parameters:
                    parameter.clamp_(-CLIP, CLIP)
        if self.average is not None:
            self.average.update_parameters(self.networks.generator)

    @property
    def generator(self) -> Generator:
        """The generator to generate with: the average where there is one."""
        return self.networks.generator if self.average is None else cast(Generator, self.average.module)

    # -- state -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that training goes on from."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.by_name().items()},
            "training": self.training_state(),
        }

    def training_state(self) -> dict[str, Any]:
        """What is not in the networks: the Adams, the number of steps, the average."""
        return {
            "generator": self.generator_optimizer.state_dict(),
            "discriminator": self.discriminator_optimizer.state_dict(),
            "steps": self.steps,
            "scaler": scaler_state(self.accelerator),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        for name, network in self.networks.by_name().items():
            network.load_state_dict(state["networks"][name])
        self.load_training_state(state["training"])

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`training_state`."""
        self.generator_optimizer.load_state_dict(state["generator"])
        self.discriminator_optimizer.load_state_dict(state["discriminator"])
        self.steps = state["steps"]
        load_scaler_state(self.accelerator, state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
