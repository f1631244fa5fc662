"""A trained decoder with its backbone as one file for other programs: torchvision's own model, torch.export, ONNX."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featurestore import StoreSpec
from featurestore.files import sync_folder
from stages.backbones.backbone import RESNETS, Backbone
from stages.common.errors import ConfigError, DataError
from stages.common.runtime import progress
from stages.models.decoder import Decoder
from stages.training.models import load_decoder, read_config, read_spec
from stages.use.end_to_end import EndToEnd
from stages.use.export_formats import (
    SMALLEST,
    Runner,
    dynamic_shapes,
    open_onnx,
    open_program,
    open_torchvision,
    trace,
    write_onnx,
    write_program,
    write_torchvision,
)
from stages.use.trained_backbone import load_backbone

SUFFIXES = {"torchvision": (".pth", ".safetensors"), "torch-export": (".pt2",), "onnx": (".onnx",)}
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
TOLERANCE = 1e-3  # of the largest score; other kernels round differently, and float16 features move scores by more
TORCHVISION = {"width": 256, "atrous_rates": [12, 24, 36]}  # what deeplabv3_resnet* is built with
ONNX_BYTES = 2**31  # one protobuf file holds no more

Size = tuple[int, int]


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from PyTorch's own scores on random pictures.

    Attributes
    ----------
    path
        The file.
    bytes
        Its size.
    sizes
        (H, W) that it was checked at.
    difference
        The largest absolute difference of a score.
    largest
        The largest absolute score.
    """

    path: Path
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
) -> Exported:
    """Export a trained decoder together with its backbone, and check the file before it gets its name.

    Parameters
    ----------
    decoder
        Folder that ``train-decoder`` left.
    format
        ``torchvision``, ``torch-export`` or ``onnx``.
    out
        The file; its suffix must be one of the format's. It appears whole and checked, or not at all.
    backbone_weights
        As ``extract.weights``; they must be those that the decoder's features were made with.
    weights
        ``decoder`` (last epoch) or ``decoder-best``.
    size
        (H, W) in pixels that the exported network is for; None: any size.

    Raises
    ------
    ConfigError
        When the format cannot hold this model, or a library that writes it is missing.
    DataError
        When there is no trained decoder, the backbone's weights are others, or the file's scores are not the model's.
    """
    # Everything that can be wrong, before anything takes time.
    check_options(format, out, size)
    spec, head = read_spec(decoder), load_decoder(decoder, weights=weights)
    model = (
        torchvision_model(spec, read_config(decoder)["architecture"])
        if format == "torchvision"
        else ""
    )
    backbone = load_backbone(spec, backbone_weights)
    stored = sum(
        tensor.nbytes for network in (backbone, head) for tensor in network.state_dict().values()
    )
    if format == "onnx" and stored >= ONNX_BYTES:
        raise ConfigError(
            "--format onnx",
            f"{stored / 1e9:.1f} GB of weights are more than an ONNX file holds; use torch-export",
        )

    # Write, check, publish.
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    sizes = (size, size) if size is not None else check_sizes(spec)
    metadata = describe(spec, format)
    try:
        with progress((), f"export: {out.name}", 3, "step") as bar:
            if format == "torchvision":
                safetensors = out.suffix == ".safetensors"
                write_torchvision(backbone, head, partial, metadata, safetensors=safetensors)
                runner = open_torchvision(partial, model, spec, safetensors=safetensors)
            else:
                shapes = dynamic_shapes(fixed=size is not None)
                program = trace(
                    EndToEnd(backbone=backbone, decoder=head), shapes, sizes[0], spec.backbone
                )
                bar.update()
                write, open_file = (
                    (write_onnx, open_onnx) if format == "onnx" else (write_program, open_program)
                )
                write(program, shapes, partial, metadata)
                runner = open_file(partial)
            bar.update()
            difference, largest = compare(runner, backbone, head, sizes, out)
            bar.update()
        os.replace(partial, out)
        sync_folder(out.parent)
    finally:
        partial.unlink(missing_ok=True)
    return Exported(out, out.stat().st_size, tuple(dict.fromkeys(sizes)), difference, largest)


