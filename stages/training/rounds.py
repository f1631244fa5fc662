"""Rounds of self-training: one decoder after another, each from the same first weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from stages.training.best import Best


class Rounds:
    """The first training of a decoder, and the rounds that follow it.

    Parameters
    ----------
    count
        Number of trainings, the first included; 1: no rounds.
    epochs
        Epochs of each round.
    decoder, optimizer
        At their start; the decoder's weights are copied.
    """

    def __init__(
        self, count: int, epochs: int, decoder: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.epochs, self.total_epochs = epochs, epochs * count
        self._decoder, self._optimizer = decoder, optimizer
        self._initial = copy.deepcopy(decoder.state_dict()) if count > 1 else {}

    def another_after(self, epoch: int) -> bool:
        """Return whether a round ends with this epoch, and another one follows."""
        return (epoch + 1) % self.epochs == 0 and epoch + 1 < self.total_epochs

    def epoch_of_round(self, epoch: int) -> int:
        """Return the number of an epoch within its round."""
        return epoch % self.epochs

    def reset_training(self, best: Best) -> None:
        """Give the decoder its first weights, and forget the optimizer's moments and the best."""
        self._decoder.load_state_dict(self._initial)
        self._optimizer.state.clear()
        best.reset()
