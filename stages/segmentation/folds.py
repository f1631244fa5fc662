"""Folded layers: channels of a feature map that are the sub-pixels of finer channels.

A layer finer than the grid of the feature map is folded space-to-depth: (c, r*h, r*w) becomes
(c*r*r, h, w), and sub-pixel (dy, dx) of channel k becomes channel k*r*r + dy*r + dx.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

# (c, r) of each layer of a feature map, in the order of its channels: c channels, folded r times.
Folds: TypeAlias = Sequence[tuple[int, int]]


def mirror(features: Tensor, folds: Folds) -> Tensor:
    """Mirror features (..., C, h, w) left and right, with the sub-pixels of folded channels."""
    flipped = features.flip(-1)
    if all(fold == 1 for _, fold in folds):
        return flipped
    order, first = [], 0
    for channels, fold in folds:
        numbers = torch.arange(channels * fold**2, device=features.device)
        layer = numbers.view(channels, fold, fold)  # (c, dy, dx)
        order.append(first + layer.flip(-1).flatten())
        first += layer.numel()
    return flipped.index_select(-3, torch.cat(order))


def unfolded_channels(folds: Folds) -> int:
    """Count the channels of all layers before they were folded."""
    return sum(channels for channels, _ in folds)


def expand_channels(values: Tensor, folds: Folds) -> Tensor:
    """Repeat a value of each unfolded channel (B, c) for its sub-pixels: (B, C)."""
    layers = values.split([channels for channels, _ in folds], 1)
    return torch.cat(
        [
            layer.repeat_interleave(fold**2, 1)
            for layer, (_, fold) in zip(layers, folds, strict=True)
        ],
        1,
    )
