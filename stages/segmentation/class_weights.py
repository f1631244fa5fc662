"""Weights of the classes in the decoder's loss: the rarer a class, the heavier."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def class_weights(
    pixels: np.ndarray, cap: float, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Compute ``min(cap, pixels of the most frequent class / pixels of the class)``.

    A class without pixels has the weight ``cap``, the limit for rare classes. Its weight applies
    only where added masks contain it.

    Parameters
    ----------
    pixels
        (K,) number of pixels of each class in the training masks.
    cap
        Largest weight, 1 or more.
    device
        Device of the result.

    Returns
    -------
    Tensor or None
        (K,) float32; None where ``cap`` is 1, because all weights are 1.
    """
    if cap == 1:
        return None
    ratios = pixels.max() / np.maximum(pixels, 1)
    return torch.from_numpy(np.where(pixels > 0, np.minimum(cap, ratios), cap)).float().to(device)
