"""Images of any size for networks of one input size: cut into windows, logits joined again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stages.common.errors import ConfigError
from stages.data.images import scaled_size

MODES = ("resize", "slide")
MAX_OVERLAP = 0.9  # ten times the windows of overlap 0 along each side
CHUNK_BYTES = 8 << 20  # of logits at the size of the image that are in memory at once
_bilinear = partial(F.interpolate, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class View:
    """How images of other sizes than the network's input size are shown to the network.

    Attributes
    ----------
    mode
        ``resize``: resize images as training images were resized. After ``stretch`` and ``pad``
        that is one window; after ``crop`` the image covers the window, and windows slide along its
        longer side. ``slide``: windows slide over the image at its resolution times ``scale``.
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
    overlap: float = 0.25
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
    window
        (H, W) of a window.
    tops, lefts
        First row of each row of windows, first column of each column of windows.
    """

    size: tuple[int, int]
    pixels: np.ndarray
    window: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def windows(self) -> Iterator[np.ndarray]:
        """Iterate over the windows row by row: (H, W, 3) uint8, black outside the image."""
        height, width = self.window
        for top in self.tops:
            for left in self.lefts:
                inside = self.pixels[top : top + height, left : left + width]
                below, right = height - inside.shape[0], width - inside.shape[1]
                yield np.pad(inside, ((0, below), (0, right), (0, 0)))


def cut(image: Image.Image, *, window: tuple[int, int], rule: str, view: View) -> WindowedImage:
    """Resize an RGB image and cut it into windows.

    Parameters
    ----------
    image
        The image.
    window
        (H, W), the network's input size.
    rule
        How training images were resized to it: ``stretch``, ``pad`` or ``crop``.
    view
        Mode, overlap and scale.
    """
    size = (image.height, image.width)
    if view.mode == "resize":
        rows, columns = scaled_size(size, size=window, rule=rule)
    else:
        rows, columns = (max(1, round(view.scale * side)) for side in size)
    if (rows, columns) != size:
        image = image.resize((columns, rows), Image.Resampling.BILINEAR)
    tops, lefts = (
        _starts(*sides, view.overlap) for sides in zip((rows, columns), window, strict=True)
    )
    return WindowedImage(size, np.asarray(image), window, tops, lefts)


def _starts(side: int, window: int, overlap: float) -> tuple[int, ...]:
    """Spread windows evenly over a side: the first pixel of each; the last ends with the side."""
    free = max(0, side - window)
    count = 1 + int(np.ceil(free / max(1.0, window * (1 - overlap))))
    return tuple(round(number * free / max(1, count - 1)) for number in range(count))


def join(
    image: WindowedImage, logits: Iterator[Tensor], *, probabilities: bool
) -> Iterator[Tensor]:
    """Join the windows' logits at the size of the image, in bands of rows from top to bottom.

    One window's logits are interpolated bilinearly from (h, w) to the size of the image. Several
    windows' logits become probabilities first, which are averaged where windows overlap.

    Parameters
    ----------
    image
        The image whose windows the network saw.
    logits
        (K, h, w) of each window.
    probabilities
        Whether bands hold probabilities. Otherwise they may hold logits.

    Yields
    ------
    Tensor
        (K, rows, W0) float32, together (K, H0, W0). The next band may overwrite its memory.
    """
    if len(image) > 1:
        averaged, (height, width) = _average(image, logits), image.pixels.shape[:2]
        if (height, width) != image.size:
            averaged = _interpolate(averaged, image.size, (height, width))
        yield from averaged
        return
    whole = next(logits).float()
    # The image covers a fraction of the (h, w) cells; right of it and below it is padding.
    sides = zip(image.pixels.shape[:2], whole.shape[-2:], image.window, strict=True)
    height, width = (pixels * cells / window for pixels, cells, window in sides)
    for rows in _interpolate(iter([whole]), image.size, (height, width)):
        yield rows.softmax(0) if probabilities else rows


def _average(image: WindowedImage, logits: Iterator[Tensor]) -> Iterator[Tensor]:
    """Average probabilities (K, rows, Ws) of the resized image over windows.

    One row of windows is in memory; the next band overwrites the last.
    """
    (height, width), (rows, columns) = image.window, image.pixels.shape[:2]
    down, across = _coverage(rows, image.tops, height), _coverage(columns, image.lefts, width)
    total: Tensor | None = None
    for top, following in zip(image.tops, (*image.tops[1:], rows), strict=True):
        for left in image.lefts:
            window = _bilinear(next(logits)[None].float(), size=(height, width))
            if total is None:
                total = window.new_zeros(window.shape[1], height, max(columns, width))
            total[:, :, left : left + width] += window[0].softmax(0)
        assert total is not None
        done = following - top  # rows that no later window reaches
        times = down[top:following, None] * across  # (rows, Ws)
        yield total[:, :done, :columns].div_(times.to(total.device))
        shared = total[:, done:].clone()  # with the next row of windows
        total.zero_()[:, : shared.shape[1]] = shared


def _coverage(side: int, starts: Sequence[int], window: int) -> Tensor:
    """Count the windows over each pixel of a side: (side,) float32."""
    pixels = torch.arange(side)
    covers = [(pixels >= start) & (pixels < start + window) for start in starts]
    return torch.stack(covers).sum(0).float()


def _interpolate(
    bands: Iterator[Tensor], size: tuple[int, int], extent: tuple[float, float]
) -> Iterator[Tensor]:
    """Interpolate a map bilinearly, a band of rows at a time.

    The values are those of ``F.interpolate`` with ``align_corners=False``, but memory holds only
    ``CHUNK_BYTES`` of the result, and only a corner of the map is interpolated.

    Parameters
    ----------
    bands
        (K, rows, w), the map from top to bottom.
    size
        (H0, W0) of the result.
    extent
        Height and width, in cells of the map, of the upper left corner that becomes the result.

    Yields
    ------
    Tensor
        (K, rows, W0).
    """
    height, width = size
    above, weight = _linear_weights(height, extent[0])
    first = done = 0  # first row of the map in memory; rows of the result that are done
    held: Tensor | None = None
    for band in bands:
        held = band if held is None else torch.cat([held, band], 1)
        stop = first + held.shape[1]
        last = stop >= extent[0]  # the map's last row stands in for the rows below it
        ready = height if last else int((above + 1 < stop).sum())
        chunk = max(1, CHUNK_BYTES // (4 * held.shape[0] * width))  # in rows
        for start in range(done, ready, chunk):
            rows = slice(start, min(ready, start + chunk))
            upper, lower = (
                held[:, (above[rows] + step).clamp(max=stop - 1).to(held.device) - first]
                for step in (0, 1)
            )
            mixed = torch.lerp(upper, lower, weight[rows, None].to(held.device))
            yield _interpolate_columns(mixed, width, extent[1])
        done = max(done, ready)
        if done < height:
            keep = min(int(above[done]), stop)
            held, first = held[:, keep - first :].clone(), keep


def _linear_weights(count: int, extent: float) -> tuple[Tensor, Tensor]:
    """Locate ``count`` pixels on ``extent`` cells: the cell before each centre, lerp's weight."""
    centres = ((torch.arange(count).double() + 0.5) * (extent / count) - 0.5).clamp(min=0)
    before = centres.floor()
    return before.long(), (centres - before).float()


def _interpolate_columns(rows: Tensor, width: int, extent: float) -> Tensor:
    """(K, rows, w) to (K, rows, W0), of which the first ``extent`` columns are wanted."""
    if extent == rows.shape[2]:
        return _bilinear(rows[None], size=(rows.shape[1], width))[0]
    wanted = rows[None, :, :, : int(extent) + 2]  # the last pixel lies between two columns
    return _bilinear(wanted, scale_factor=(1.0, width / extent))[0, :, :, :width]
