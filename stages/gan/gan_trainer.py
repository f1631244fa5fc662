"""FeatureGAN in training: one update of Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stages.common.distributed import draw_noise
from stages.common.errors import ConfigError
from stages.common.runtime import generator as random_generator
from stages.gan.networks import Networks
from stages.gan.objective import Objective, Step, forward
from stages.gan.trainer import Trainer

CLIP = 0.01  # Arjovsky et al. 2017


class GanTrainer(Trainer):
    """Generator, discriminator and image encoder with their two Adams.

    Parameters
    ----------
    networks
        Fresh or loaded ones; they are changed in place.
    objective
        The losses.
    generator_lr, discriminator_lr, betas
        Of the Adams (thesis: 2e-4, 8e-4, (0, 0.9)).
    ema_decay, compile_networks, sharded
        See :class:`stages.gan.trainer.Trainer`.
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
        sharded: bool = False,
    ) -> None:
        super().__init__(
            accelerator,
            networks,
            ema_decay=ema_decay,
            compile_networks=compile_networks,
            sharded=sharded,
        )
        assert networks.discriminator is not None
        self.objective = objective
        if objective.r1_gamma or objective.adversarial_loss == "wasserstein-gp":
            # Their gradient of a gradient is beyond torch.compile and FSDP, and below fp16's smallest numbers.
            unfit = {
                "--compile": compile_networks,
                "--shard": self.sharded,
                "fp16": accelerator.mixed_precision == "fp16",
            }
            for name, chosen in unfit.items():
                if chosen:
                    raise ConfigError(
                        name,
                        "does not go together with r1_gamma or adversarial_loss wasserstein-gp; leave one out",
                    )
        trained = [
            networks.generator,
            *([networks.image_encoder] if networks.image_encoder is not None else []),
        ]
        self.generator_parameters = [
            parameter for network in trained for parameter in network.parameters()
        ]
        self.discriminator_parameters = list(networks.discriminator.parameters())
        self.optimizers = {
            "generator": torch.optim.Adam(
                self.generator_parameters, generator_lr, betas, fused=True
            ),
            "discriminator": torch.optim.Adam(
                self.discriminator_parameters, discriminator_lr, betas, fused=True
            ),
        }

    @classmethod
    def of(
        cls,
        accelerator: Accelerator,
        networks: Networks,
        settings: Mapping[str, Any],
        **machine: Any,
    ) -> GanTrainer:
        """As section ``train_gan`` of the parameters describes it; ``machine`` is ``compile_networks`` and ``sharded``."""
        objective = Objective(
            **{
                field.name: settings[field.name]
                for field in fields(Objective)
                if field.name in settings
            }
        )
        chosen: dict[str, Any] = {
            name: settings[name]
            for name in ("generator_lr", "discriminator_lr", "betas", "ema_decay")
        }
        return cls(accelerator, networks, objective, **chosen, **machine)

    def forward(
        self,
        features: Tensor,
        masks: Tensor,
        images: Tensor | None,
        *,
        ratio: int,
        rng: torch.Generator,
    ) -> Step:
        """:func:`stages.gan.objective.forward` on features (B, C, h, w) in the backbone's scale, under the accelerator's precision.

        ``ratio`` is the number of draws of z a mask. ``rng`` is the same in all processes: the noise of a batch does not
        depend on how many share it.
        """
        real = (features.float() / self.networks.generator.feature_scale).contiguous(
            memory_format=torch.channels_last
        )
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

    def update(
        self,
        step: Step,
        *,
        extra_loss: Tensor | None = None,
        decoder: torch.optim.Optimizer | None = None,
    ) -> None:
        """Back-propagate both losses and step both optimizers.

        Both gradients are taken before either network moves: Algorithm 1 computes all
        scores first. Each is taken for its own parameters alone, so nothing is computed
        to be thrown away.

        Parameters
        ----------
        extra_loss
            Added to the generator's loss (the segmentation terms of the second branch).
        decoder
            Optimizer of the decoder, which that loss trains too.
        """
        others = [] if decoder is None else [decoder]
        also = [
            parameter
            for optimizer in others
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        total = step.generator_loss if extra_loss is None else step.generator_loss + extra_loss
        # The discriminator's goes first: the generator's graph is then freed by its own back-propagation.
        if self.sharded:
            self._backward_everywhere(step.discriminator_loss, total)
        else:
            self.accelerator.backward(
                step.discriminator_loss, inputs=self.discriminator_parameters, retain_graph=True
            )
            self.accelerator.backward(total, inputs=[*self.generator_parameters, *also])
        if self._step(*others) and self.objective.adversarial_loss == "wasserstein-clip":
            with torch.no_grad():
                for parameter in self.discriminator_parameters:
                    parameter.clamp_(-CLIP, CLIP)

    def _backward_everywhere(self, discriminator_loss: Tensor, total: Tensor) -> None:
        """The same gradients where weights are divided: FSDP cannot leave parameters out, so the unwanted ones are dropped."""
        before = _take(self.generator_parameters)
        self.accelerator.backward(discriminator_loss, retain_graph=True)
        wanted = _take(self.discriminator_parameters)
        _give(self.generator_parameters, before)
        self.accelerator.backward(total)
        _give(self.discriminator_parameters, wanted)


def _take(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    gradients = [parameter.grad for parameter in parameters]
    _give(parameters, [None] * len(gradients))
    return gradients


def _give(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
