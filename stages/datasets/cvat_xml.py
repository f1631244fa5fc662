"""CVAT's XML "for images 1.1", with outlines that are drawn in the order of their layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from stages.common.errors import DataError
from stages.data.manifest import Pair
from stages.datasets.class_list import Label, drawn_classes, listed_classes
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import DatasetLayout, first_file, image_id, split_of_subset
from stages.datasets.palette import Colour
from stages.datasets.shapes import (
    Size,
    fill_ellipse,
    fill_polygon,
    place,
    runs_to_patch,
    turn_points,
    turn_with_image,
)

NAME = "annotations.xml"
WHERE = f"{NAME} and images/, as CVAT exports 'CVAT for images 1.1'; docs/datasets.md"
OUTLINES = ("polygon", "box", "ellipse", "mask")
TAG = "tag"  # of the whole image; it has no pixels


def find(root: Path, config: PrepareConfig) -> DatasetLayout:
    """Find every ``annotations.xml`` below the root, with its images in ``images`` beside it.

    Classes are those of ``prepare.classes``, else the labels of the first file, in its order.

    Raises
    ------
    DataError
        When there is no such file, one is damaged, or its labels differ from those of the first.
    """
    paths = sorted(root.rglob(NAME))
    if not paths:
        raise DataError(root, f"holds no {NAME}; expected {WHERE}")
    labels = listed_classes(config)
    drawings: dict[str, tuple[Element, Size]] = {}
    pairs = []
    for path in paths:
        document = _parse(path)
        names = _labels(document, path)
        labels = labels or names
        known = {label.name for label in labels}
        if unknown := [label.name for label in names if label.name not in known]:
            raise DataError(
                path,
                f"has the label {unknown[0]!r}, which {paths[0]} has not; export all from one "
                "project, or list all in prepare.classes",
                actual=unknown[0],
            )
        for image in document.iter("image"):
            name, subset = image.get("name", ""), image.get("subset", "")
            try:
                size = int(image.attrib["height"]), int(image.attrib["width"])
                id = (path.parent.relative_to(root) / image_id(name)).as_posix()
            except (KeyError, ValueError, IndexError) as error:
                message = f"an image lacks name, width or height ({error}); export it again"
                raise DataError(path, message) from error
            images = path.parent / "images"
            file = first_file((images, images / subset, path.parent), name)
            subset = "" if subset.lower() == "default" else subset
            pairs.append(Pair(id, file, path, split_of_subset(subset, path, config.split)))
            drawings[id] = image, size
    classes, index = drawn_classes(labels, paths[0])

    def convert(pair: Pair) -> np.ndarray:
        image, size = drawings[pair.id]
        mask = np.zeros(size, np.uint8)
        for shape in sorted(image, key=lambda shape: int(shape.get("z_order", 0))):
            if shape.tag == TAG:
                continue
            label = shape.get("label", "")
            if label not in index:
                message = f"{pair.id} has the label {label!r}, expected one of {', '.join(index)}"
                raise DataError(pair.mask, message, actual=label)
            mask[_inside(shape, size, pair)] = index[label]
        return turn_with_image(mask, pair.image, stored=False)

    return DatasetLayout(sorted(pairs, key=lambda pair: pair.id), classes, convert)


def _parse(path: Path) -> Element:
    try:
        document = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(
            path, f"is not CVAT's XML, or a truncated one ({error}); export it again"
        ) from error
    if document.tag != "annotations" or document.find("track") is not None:
        found = "'CVAT for video 1.1'" if document.tag == "annotations" else f"<{document.tag}>"
        message = f"holds {found}, expected <annotations>; export 'CVAT for images 1.1'"
        raise DataError(path, message, expected="annotations", actual=document.tag)
    return document


def _labels(document: Element, path: Path) -> list[Label]:
    """Return the labels of a task, project or job; parts of a skeleton are none."""
    labels = []
    for label in document.findall("./meta/*/labels/label"):
        name, colour = label.findtext("name", ""), label.findtext("color", "")
        if not label.findtext("parent"):
            labels.append(Label(name, _colour(colour)))
    if not labels:
        raise DataError(path, "lists no labels; export the task or project from CVAT again")
    return labels


def _colour(text: str) -> Colour | None:
    """Read a colour such as ``#fa3253``; older versions of CVAT write none."""
    if len(text) != 7:
        return None
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def _inside(shape: Element, size: Size, pair: Pair) -> np.ndarray:
    """Draw a shape, (H, W) bool."""
    if shape.tag not in OUTLINES:
        raise DataError(
            pair.mask,
            f"{pair.id} has a {shape.tag} ({shape.get('label')!r}), which covers no area; remove "
            f"it in CVAT, or draw it as one of {', '.join(OUTLINES)}",
            expected=OUTLINES,
            actual=shape.tag,
        )
    try:
        degrees = float(shape.get("rotation", 0))
        if shape.tag == "polygon":
            points = [_numbers(point, ",") for point in shape.attrib["points"].split(";")]
            return fill_polygon(points, size)
        if shape.tag == "ellipse":
            x, y, rx, ry = (float(shape.attrib[key]) for key in ("cx", "cy", "rx", "ry"))
            return fill_ellipse((x, y), (rx, ry), degrees, size)
        if shape.tag == "mask":
            left, top, width, height = (
                int(shape.attrib[key]) for key in ("left", "top", "width", "height")
            )
            runs = [int(run) for run in _numbers(shape.attrib["rle"], ",")]
            return place(runs_to_patch(runs, height, width), top, left, size)
        left_x, top_y, right_x, bottom_y = (
            float(shape.attrib[key]) for key in ("xtl", "ytl", "xbr", "ybr")
        )
        corners = ((left_x, top_y), (right_x, top_y), (right_x, bottom_y), (left_x, bottom_y))
        centre = (left_x + right_x) / 2, (top_y + bottom_y) / 2
        return fill_polygon(turn_points(corners, centre, degrees), size)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise DataError(
            pair.mask,
            f"a {shape.tag} of {pair.id} ({shape.get('label')!r}) cannot be drawn: {error}; "
            "export it again",
        ) from error


def _numbers(text: str, mark: str) -> Sequence[float]:
    return [float(part) for part in text.split(mark)]
