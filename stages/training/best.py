"""The best epoch of a decoder's training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Best:
    """Weights of the epoch with the best mIoU on the validation split."""

    miou: float = -1.0
    epoch: int = -1
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def update(self, miou: float, epoch: int, networks: Mapping[str, nn.Module]) -> None:
        """Copy the weights of the networks, by name, if they score better than all before."""
        if miou > self.miou:
            self.weights = {
                name: {key: value.detach().cpu().clone() for key, value in state.items()}
                for name, state in ((name, each.state_dict()) for name, each in networks.items())
            }
            self.miou, self.epoch = miou, epoch

    def restore(self, networks: Mapping[str, nn.Module]) -> None:
        """Load the best weights into the networks."""
        for name, network in networks.items():
            network.load_state_dict(self.weights[name])

    def reset(self) -> None:
        """Forget all epochs."""
        self.miou, self.epoch, self.weights = -1.0, -1, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state, of tensors and plain values."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        vars(self).update(state)
