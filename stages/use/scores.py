"""Scores that a project has of a decoder: those of ``train-decoder``, or of ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featurestore import StoreSpec
from stages.common.errors import DataError
from stages.reporting.bootstrap import Counts, Interval, paired_intervals
from stages.reporting.tables import read_json
from stages.segmentation.metrics import IMAGES_NAME, mean_iou

Images = Mapping[str, Sequence[int]]  # confusion matrix of each image, see ``total``
REMEDY = "make it again, or name another folder with --scores"


@dataclass(frozen=True)
class StoredScores:
    """Scores of a decoder, fractions in 0..1.

    Attributes
    ----------
    data
        What was scored, in words.
    images
        Number of images; None where it is not recorded.
    pixel_accuracy
        Over all images.
    iou
        By class; None for a class that the masks do not contain.
    chosen
        Classes of :attr:`miou`; those that the masks do not contain do not count.
    epochs
        Epochs of the training; None where they are not recorded.
    names
        Names of the images; empty where they are not recorded.
    by_image
        Confusion matrix of each image; empty where it is not recorded.
    """

    data: str
    images: int | None
    pixel_accuracy: float
    iou: Mapping[str, float | None]
    chosen: Sequence[str]
    epochs: int | None = None
    names: frozenset[str] = frozenset()
    by_image: Images = field(default_factory=dict)

    @property
    def miou(self) -> float:
        """Mean IoU over the chosen classes that the masks contain."""
        return mean_iou(dict(self.iou), self.chosen)

    @property
    def absent(self) -> list[str]:
        """Classes that the masks do not contain."""
        return [name for name, value in self.iou.items() if value is None]

    def intervals(self) -> tuple[Interval, dict[str, Interval]]:
        """Compute 95% intervals over images, of the mIoU and of each class's IoU."""
        names = list(self.iou)
        counts = Counts.of(self.by_image, sorted(self.by_image), len(names))
        none = np.zeros_like(counts.right)
        nothing = Counts(counts.truth, none, none)  # has IoU 0: the difference is the IoU itself
        chosen = [names.index(name) for name in self.chosen]
        (mean,), by_class = paired_intervals([counts], [nothing], chosen)
        return mean, {name: by_class[number] for number, name in enumerate(names)}


def read_scores(
    folder: Path, decoder: Path, weights: str, config: Mapping[str, Any]
) -> StoredScores | None:
    """Read the scores of a decoder from a folder of ``train-decoder`` or ``evaluate``.

    Parameters
    ----------
    folder
        Folder of ``test.json`` and ``images.json``, or of ``evaluation.json``.
    decoder
        Folder that ``train-decoder`` wrote.
    weights
        ``decoder`` (last epoch) or ``decoder-best``.
    config
        The decoder's ``config.json``.

    Returns
    -------
    StoredScores or None
        None where the folder has no scores of this decoder.

    Raises
    ------
    DataError
        When a file is damaged.
    """
    classes = StoreSpec.from_dict(config["features"]).class_names
    test, evaluation = folder / "test.json", folder / "evaluation.json"
    for path, read in ((test, _of_training), (evaluation, _of_evaluation)):
        if not path.is_file():
            continue
        result = read_json(path, REMEDY)
        try:
            scores = read(result, folder, decoder, weights, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(path, f"is not a file of scores ({error!r}); {REMEDY}") from error
        if scores is not None and tuple(scores.iou) == classes:
            return scores
    return None


def _of_training(
    result: Mapping[str, Any], folder: Path, decoder: Path, weights: str, config: Mapping[str, Any]
) -> StoredScores | None:
    if any(result[key] != config.get(key) for key in ("variant", "seed")):
        return None
    path, last = folder / IMAGES_NAME, weights == "decoder"
    by_image = read_json(path, REMEDY) if path.is_file() else {}
    scored = result if last else result["best_on_val"]
    iou = _in_truth(scored["iou"], result["confusion"])
    return StoredScores(
        data="the test split",
        images=len(by_image) or None,
        pixel_accuracy=scored["pixel_accuracy"],
        iou=iou,
        chosen=list(iou),
        epochs=result["epochs"],
        names=frozenset(by_image),
        by_image=by_image if last else {},
    )


def _of_evaluation(
    result: Mapping[str, Any], folder: Path, decoder: Path, weights: str, config: Mapping[str, Any]
) -> StoredScores | None:
    scored = Path(result["decoder"])
    if (scored.parent.name, scored.stem) != (decoder.resolve().name, weights):
        return None
    store = "/".join(Path(result["store"]).parts[-2:])
    return StoredScores(
        data=f"the feature store `{store}`",
        images=result["samples"],
        pixel_accuracy=result["pixel_accuracy"],
        iou=_in_truth(result["iou"], result["confusion"]),
        chosen=result["classes"],
    )


def _in_truth(
    iou: Mapping[str, float | None], confusion: Sequence[Sequence[int]]
) -> dict[str, float | None]:
    """Drop the IoU of classes that the masks do not contain: they may have 0 for a prediction."""
    return {
        name: value if any(row) else None
        for (name, value), row in zip(iou.items(), confusion, strict=True)
    }
