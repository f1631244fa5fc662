"""Pixel accuracy and intersection over union, from one confusion matrix of a whole split."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featurestore import VOID

IMAGES_NAME = "images.json"


def confusion_matrix(predicted: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each pair of a true and a predicted class; void pixels are left out.

    Parameters
    ----------
    predicted
        Class indices, of any shape.
    masks
        Class indices or void, of the same shape.

    Returns
    -------
    Tensor
        (K, K) int64, row: true class, column: predicted class.
    """
    return confusion_matrices(predicted.flatten()[None], masks.flatten()[None], num_classes)[0]


def confusion_matrices(predicted: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Compute the :func:`confusion_matrix` of each image of predictions and masks (B, ...).

    Returns
    -------
    Tensor
        (B, K, K) int64.
    """
    classes = torch.where(masks == VOID, num_classes, masks.long())  # void: a row of its own
    pairs = (classes * num_classes + predicted.long()).flatten(1)
    counts = torch.zeros(
        len(masks), (num_classes + 1) * num_classes, dtype=torch.int64, device=masks.device
    )
    # Unlike ``bincount``, a GPU counts without waiting for the largest value.
    counts.scatter_add_(1, pairs, torch.ones_like(pairs))
    return counts.view(len(masks), num_classes + 1, num_classes)[:, :num_classes]


def total(images: Iterable[Sequence[int]], num_classes: int) -> Tensor:
    """Sum confusion matrices given as ``true, predicted, pixels, true, ...`` to a (K, K) matrix."""
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for counts in images:
        truth, predicted, pixels = torch.tensor(counts, dtype=torch.int64).reshape(-1, 3).T
        confusion[truth, predicted] += pixels
    return confusion


@dataclass(frozen=True)
class Scores:
    """Scores of one split, fractions in 0..1.

    Attributes
    ----------
    pixel_accuracy
        Equation 2.1.
    miou
        Equation 2.2: mean over the classes that occur in the truth or in the prediction.
    iou
        By class name; None for a class in neither.
    absent
        Names of the classes in neither.
    confusion
        (K, K), row: true class.
    """

    pixel_accuracy: float
    miou: float
    iou: dict[str, float | None]
    absent: list[str]
    confusion: list[list[int]]

    def to_dict(self) -> dict[str, object]:
        """Return all scores, JSON-ready."""
        return dict(vars(self))


def score(confusion: Tensor, class_names: Sequence[str]) -> Scores:
    """Compute the scores of a confusion matrix.

    Parameters
    ----------
    confusion
        (K, K) counts, row: true class, column: predicted class.
    class_names
        K names.

    Raises
    ------
    ValueError
        When the matrix is empty: a split without a labelled pixel has no score.
    """
    counts = confusion.double().cpu()
    if not counts.any():
        raise ValueError("not one labelled pixel, so no score")
    correct = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - correct
    by_class = (correct / union).tolist()
    iou = {
        name: None if math.isnan(value) else value
        for name, value in zip(class_names, by_class, strict=True)
    }
    return Scores(
        pixel_accuracy=float(correct.sum() / counts.sum()),
        miou=float((correct / union)[union > 0].mean()),
        iou=iou,
        absent=[name for name, value in iou.items() if value is None],
        confusion=confusion.long().tolist(),
    )


def mean_iou(iou: dict[str, float | None], classes: Sequence[str]) -> float:
    """Average over the named classes that are not absent; not a number where all are absent."""
    values = [value for name in classes if (value := iou[name]) is not None]
    return sum(values) / len(values) if values else float("nan")
