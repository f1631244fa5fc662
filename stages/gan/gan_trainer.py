"""FeatureGAN in training: one step of Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from typing_extensions import Self, override

from stages.common.distributed import draw_noise
from stages.common.errors import ConfigError
from stages.common.runtime import Machine
from stages.common.runtime import generator as random_generator
from stages.gan.networks import Networks
from stages.gan.objective import Objective, Step, forward
from stages.gan.trainer import Trainer
from stages.segmentation.folds import Folds

CLIP = 0.01  # Arjovsky et al. 2017


class GanTrainer(Trainer):
    """Generator, discriminator and image encoder with their two Adams.

    Parameters
    ----------
    networks
        Fresh or loaded networks; they are changed in place.
    objective
        The losses.
    folds
        Layers of the features, for ``diffaugment``; see :mod:`stages.segmentation.folds`.
    generator_lr, discriminator_lr, betas
        Of the Adams: 2e-4 and 8e-4 in the thesis, (0, 0.9) in SPADE.
    ema_decay, machine
        See :class:`stages.gan.trainer.Trainer`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        networks: Networks,
        objective: Objective,
        *,
        folds: Folds,
        generator_lr: float,
        discriminator_lr: float,
        betas: tuple[float, float],
        ema_decay: float = 0.0,
        machine: Machine | None = None,
    ) -> None:
        super().__init__(accelerator, networks, ema_decay=ema_decay, machine=machine)
        self.objective, self.folds = objective, folds
        self.micro_batches = accelerator.num_processes * accelerator.gradient_accumulation_steps
        if objective.r1_gamma or objective.adversarial_loss == "wasserstein-gp":
            # The gradient of a gradient: torch.compile and FSDP have none, fp16 rounds it to 0.
            refused = {
                "--compile": machine is not None and machine.compile,
                "--shard": self.sharded,
                "fp16": accelerator.mixed_precision == "fp16",
            }
            for name, chosen in refused.items():
                if chosen:
                    message = (
                        "does not work with r1_gamma or adversarial_loss wasserstein-gp;"
                        " remove one of them"
                    )
                    raise ConfigError(name, message)
        adam = partial(torch.optim.Adam, betas=betas, fused=True)
        self.optimizers = {
            "generator": adam(self.generator_parameters, generator_lr),
            "discriminator": adam(self.discriminator_parameters, discriminator_lr),
        }

    @override
    @classmethod
    def of(
        cls,
        accelerator: Accelerator,
        networks: Networks,
        settings: Mapping[str, Any],
        machine: Machine,
        folds: Folds,
    ) -> Self:
        names = {field.name for field in fields(Objective)} & settings.keys()
        rates = ("generator_lr", "discriminator_lr", "betas", "ema_decay")
        return cls(
            accelerator,
            networks,
            Objective(**{name: settings[name] for name in names}),
            folds=folds,
            machine=machine,
            **{name: settings[name] for name in rates},
        )

    @override
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
        real = self.real(features, images).contiguous(memory_format=torch.channels_last)
        z_dim = self.networks.generator.z_dim
        noise = draw_noise(rng, ratio, len(real), z_dim, real.device)
        if rank := self.accelerator.process_index:  # all other random numbers differ by process
            rng = random_generator(real.device, rng.initial_seed(), rank)
        with self.accelerator.autocast():
            return forward(
                self.objective,
                generator=self.modules["generator"],
                discriminator=self.modules["discriminator"],
                image_encoder=self.modules.get("image_encoder"),
                real=real,
                masks=masks,
                images=images,
                weights=weights,
                folds=self.folds,
                noise=noise,
                rng=rng,
                step=self.steps,
                batch_size=self.micro_batches * len(real),
            )

    def real(self, features: Tensor, images: Tensor | None) -> Tensor:
        """Return what the discriminator compares generated samples with: scaled features."""
        return features.float() / self.networks.generator.feature_scale

    @override
    def after_optimizer_step(self) -> None:
        super().after_optimizer_step()
        if self.objective.adversarial_loss == "wasserstein-clip":
            with torch.no_grad():
                assert self.networks.discriminator is not None
                for parameter in self.networks.discriminator.scales.parameters():
                    parameter.clamp_(-CLIP, CLIP)  # of the scores; a head for z is not clipped
