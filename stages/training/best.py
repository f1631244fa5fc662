"""The best epoch of a decoder's training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stages.models.decoder import Decoder


@dataclass
class Best:
    """Weights of the epoch with the best mIoU on the validation split."""

    miou: float = -1.0
    epoch: int = -1
    weights: dict[str, Tensor] = field(default_factory=dict)

    def update(self, miou: float, epoch: int, decoder: Decoder) -> None:
        """Copy the decoder's weights if they score better than all before."""
        if miou > self.miou:
            weights = decoder.state_dict().items()
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in weights}
            self.miou, self.epoch = miou, epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the state, of tensors and plain values."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        vars(self).update(state)
