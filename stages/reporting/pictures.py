"""The report's pictures: images, masks and features as small image files, each a data URI."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from stages.reporting.features import feature_grid

JPEG_QUALITY = 88


@dataclass(frozen=True)
class Picture:
    """A named picture of the page, as a data URI."""

    name: str
    uri: str


@dataclass(frozen=True)
class FeatureStrip:
    """Thesis figure 4.2: channels of features, one column a mask, below images and masks."""

    name: str
    tops: tuple[Picture, ...]
    grid: Picture


def colour_masks(
    masks: np.ndarray, palette: Sequence[tuple[int, int, int]], void_index: int = 255
) -> np.ndarray:
    """Colour masks (..., H, W) uint8 as (..., H, W, 3) uint8; void is white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = palette
    table[void_index] = 255
    return table[masks]


def as_jpeg(name: str, pixels: np.ndarray) -> Picture:
    """Encode an image (H, W, 3) uint8 as JPEG."""
    return _picture(name, pixels, "jpeg", quality=JPEG_QUALITY)


def as_png(name: str, pixels: np.ndarray) -> Picture:
    """Encode (H, W, 3) uint8 of few colours, such as a coloured mask, as PNG without loss."""
    return _picture(name, pixels, "png", optimize=True)


def _picture(name: str, pixels: np.ndarray, kind: str, **options: int) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return Picture(name, f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")


def feature_strip(
    name: str, features: np.ndarray, masks: np.ndarray, images: np.ndarray | None
) -> FeatureStrip:
    """Draw channels of features below the masks that they belong to.

    Parameters
    ----------
    name
        Title of the strip.
    features
        (B, C, h, w) in 0..1.
    masks
        Coloured masks (B, H, W, 3).
    images
        (B, H, W, 3), or None where the store has no images.
    """
    import matplotlib as mpl

    tops = [] if images is None else [as_jpeg("images", np.hstack(list(images)))]
    tops.append(as_png("masks", np.hstack(list(masks))))  # (B, H, W, 3) -> (H, B*W, 3)
    hues = mpl.colormaps["viridis"](feature_grid(features), bytes=True)[..., :3]  # (C*h, B*w, 3)
    return FeatureStrip(name, tuple(tops), as_png(f"{name} features", hues))