def check_options(format: str, out: Path, size: Size | None) -> None:
    """Refuse options that do not fit together.

    Raises
    ------
    ConfigError
        For a suffix that is not the format's, a library that is missing, or a size that the format or the network has not.
    """
    if out.suffix not in SUFFIXES[format]:
        message = f"{format} files end in {' or '.join(SUFFIXES[format])}, found {out.name!r}"
        raise ConfigError("--out", message, expected=SUFFIXES[format], actual=out.suffix)
    missing = [name for name in NEEDED.get(format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--format {format}",
            f"needs {', '.join(missing)}; install with pip install -e '.[export]'",
            actual=missing,
        )
    if size is not None and format == "torchvision":
        raise ConfigError("--size", "torchvision's models take pictures of any size; leave it out")
    if size is not None and min(size) < SMALLEST:
        raise ConfigError(
            "--size",
            f"must be {SMALLEST} or more, found {size[0]} {size[1]}",
            expected=SMALLEST,
            actual=size,
        )


def torchvision_model(spec: StoreSpec, architecture: dict[str, Any]) -> str:
    """The name of torchvision's model of this architecture.

    Raises
    ------
    ConfigError
        When it has none; the text says what differs, and what to do.
    """
    key = "--format torchvision"
    if spec.backbone not in RESNETS:
        message = f"torchvision has models on {' and '.join(RESNETS)}, not on {spec.backbone}; use torch-export or onnx"
        raise ConfigError(key, message, expected=RESNETS, actual=spec.backbone)
    if architecture["head"] == "fcn":
        return f"fcn_{spec.backbone}"
    for name, expected in TORCHVISION.items():
        if (found := architecture[name]) != expected:
            message = f"torchvision's deeplabv3 has {name} {expected}, this decoder {found}; use torch-export or onnx"
            raise ConfigError(key, message, expected=expected, actual=found)
    return f"deeplabv3_{spec.backbone}"


def describe(spec: StoreSpec, format: str) -> dict[str, Any]:
    """What a program that loads the file has to know, JSON-ready."""
    if format == "torchvision":
        pixels = "float32; (value / 255 - normalization_mean) / normalization_std; red, green, blue"
    else:
        pixels = "uint8, 0..255; red, green, blue; normalised inside"
    return {
        "class_names": list(spec.class_names),
        "palette": [list(colour) for colour in spec.palette],
        "backbone": spec.backbone,
        "weights_digest": spec.weights_digest,
        "trained_size": list(spec.mask_shape),
        "resize": spec.resize,
        "normalization_mean": list(spec.normalization_mean),
        "normalization_std": list(spec.normalization_std),
        "images": f"(B, 3, H, W) {pixels}",
        "scores": "(B, K, H, W) float32, unnormalised; a pixel's class is the index of the largest",
    }


def check_sizes(spec: StoreSpec) -> tuple[Size, Size]:
    """The size that the decoder was trained on, and another one, of odd sides and another shape."""
    height, width = spec.mask_shape
    return (height, width), (height // 2 + 5, width + 9)


@torch.no_grad()
def compare(
    runner: Runner, backbone: Backbone, decoder: Decoder, sizes: tuple[Size, Size], out: Path
) -> tuple[float, float]:
    """The largest difference of a score on random pictures, one of the first size and two of the second, and the largest score.

    Raises
    ------
    DataError
        When it is more than rounding.
    """
    rng = torch.Generator().manual_seed(0)
    worst = largest = 0.0
    for count, (height, width) in enumerate(sizes, 1):
        images = torch.randint(0, 256, (count, 3, height, width), generator=rng, dtype=torch.uint8)
        expected = decoder(backbone(images), size=(height, width))
        difference, top = (
            float((runner(images) - expected).abs().max()),
            float(expected.abs().max()),
        )
        if not difference <= TOLERANCE * top:  # NaN is no less wrong
            message = f"the exported scores differ by {difference:.3g} from PyTorch's (up to {top:.3g}) at {height} x {width}"
            raise DataError(
                out,
                f"{message}; nothing was written: try another --format",
                expected=TOLERANCE * top,
                actual=difference,
            )
        worst, largest = max(worst, difference), max(largest, top)
    return worst, largest
