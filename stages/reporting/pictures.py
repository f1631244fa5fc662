"""The report's pictures: photographs, masks and features as small image files, each a data URI."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from stages.reporting.feature_grid import feature_grid

PHOTOGRAPH_QUALITY = 88  # of JPEG


@dataclass(frozen=True)
class Picture:
    """A named image of the page, as a data URI."""

    name: str
    uri: str


@dataclass(frozen=True)
class FeatureStrip:
    """Thesis figure 4.2: channels of features, one column a mask, below the photographs and masks that they belong to."""

    name: str
    tops: tuple[Picture, ...]
    grid: Picture


def colour_masks(
    masks: np.ndarray, palette: Sequence[tuple[int, int, int]], void_index: int = 255
) -> np.ndarray:
    """Masks (..., H, W) uint8 as (..., H, W, 3) uint8; void is white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = palette
    table[void_index] = 255
    return table[masks]


def photograph(name: str, pixels: np.ndarray) -> Picture:
    """(H, W, 3) uint8 as JPEG."""
    return Picture(name, _data_uri(Image.fromarray(pixels), "jpeg", quality=PHOTOGRAPH_QUALITY))


def drawing(name: str, pixels: np.ndarray) -> Picture:
    """(H, W, 3) uint8 of few colours, such as a coloured mask, as PNG: every pixel as it is."""
    return Picture(name, _data_uri(Image.fromarray(pixels), "png", optimize=True))


def feature_strip(
    name: str, features: np.ndarray, masks: np.ndarray, images: np.ndarray | None
) -> FeatureStrip:
    """Features (B, C, h, w) in 0..1, below their masks (B, H, W, 3) and, where there are any, photographs (B, H, W, 3)."""
    import matplotlib as mpl

    above = [] if images is None else [photograph("photographs", _side_by_side(images))]
    hues = mpl.colormaps["viridis"](feature_grid(features), bytes=True)[..., :3]  # (C*h, B*w, 3)
    return FeatureStrip(
        name, (*above, drawing("masks", _side_by_side(masks))), drawing(f"{name} features", hues)
    )


def _side_by_side(pictures: np.ndarray) -> np.ndarray:
    """(B, H, W, 3) -> (H, B*W, 3)."""
    return np.concatenate(list(pictures), axis=1)


def _data_uri(image: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
