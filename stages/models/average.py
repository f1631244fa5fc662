"""A network whose weights are an average of those of a network in training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class AverageNetwork(Generic[Network]):
    """The exponential moving average of a network's weights (Yazıcı et al. 2019).

    Buffers (running statistics) are copied. No update waits for the device.

    Parameters
    ----------
    network
        On its device, in its memory format; the average is a copy of it.
    decay
        Fraction that the average keeps in each update, in 0..1.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.module, self.decay = copy.deepcopy(network), decay

    @torch.no_grad()
    def update(self, network: Network, *, first: bool) -> None:
        """Follow the weights of ``network``; take them over where it is the first update."""
        averages: list[Tensor] = [*self.module.parameters()]
        weights: list[Tensor] = [*network.parameters()]
        if first:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        for ours, theirs in zip(self.module.buffers(), network.buffers(), strict=True):
            ours.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        """Return weights and buffers by name."""
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, here or in version 0.1.0."""
        state = {name.removeprefix("module."): value for name, value in state.items()}
        state.pop("n_averaged", None)
        self.module.load_state_dict(state)
