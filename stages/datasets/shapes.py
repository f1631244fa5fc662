"""Outlines of labelling tools as pixels, each by the convention of its tool."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageDraw

from stages.data.images import UPRIGHT

Size = tuple[int, int]  # (H, W) in pixels
Points = Sequence[Sequence[float]]  # (x, y) each, in pixels from the top left corner

# -- LabelMe: Pillow's drawing, border included ----------------------------------------------------


def draw_shape(kind: str, points: Points, size: Size) -> np.ndarray:
    """Draw an outline as LabelMe's own converters do.

    Parameters
    ----------
    kind
        ``polygon``, ``oriented_rectangle``, ``rectangle`` (two corners) or ``circle`` (centre and
        a point of the border).
    points
        Points of the outline.
    size
        Size of the mask.

    Returns
    -------
    (H, W) bool

    Raises
    ------
    ValueError
        When a shape of this kind has another number of points.
    """
    image = Image.new("1", size[::-1])
    pen = ImageDraw.Draw(image)
    xy = [(float(x), float(y)) for x, y in points]
    if kind in ("rectangle", "circle") and len(xy) != 2:
        raise ValueError(f"it has {len(xy)} points, expected 2")
    if kind == "rectangle":
        (left, right), (top, bottom) = (sorted(axis) for axis in zip(*xy, strict=True))
        pen.rectangle((left, top, right, bottom), fill=1)
    elif kind == "circle":
        (x, y), border = xy[0], xy[1]
        radius = math.dist((x, y), border)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    elif len(xy) < 3:
        raise ValueError(f"it has {len(xy)} points, expected at least 3")
    else:
        pen.polygon(xy, outline=1, fill=1)
    return np.asarray(image)


# -- CVAT: pixels whose centre is inside -----------------------------------------------------------


def fill_polygon(points: Points, size: Size) -> np.ndarray:
    """Return the pixels whose centre is inside of a polygon, (H, W) bool.

    Where the polygon crosses itself, a pixel is inside if its row enters the polygon an odd number
    of times before it.
    """
    height, width = size
    crossings = np.zeros((height, width + 1), np.int32)
    inside = np.zeros(size, bool)
    for (x, y), (next_x, next_y) in zip(points, [*points[1:], points[0]], strict=True):
        low, high = sorted((math.ceil(y - 0.5), math.ceil(next_y - 0.5)))
        rows = np.arange(max(low, 0), min(high, height))
        if rows.size:
            at = x + (rows + 0.5 - y) * (next_x - x) / (next_y - y)
            np.add.at(crossings, (rows, np.ceil(at - 0.5).clip(0, width).astype(int)), 1)
    touched = crossings.any(axis=1)  # large images have small objects
    inside[touched] = crossings[touched, :width].cumsum(axis=1) % 2 == 1
    return inside


def turn_points(points: Points, centre: Sequence[float], degrees: float) -> list[list[float]]:
    """Turn points clockwise, as seen on the image, around a centre."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x0, y0 = centre
    return [
        [
            x0 + (x - x0) * cosine - (y - y0) * sine,
            y0 + (x - x0) * sine + (y - y0) * cosine,
        ]
        for x, y in points
    ]


def fill_ellipse(
    centre: Sequence[float], radii: Sequence[float], degrees: float, size: Size
) -> np.ndarray:
    """Return the pixels whose centre is inside of an ellipse turned clockwise, (H, W) bool."""
    rows, columns = np.ogrid[: size[0], : size[1]]
    x, y = columns + 0.5 - centre[0], rows + 0.5 - centre[1]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    along, across = x * cosine + y * sine, y * cosine - x * sine
    return (along / radii[0]) ** 2 + (across / radii[1]) ** 2 <= 1


def runs_to_patch(runs: Sequence[int], height: int, width: int) -> np.ndarray:
    """Return a patch (height, width) bool from run lengths along its rows, outside first.

    Raises
    ------
    ValueError
        When the runs do not have as many pixels as the patch.
    """
    if sum(runs) != height * width:
        raise ValueError(f"its runs have {sum(runs)} pixels, expected {height} x {width}")
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(height, width)


def place(patch: np.ndarray, top: int, left: int, size: Size) -> np.ndarray:
    """Return a mask (H, W) bool with a patch; parts outside of the mask are cut off."""
    mask = np.zeros(size, bool)
    height, width = patch.shape
    rows, columns = slice(max(top, 0), top + height), slice(max(left, 0), left + width)
    target = mask[rows, columns]
    above, before = max(-top, 0), max(-left, 0)
    target[:] = patch[above : above + target.shape[0], before : before + target.shape[1]]
    return mask


# -- COCO: pycocotools -----------------------------------------------------------------------------


def drop_rings(segmentation: Any) -> tuple[Any, int]:
    """Leave out polygons of fewer than three points.

    Returns
    -------
    object, int
        The segmentation without them, empty where nothing is left, and their number.
    """
    if not isinstance(segmentation, list):
        return segmentation, 0
    rings = segmentation if all(isinstance(ring, list) for ring in segmentation) else [segmentation]
    kept = [ring for ring in rings if len(ring) >= 6]
    return kept, len(rings) - len(kept)


def decode_segmentation(segmentation: Any, size: Size) -> np.ndarray:
    """Draw COCO's polygons or run lengths as pycocotools does, (H, W) bool.

    Raises
    ------
    Exception
        When it is neither, or of another size; pycocotools raises bare exceptions.
    """
    from pycocotools import mask as rasteriser

    shape = segmentation
    if isinstance(shape, list):
        if odd := [len(ring) for ring in shape if len(ring) % 2]:
            raise ValueError(f"a polygon has {odd[0]} numbers, expected pairs")
        shape = rasteriser.merge(rasteriser.frPyObjects(shape, *size))
    elif isinstance(shape["counts"], list):  # run lengths, not compressed
        shape = rasteriser.frPyObjects(shape, *size)
    inside = rasteriser.decode(shape).astype(bool)
    if inside.shape != size:
        raise ValueError(f"of {inside.shape} pixels, in an image of {size}")
    return inside


# -- all -------------------------------------------------------------------------------------------


def turn_with_image(mask: np.ndarray, image: Path, *, stored: bool) -> np.ndarray:
    """Turn a drawn mask as its image is turned by its EXIF orientation.

    The mask's size tells whether it was drawn on the stored pixels or on the turned image. A mask
    of another size is not turned; nor is one whose image cannot be opened. Both are errors later.

    Parameters
    ----------
    mask
        (H, W) uint8.
    image
        File of the image.
    stored
        Whether the tool draws on the stored pixels; it decides where both sizes are equal.

    Returns
    -------
    (H, W) or (W, H) uint8
    """
    try:
        with Image.open(image) as file:
            turn = UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation, 1))
            size = file.height, file.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return mask
    if turn is None or mask.shape != size:
        return mask
    turned = np.asarray(Image.fromarray(mask).transpose(turn))
    return turned if stored or turned.shape != size else mask
