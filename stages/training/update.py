"""Optimizer, back-propagation and steps of several networks that learn together (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.common.distributed import is_sharded

Loss = tuple[Tensor, Sequence[nn.Parameter]]  # a scalar, and the parameters that it trains


def adamw(
    rates: Mapping[nn.Module, float], betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov and Hutter 2019) that decays weights, not biases and BatchNorm.

    Parameters
    ----------
    rates
        Networks with their learning rates. Parameters of two axes or more are decayed, frozen ones
        left out.
    betas, weight_decay
        As in :class:`torch.optim.AdamW`; without decay it equals Adam bit for bit.
    """
    groups: list[dict[str, Any]] = []
    for network, lr in rates.items():
        by_decay: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for parameter in filter(attrgetter("requires_grad"), network.parameters()):
            by_decay[parameter.ndim > 1].append(parameter)
        for decayed, parameters in by_decay.items():
            decay = weight_decay if decayed else 0.0
            groups.append({"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def backward(accelerator: Accelerator, *losses: Loss) -> None:
    """Back-propagate each loss to its own parameters, before any optimizer takes a step.

    Algorithm 1 computes all losses first. The graphs of the losses overlap: all but the last
    back-propagation keep theirs. Losses without parameters are left out. accelerate divides each
    loss by the number of micro-batches.
    """
    trained = [(loss, list(parameters)) for loss, parameters in losses if parameters]
    sharded = any(is_sharded(parameter) for _, group in trained for parameter in group)
    for number, (loss, parameters) in enumerate(trained, 1):
        retain_graph = number < len(trained)
        if not sharded:
            accelerator.backward(loss, inputs=parameters, retain_graph=retain_graph)
            continue
        # FSDP cannot leave parameters out: gradients of the others are put aside meanwhile.
        others = [
            parameter for _, group in trained if group is not parameters for parameter in group
        ]
        gradients = _detach_grads(others)
        accelerator.backward(loss, retain_graph=retain_graph)
        _restore_grads(others, gradients)


class BatchNormGuard:
    """Running statistics of BatchNorm, kept from an overflow in fp16.

    The loss scale skips the step of a batch that overflows. The forward pass of that batch has
    averaged infinite values into the statistics already, and no later batch removes them.

    Parameters
    ----------
    accelerator
        Without a loss scale, :meth:`keep_finite` does nothing.
    modules
        Networks in training, with the statistics of the last sound step.
    """

    def __init__(self, accelerator: Accelerator, modules: Iterable[nn.Module]) -> None:
        guarded = modules if accelerator.scaler is not None else ()
        layers = (layer for module in guarded for layer in module.modules())
        norms = [layer for layer in layers if isinstance(layer, _BatchNorm)]
        both = [(norm.running_mean, norm.running_var) for norm in norms]
        self._current = [buffer for pair in both for buffer in pair if buffer is not None]
        self._sound = [buffer.clone() for buffer in self._current]

    @torch.no_grad()
    def keep_finite(self) -> None:
        """Replace values that are not finite by the last ones that were; call it after a step."""
        for current, sound in zip(self._current, self._sound, strict=True):
            torch.where(current.isfinite(), current, sound, out=sound)
            current.copy_(sound)


def step_and_zero_grad(
    accelerator: Accelerator,
    *optimizers: torch.optim.Optimizer,
    guard: BatchNormGuard | None = None,
) -> None:
    """Step all optimizers, clear their gradients, and keep running statistics finite, if given.

    They step together, because the loss scale of fp16 must not change between them.
    """
    scaler = accelerator.scaler
    for optimizer in optimizers:
        optimizer.step() if scaler is None else scaler.step(optimizer)
    if scaler is not None:
        scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad()
    if guard is not None:
        guard.keep_finite()


def _detach_grads(parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
    gradients = []
    for parameter in parameters:
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients


def _restore_grads(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
