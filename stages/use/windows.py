"""Images of any size for networks of one input size: resized, and cut into windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from stages.common.errors import ConfigError
from stages.common.windows import OVERLAP, TILE, Grid
from stages.data.images import fill_up, scaled_size

MODES = ("resize", "slide")
MAX_OVERLAP = 0.9  # ten times the windows of overlap 0 along each side


@dataclass(frozen=True)
class View:
    """How images of other sizes than the network's input size are shown to the network.

    Attributes
    ----------
    mode
        ``resize``: resize images as training images were resized. After ``stretch`` and ``pad``
        that is one window; after ``crop`` the image covers the window, and windows slide along its
        longer side; after ``tile`` windows slide over the image as it is. ``slide``: windows slide
        over the image at its resolution times ``scale``.
    overlap
        Least fraction of a window's side that neighbouring windows share, 0..0.9. Windows are
        spread evenly.
    scale
        Factor by which ``slide`` resizes the image first, above 0.

    Raises
    ------
    ConfigError
        When the mode is unknown, or a number is out of range.
    """

    mode: str = "resize"
    overlap: float = OVERLAP
    scale: float = 1.0

    def __post_init__(self) -> None:
        slides = self.mode == "slide"
        for key, valid, expected in (
            ("mode", self.mode in MODES, " or ".join(MODES)),
            ("overlap", 0 <= self.overlap <= MAX_OVERLAP, f"a fraction of 0 to {MAX_OVERLAP}"),
            ("scale", 0 < self.scale < float("inf"), "a number above 0"),
            ("scale", self.scale == 1 or slides, "1 in mode resize, which scales as in training"),
        ):
            if not valid:
                actual = getattr(self, key)
                message = f"should be {expected}, found {actual!r}"
                raise ConfigError(key, message, expected=expected, actual=actual)


@dataclass(frozen=True)
class WindowedImage:
    """An image cut into windows by :func:`cut`; its length is the number of windows.

    Attributes
    ----------
    size
        (H0, W0) of the image, in pixels.
    pixels
        (Hs, Ws, 3) uint8, the resized image. Windows reach beyond it where it is smaller.
    grid
        Windows over the resized image.
    """

    size: tuple[int, int]
    pixels: np.ndarray
    grid: Grid

    def __len__(self) -> int:
        return len(self.grid)

    def windows(self) -> Iterator[np.ndarray]:
        """Iterate over the windows row by row: (H, W, 3) uint8, black outside the image."""
        for corner in self.grid.corners():
            yield fill_up(self.grid.cut(self.pixels, corner), self.grid.window)


def cut(image: Image.Image, *, window: tuple[int, int], rule: str, view: View) -> WindowedImage:
    """Resize an RGB image and cut it into windows.

    Parameters
    ----------
    image
        The image.
    window
        (H, W), the network's input size.
    rule
        How training images were resized to it: ``stretch``, ``pad``, ``crop`` or ``tile``.
    view
        Mode, overlap and scale.
    """
    size = (image.height, image.width)
    if view.mode == "resize" and rule != TILE:
        rows, columns = scaled_size(size, size=window, rule=rule)
    else:
        rows, columns = (max(1, round(view.scale * side)) for side in size)
    if (rows, columns) != size:
        image = image.resize((columns, rows), Image.Resampling.BILINEAR)
    return WindowedImage(size, np.asarray(image), Grid.over((rows, columns), window, view.overlap))
