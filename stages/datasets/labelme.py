"""LabelMe's JSON, one file an image, with outlines that are drawn as LabelMe draws them."""

from __future__ import annotations

import base64
import binascii
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.common.errors import DataError
from stages.data.images import IMAGE_SUFFIXES, read_bytes
from stages.data.manifest import Pair
from stages.datasets.class_list import Label, drawn_classes, listed_classes
from stages.datasets.config import PrepareConfig
from stages.datasets.findings import Finding
from stages.datasets.layout import DatasetLayout, first_file, split_of_subset
from stages.datasets.shapes import Size, draw_shape, place, turn_with_image
from stages.datasets.text_files import read_text

WHERE = "NAME.json beside NAME.jpg, as LabelMe saves them; docs/datasets.md"
LIST = "labels.txt"
OUTLINES = ("polygon", "oriented_rectangle", "rectangle", "circle")
UNLABELLED = "images without an annotation file"


@dataclass(frozen=True)
class Drawing:
    """What a JSON holds: shapes from bottom to top, the size of the image, and its file."""

    shapes: list[dict[str, Any]]
    size: Size
    image: Path


def find(root: Path, config: PrepareConfig) -> DatasetLayout:
    """Find all JSON files below the root, and their images.

    Classes are those of ``prepare.classes``, else of ``labels.txt``, else all labels by name. An
    image without a JSON is left out.

    Raises
    ------
    DataError
        When there is no JSON.
    """
    files = [path for path in sorted(root.rglob("*.json")) if _is_visible(path, root)]
    if not files:
        raise DataError(root, f"holds no JSON of LabelMe; expected {WHERE}")
    drawings: dict[str, Drawing | DataError] = {}
    pairs = []
    for path in files:
        relative = path.relative_to(root)
        subset = relative.parts[0] if len(relative.parts) > 1 else ""
        id, split = relative.with_suffix("").as_posix(), split_of_subset(subset, root, config.split)
        try:
            drawings[id] = drawing = _read(path, root)
            pairs.append(Pair(id, drawing.image, path, split))
        except DataError as problem:  # it is reported with those of the other files
            drawings[id] = problem
            pairs.append(Pair(id, path.with_suffix(".jpg"), path, split))
    known = [drawing for drawing in drawings.values() if isinstance(drawing, Drawing)]
    names = {shape["label"] for drawing in known for shape in drawing.shapes}
    labels, place_of_list = _labels(root, config, names)
    classes, index = drawn_classes(labels, place_of_list)

    def convert(pair: Pair) -> np.ndarray:
        drawing = drawings[pair.id]
        if isinstance(drawing, DataError):
            raise drawing
        mask = np.zeros(drawing.size, np.uint8)
        for number, shape in enumerate(drawing.shapes):
            if shape["label"] not in index:
                raise DataError(
                    pair.mask,
                    f"the label {shape['label']!r} is not in {place_of_list}; add it there, or "
                    f"correct the label (known: {', '.join(index)})",
                    actual=shape["label"],
                )
            mask[_inside(shape, number, drawing.size, pair.mask)] = index[shape["label"]]
        return turn_with_image(mask, pair.image, stored=False)

    findings = _unlabelled(root, {pair.image.resolve() for pair in pairs})
    return DatasetLayout(pairs, classes, convert, findings)


def _is_visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _read(path: Path, root: Path) -> Drawing:
    try:
        content = json.loads(read_bytes(path, "annotation file"))
        shapes, name = list(content["shapes"]), content["imagePath"]
        size = int(content["imageHeight"]), int(content["imageWidth"])
        for shape in shapes:  # what is read later
            str.strip(shape["label"]), list(shape["points"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            path,
            f"is not LabelMe's JSON, or a truncated one ({type(error).__name__}: {error}); "
            "save it with LabelMe again, or move it out of prepare.root",
        ) from error
    return Drawing(shapes, size, first_file((path.parent, root, root / "images"), name))


def _labels(root: Path, config: PrepareConfig, names: set[str]) -> tuple[list[Label], Path]:
    """Return the labels in the order of the classes, and the place that lists them."""
    if labels := listed_classes(config):
        return labels, Path("prepare.classes")
    path = root / LIST
    if path.is_file():
        lines = [line.strip() for line in read_text(path, "the list of labels").splitlines()]
        return [Label(line, None) for line in lines if line], path
    return [Label(name, None) for name in sorted(names)], root


def _inside(shape: dict[str, Any], number: int, size: Size, path: Path) -> np.ndarray:
    """Draw a shape, (H, W) bool; errors name it by its number in the JSON, from 0."""
    kind = shape.get("shape_type") or "polygon"
    if kind not in (*OUTLINES, "mask"):
        raise DataError(
            path,
            f"shape {number} ({shape['label']!r}) is a {kind}, which covers no area; "
            f"remove it, or draw it as one of {', '.join((*OUTLINES, 'mask'))}",
            expected=(*OUTLINES, "mask"),
            actual=kind,
        )
    try:
        if kind != "mask":
            return draw_shape(kind, shape["points"], size)
        content = base64.b64decode(shape["mask"], validate=True)
        with Image.open(io.BytesIO(content)) as image:
            patch = np.asarray(image).astype(bool)
        (left, top), _ = np.rint(shape["points"]).astype(int).tolist()
        return place(patch, top, left, size)
    except (KeyError, TypeError, ValueError, OSError, binascii.Error) as error:
        raise DataError(
            path,
            f"shape {number} ({shape['label']!r}, {kind}) cannot be drawn: {error}; "
            "draw it again with LabelMe",
        ) from error


def _unlabelled(root: Path, labelled: set[Path]) -> list[Finding]:
    """Count the images that no JSON names."""
    images = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and _is_visible(path, root)
        and path.resolve() not in labelled
    ]
    message = "has no JSON of LabelMe and is left out; save one, also where there is no object"
    return [Finding(UNLABELLED, path, message) for path in images]
