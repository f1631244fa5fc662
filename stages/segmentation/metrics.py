"""Pixel accuracy and intersection over union, from one confusion matrix over a whole split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featurestore import VOID

IMAGES_NAME = "images.json"


def confusion_matrix(
    predicted: Tensor, masks: Tensor, num_classes: int, void: int = VOID
) -> Tensor:
    """(K, K) int64 pixel counts, row: true class, column: predicted class; void pixels are left out.

    Parameters
    ----------
    predicted
        (B, H, W) class indices; any shape will do.
    masks
        (B, H, W) class indices or void.
    """
    labelled = masks != void
    pairs = masks[labelled].long() * num_classes + predicted[labelled].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def confusion_matrices(
    predicted: Tensor, masks: Tensor, num_classes: int, void: int = VOID
) -> Tensor:
    """(B, K, K) int64: :func:`confusion_matrix` of each image of predictions and masks (B, H, W)."""
    labelled = masks != void
    image = torch.arange(len(masks), device=masks.device)[:, None, None].expand_as(masks)[labelled]
    pairs = (image * num_classes + masks[labelled].long()) * num_classes + predicted[
        labelled
    ].long()
    return torch.bincount(pairs, minlength=len(masks) * num_classes**2).view(
        -1, num_classes, num_classes
    )


def total(images: Iterable[Sequence[int]], num_classes: int) -> Tensor:
    """(K, K) sum of confusion matrices given as ``true, predicted, pixels, true, ...``."""
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for counts in images:
        truth, predicted, pixels = torch.tensor(counts, dtype=torch.int64).reshape(-1, 3).T
        confusion[truth, predicted] += pixels
    return confusion


@dataclass(frozen=True)
class Scores:
    """Scores of one split, shares in 0..1.

    Attributes
    ----------
    pixel_accuracy
        Equation 2.1.
    miou
        Equation 2.2: mean over the classes that occur in the truth or in the prediction.
    iou
        By class name; None for a class in neither.
    absent
        Names of those classes.
    confusion
        (K, K), row: true class.
    """

    pixel_accuracy: float
    miou: float
    iou: dict[str, float | None]
    absent: list[str]
    confusion: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dict(vars(self))


def score(confusion: Tensor, class_names: Sequence[str]) -> Scores:
    """Scores of a confusion matrix.

    Parameters
    ----------
    confusion
        (K, K) counts, row: true class, column: predicted class.
    class_names
        K names.

    Raises
    ------
    ValueError
        When the matrix is empty: a split without one labelled pixel has no score.
    """
    counts = confusion.double().cpu()
    total = counts.sum()
    if total == 0:
        raise ValueError("not one labelled pixel, so no score")
    right = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - right
    present = union > 0
    iou = torch.where(present, right / union.clamp(min=1), torch.nan)
    return Scores(
        pixel_accuracy=float(right.sum() / total),
        miou=float(iou[present].mean()),
        iou={
            name: float(value) if there else None
            for name, value, there in zip(class_names, iou, present, strict=True)
        },
        absent=[name for name, there in zip(class_names, present, strict=True) if not there],
        confusion=confusion.long().tolist(),
    )


def mean_iou(iou: dict[str, float | None], classes: Sequence[str]) -> float:
    """Mean over the named classes that are not absent; not a number where all of them are."""
    values = [value for name in classes if (value := iou[name]) is not None]
    return sum(values) / len(values) if values else float("nan")
