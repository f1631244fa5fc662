"""evaluate: the scores of a trained decoder on a feature store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import featurestore
from featurestore import FeatureStore, SpecMismatchError, StoreSpec
from featurestore.dataset import Batch, FeatureLoader
from featurestore.files import write_atomically, writing
from stages.common.errors import ConfigError, DataError
from stages.common.runtime import (
    GPU_PRECISIONS,
    allow_tf32,
    make_accelerator,
    on_cpu,
    progress,
    to_channels_last,
    verify_stores,
    write_json,
)
from stages.common.text_table import percent, plain
from stages.common.windows import image_name
from stages.segmentation.evaluation import evaluate
from stages.segmentation.metrics import Scores, mean_iou
from stages.training.feature_source import recomputed
from stages.training.models import (
    has_trained_backbone,
    load_backbone,
    load_decoder,
    read_precision,
    read_spec,
)

COMPARED: dict[str, Callable[[StoreSpec], object]] = {  # of a decoder's features and a store
    "backbone": lambda spec: spec.backbone,
    "backbone weights": lambda spec: spec.weights_digest[:12],
    "channels": lambda spec: spec.feature_shape[0],
    "output stride": lambda spec: spec.output_stride,
    "native strides": lambda spec: spec.native_strides,
    "classes": lambda spec: ", ".join(spec.class_names),
}


@dataclass(frozen=True)
class Evaluation:
    """Scores of a decoder on a store.

    Attributes
    ----------
    decoder, store
        Weights file, and store.
    samples
        Number of images; views do not count, nor do the windows of an image.
    scores
        Scores over all images.
    classes
        Classes of the mean IoU. Default: all classes of the decoder.
    """

    decoder: Path
    store: Path
    samples: int
    scores: Scores
    classes: tuple[str, ...]

    @property
    def miou(self) -> float:
        """Mean IoU over :attr:`classes`, 0..1; absent classes do not count."""
        return mean_iou(self.scores.iou, self.classes)


def run(
    decoder: Path,
    store: Path,
    *,
    weights: str,
    classes: Sequence[str],
    device: str,
    batch_size: int,
    workers: int,
) -> Evaluation:
    """Score a trained decoder on a store, in the precision of its training.

    Parameters
    ----------
    decoder
        Folder that ``train-decoder`` wrote.
    store
        Feature store.
    weights
        ``decoder`` (last epoch) or ``decoder-best``.
    classes
        Classes of the mean IoU; empty for all.
    device
        ``auto``, ``cpu`` or ``cuda``.
    batch_size
        Samples a batch.
    workers
        Threads that read.

    Raises
    ------
    DataError, FeatureStoreError
        When decoder or store is missing or damaged, or their features differ.
    ConfigError
        When the decoder has no such class, or there is no such device.
    """
    spec = read_spec(decoder)
    unknown = [name for name in classes if name not in spec.class_names]
    if unknown:
        known = ", ".join(spec.class_names)
        raise ConfigError("--class", f"{unknown[0]!r} is no class of this decoder ({known})")
    network = load_decoder(decoder, weights=weights)
    features = featurestore.open(store).select(spec.layer_names)
    check_features(spec, features)
    precision = read_precision(decoder)
    if precision in GPU_PRECISIONS and on_cpu(device):
        precision = "no"  # float32 is at least as exact
    accelerator = make_accelerator(device, precision)
    allow_tf32(precision == "tf32")
    verify_stores(features, workers=workers)
    positions, trained = features.positions("identity"), has_trained_backbone(decoder)
    loader = FeatureLoader(
        features,
        batch_size,
        positions=positions,
        images=trained,
        workers=workers,
        device=accelerator.device,
    )
    to_channels_last(network, accelerator.device)
    batches: Iterable[Batch] = progress(loader, "evaluate", len(loader), "batch")
    if trained:
        backbone = to_channels_last(load_backbone(decoder, weights=weights), accelerator.device)
        batches = recomputed(backbone, batches)
    try:
        scores = evaluate(accelerator, network, batches, features)
    except ValueError as error:
        raise DataError(store, f"{error}; name a store with labels") from error
    file = decoder / f"{weights}.safetensors"
    ids, rule = features.ids, features.spec.resize
    images = len({image_name(ids[position], rule) for position in positions})
    return Evaluation(file, store, images, scores, tuple(classes) or spec.class_names)


def check_features(spec: StoreSpec, store: FeatureStore) -> None:
    """Refuse a store of other features or classes than the decoder's; sizes and images may differ.

    Raises
    ------
    SpecMismatchError
        The text names the first difference.
    """
    for what, value_of in COMPARED.items():
        expected, actual = value_of(spec), value_of(store.spec)
        if actual != expected:
            message = (
                f"has {what} {actual}, but the decoder was trained on {expected}; "
                f"extract this store with the decoder's {what}"
            )
            raise SpecMismatchError(message, path=store.path, expected=expected, actual=actual)


def as_text(evaluation: Evaluation) -> str:
    """Format the scores of each class, and the means below, in percent."""
    scores = evaluation.scores
    confusion = torch.tensor(scores.confusion, dtype=torch.float64)  # (K, K), row: true class
    right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    fractions = torch.stack([right / true, right / predicted, true / true.sum()], dim=1)  # (K, 3)
    rows = [
        [name, *map(percent, (iou, *of_class))]
        for (name, iou), of_class in zip(scores.iou.items(), fractions.tolist(), strict=True)
    ]
    absent = ", ".join(name for name in evaluation.classes if name in scores.absent)
    counted = [name for name in evaluation.classes if name not in scores.absent]
    all_classes = len(evaluation.classes) == len(scores.iou)
    over = f"{len(counted)} classes" if all_classes else ", ".join(counted)
    return (
        f"{plain(('class', 'IoU', 'recall', 'precision', 'of pixels'), rows)}\n\n"
        f"PA {percent(scores.pixel_accuracy)}, mIoU {percent(evaluation.miou)} over {over}"
        f"{f' (in neither truth nor prediction: {absent})' if absent else ''}"
    )


def write(evaluation: Evaluation, out: Path) -> None:
    """Write ``evaluation.json`` and ``confusion.png``.

    Raises
    ------
    StoreWriteError
        When the file system refuses.
    """
    from stages.reporting.confusion import confusion  # matplotlib takes a second to import

    values = {
        "decoder": str(evaluation.decoder),
        "store": str(evaluation.store),
        "samples": evaluation.samples,
        "classes": list(evaluation.classes),
        "miou_of_classes": evaluation.miou,
        **evaluation.scores.to_dict(),
    }
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(
            out / "confusion.png",
            confusion(evaluation.scores.confusion, list(evaluation.scores.iou)),
        )
        write_json(out / "evaluation.json", values)
