"""export: a trained decoder with its backbone as one file for other programs."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from featurestore import StoreSpec
from featurestore.files import sync, write_atomically, writing
from stages.backbones.backbone import BackboneError
from stages.backbones.map_network import MapNetwork
from stages.common.errors import ConfigError, DataError
from stages.common.runtime import progress
from stages.training.models import load_backbone, load_decoder, read_config, read_spec
from stages.use import model_card
from stages.use.export_formats import (
    FORMATS,
    MIN_SIDE,
    Metadata,
    Model,
    Runner,
    Size,
    torchvision_name,
)

# Of the largest logit. Other kernels round differently; float16 features change logits by more.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Exported:
    """An exported file, and how far its logits on random images are from PyTorch's.

    Attributes
    ----------
    path
        The file.
    card
        Its model card, a Markdown file beside it.
    bytes
        Size of the exported file.
    sizes
        (H, W) that it was checked at.
    difference
        The largest absolute difference of a logit.
    largest
        The largest absolute logit.
    """

    path: Path
    card: Path
    bytes: int
    sizes: tuple[Size, ...]
    difference: float
    largest: float


def run(
    decoder: Path,
    *,
    format: str,
    out: Path,
    backbone_weights: str = "default",
    weights: str = "decoder",
    size: Size | None = None,
    scores: Path | None = None,
) -> Exported:
    """Export a trained decoder with its backbone, and write a model card beside the file.

    The file is checked before it gets its name.

    Parameters
    ----------
    decoder
        Folder that ``train-decoder`` wrote.
    format
        ``torchvision``, ``torch-export`` or ``onnx``.
    out
        The file, with a suffix of the format. It appears whole and checked, or not at all.
    backbone_weights
        Value of ``extract.weights``; the weights must be those that made the decoder's features.
    weights
        ``decoder`` (last epoch) or ``decoder-best``.
    size
        (H, W) of the images in pixels. Default: any size; that of training for transformers, and
        for several layers.
    scores
        Folder of the scores for the card: of ``train-decoder`` or ``evaluate``. Default: the
        project's ``metrics/NAME``, if it has scores of this decoder.

    Raises
    ------
    ConfigError
        When the format cannot hold this model, a library that writes it is missing, or ``scores``
        has no scores of this decoder.
    DataError
        When there is no trained decoder, the backbone has other weights, a file of scores is
        damaged, or the file's logits are not the model's.
    """
    check_options(format, out, size)
    spec, head = read_spec(decoder), load_decoder(decoder, weights=weights)
    architecture = read_config(decoder)["architecture"]
    if format == "torchvision":
        torchvision_name(spec, architecture)
    source = model_card.Source(decoder, weights, backbone_weights, scores)
    model_card.find_scores(source, read_config(decoder))  # before minutes of tracing
    backbone = load_backbone(decoder, weights=weights, backbone_weights=backbone_weights)
    if not backbone.any_size:
        size = size or spec.mask_shape
        try:
            backbone.backbone.check_size(size)
        except BackboneError as error:
            raise ConfigError("--size", str(error), actual=size) from error
    model = Model(backbone, head, spec, architecture, size)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.stem}.partial{out.suffix}")
    card, metadata = out.with_suffix(model_card.SUFFIX), describe(backbone, format)
    try:
        with progress((), f"export: {out.name}", 3, "step") as bar:
            FORMATS[format].write(model, partial, metadata)
            bar.update()
            runner = FORMATS[format].open(partial, model)
            bar.update()
            difference, largest = compare(runner, model, out)
            bar.update()
        text = model_card.render(
            source, model, partial, name=out.name, format=format, metadata=metadata
        )
        with writing(card):
            write_atomically(card, text.encode())
        os.replace(partial, out)
        sync(out.parent)
    finally:
        partial.unlink(missing_ok=True)
    sizes = check_sizes(spec, size)
    return Exported(out, card, out.stat().st_size, sizes, difference, largest)


def check_options(format: str, out: Path, size: Size | None) -> None:
    """Refuse options that contradict each other.

    Raises
    ------
    ConfigError
        When the format has another suffix, needs a missing library, or cannot have the size.
    """
    suffixes, libraries = FORMATS[format].suffixes, FORMATS[format].libraries
    if out.suffix not in suffixes:
        message = f"{format} files end in {' or '.join(suffixes)}, found {out.name!r}"
        raise ConfigError("--out", message, expected=suffixes, actual=out.suffix)
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        message = f"needs {', '.join(missing)}; install with pip install -e '.[export]'"
        raise ConfigError(f"--format {format}", message, actual=missing)
    if size is not None and format == "torchvision":
        raise ConfigError("--size", "torchvision's models take images of any size; leave it out")
    if size is not None and min(size) < MIN_SIDE:
        message = f"must be {MIN_SIDE} or more, found {size[0]} {size[1]}"
        raise ConfigError("--size", message, expected=MIN_SIDE, actual=size)


def describe(network: MapNetwork, format: str) -> Metadata:
    """Describe the model for programs that load the file; JSON-ready."""
    spec = network.spec
    pixels = "uint8, 0..255; red, green, blue; normalised inside"
    if format == "torchvision":
        pixels = "float32; (value / 255 - normalization_mean) / normalization_std; red, green, blue"
    return {
        "class_names": list(spec.class_names),
        "palette": [list(colour) for colour in spec.palette],
        "backbone": spec.backbone,
        "weights_digest": network.backbone.digest(),
        "trained_size": list(spec.mask_shape),
        "resize": spec.resize,
        "normalization_mean": list(spec.normalization_mean),
        "normalization_std": list(spec.normalization_std),
        "images": f"(B, 3, H, W) {pixels}",
        "scores": "(B, K, H, W) float32, unnormalised; a pixel's class is the index of the largest",
    }


def check_sizes(spec: StoreSpec, size: Size | None) -> tuple[Size, ...]:
    """Return the sizes to check: ``size``, or that of training and one with odd sides."""
    height, width = spec.mask_shape
    return ((height, width), (height // 2 + 5, width + 9)) if size is None else (size,)


@torch.no_grad()
def compare(runner: Runner, model: Model, out: Path) -> tuple[float, float]:
    """Compare a runner's logits with PyTorch's on random images, in batches of one and of two.

    Returns
    -------
    difference, largest
        The largest difference of a logit, and the largest logit.

    Raises
    ------
    DataError
        When the difference is more than rounding.
    """
    rng = torch.Generator().manual_seed(0)
    results = []
    sizes = check_sizes(model.spec, model.size)
    for count, (height, width) in enumerate((sizes[0], sizes[-1]), 1):
        images = torch.randint(0, 256, (count, 3, height, width), generator=rng, dtype=torch.uint8)
        expected = model.decoder(model.backbone(images), size=(height, width))
        largest = float(expected.abs().max())
        difference = float((runner(images) - expected).abs().max())
        if not difference <= TOLERANCE * largest:  # true for NaN, too
            raise DataError(
                out,
                f"the exported logits differ by {difference:.3g} from PyTorch's (up to"
                f" {largest:.3g}) at {height} x {width}; nothing was written: try another --format",
                expected=TOLERANCE * largest,
                actual=difference,
            )
        results.append((difference, largest))
    differences, largests = zip(*results, strict=True)
    return max(differences), max(largests)
