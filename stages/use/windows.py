"""Photographs of any size for a network of one input size: where its windows lie, and how their scores come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stages.common.errors import ConfigError
from stages.data.images import scaled_size

MODES = ("resize", "slide")
MOST_OVERLAP = 0.9  # ten times as many windows as without, along each side
CHUNK_BYTES = 8 << 20  # of scores at the photograph's size that are in memory at once


@dataclass(frozen=True)
class View:
    """How a network looks at photographs that are not of its input size.

    Attributes
    ----------
    mode
        ``resize``: as the training photographs were brought to that size. After ``stretch`` and ``pad`` that is one window;
        after ``crop`` the photograph covers the window, and windows slide along its longer side.
        ``slide``: windows slide over the photograph at its own resolution times ``scale``.
    overlap
        Share of a window's side that neighbouring windows have in common, 0..0.9. It is the least one: windows are spread evenly.
    scale
        Of the photograph before windows slide over it.

    Raises
    ------
    ConfigError
        For an unknown mode, or numbers out of range.
    """

    mode: str = "resize"
    overlap: float = 0.25
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(
                "mode",
                f"should be {' or '.join(MODES)}, found {self.mode!r}",
                expected=MODES,
                actual=self.mode,
            )
        if not 0 <= self.overlap <= MOST_OVERLAP:
            message = (
                f"should be a share of the window of 0 to {MOST_OVERLAP}, found {self.overlap}"
            )
            raise ConfigError("overlap", message, expected=MOST_OVERLAP, actual=self.overlap)
        if not 0 < self.scale < float("inf"):
            raise ConfigError(
                "scale", f"should be a number above 0, found {self.scale}", actual=self.scale
            )
        if self.scale != 1 and self.mode != "slide":
            raise ConfigError(
                "scale",
                "is of mode slide; mode resize scales as in training",
                expected=1.0,
                actual=self.scale,
            )


@dataclass(frozen=True)
class Photograph:
    """A photograph as windows; made by :func:`cut`.

    Attributes
    ----------
    size
        (H0, W0) of the photograph, in pixels.
    pixels
        (Hs, Ws, 3) uint8, scaled; windows reach beyond it where it is smaller than they are.
    window
        (H, W) of a window.
    tops, lefts
        First row of each row of windows, first column of each column; windows are taken row by row.
    """

    size: tuple[int, int]
    pixels: np.ndarray
    window: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def windows(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 each; black where there is no photograph, as the rule ``pad`` has it."""
        height, width = self.window
        for top in self.tops:
            for left in self.lefts:
                part = self.pixels[top : top + height, left : left + width]
                below, right = height - part.shape[0], width - part.shape[1]
                yield np.pad(part, ((0, below), (0, right), (0, 0))) if below or right else part


def cut(image: Image.Image, *, window: tuple[int, int], rule: str, view: View) -> Photograph:
    """Scale a photograph in RGB and lay windows over it.

    Parameters
    ----------
    window
        (H, W), the network's input size.
    rule
        How the training photographs were brought to it: ``stretch``, ``pad`` or ``crop``.
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
    return Photograph(size, np.asarray(image), window, tops, lefts)


def _starts(side: int, window: int, overlap: float) -> tuple[int, ...]:
    """First pixels of windows that cover a side: evenly spread, the last one ends where the side does."""
    free = max(0, side - window)
    step = max(1.0, window * (1 - overlap))
    count = 1 + int(np.ceil(free / step))
    return tuple(round(number * free / max(1, count - 1)) for number in range(count))


def join(
    photograph: Photograph, scores: Iterator[Tensor], *, probabilities: bool
) -> Iterator[Tensor]:
    """The windows' scores at the photograph's own size and place, some rows at a time, from top to bottom.

    One window's scores are interpolated bilinearly from the network's (h, w) to the photograph at once. Several windows'
    become probabilities first, which are averaged where windows overlap.

    Parameters
    ----------
    scores
        (K, h, w) of each window, unnormalised.
    probabilities
        Whether probabilities are wanted, or whatever has its maximum where they have theirs.

    Yields
    ------
    Tensor
        (K, rows, W0) float32; all together they are (K, H0, W0). Its memory may be used again for the next ones.
    """
    if len(photograph) > 1:
        averaged, scaled = _average(photograph, scores), photograph.pixels.shape[:2]
        yield from (
            averaged
            if scaled == photograph.size
            else _interpolate(averaged, photograph.size, scaled)
        )
        return
    whole = next(scores).float()
    # The photograph takes this part of the (h, w) cells; the rest, right and below, is padding.
    sides = zip(photograph.pixels.shape[:2], whole.shape[-2:], photograph.window, strict=True)
    height, width = (pixels * cells / window for pixels, cells, window in sides)
    for rows in _interpolate(iter([whole]), photograph.size, (height, width)):
        yield rows.softmax(0) if probabilities else rows


def _average(photograph: Photograph, scores: Iterator[Tensor]) -> Iterator[Tensor]:
    """Probabilities (K, rows, Ws) of the scaled photograph, averaged over windows.

    In memory is one row of windows; each band is overwritten when the next one is asked for.
    """
    height, width = photograph.window
    rows, columns = photograph.pixels.shape[:2]
    down, across = (
        _cover(*sides)
        for sides in zip(
            (rows, columns), (photograph.tops, photograph.lefts), (height, width), strict=True
        )
    )
    total: Tensor | None = None
    for top, following in zip(photograph.tops, (*photograph.tops[1:], rows), strict=True):
        for left in photograph.lefts:
            window = F.interpolate(
                next(scores)[None].float(),
                size=(height, width),
                mode="bilinear",
                align_corners=False,
            )
            if total is None:
                total = window.new_zeros(window.shape[1], height, max(columns, width))
            total[:, :, left : left + width] += window[0].softmax(0)
        assert total is not None
        done = following - top  # rows that no window further down reaches
        times = down[top:following, None] * across  # (rows, Ws)
        yield total[:, :done, :columns].div_(times.to(total.device))
        shared = total[:, done:].clone()  # with the next row of windows
        total.zero_()[:, : shared.shape[1]] = shared


def _cover(side: int, starts: Sequence[int], window: int) -> Tensor:
    """(side,) how many windows lie over each pixel of a side."""
    times = torch.zeros(side)
    for start in starts:
        times[start : start + window] += 1
    return times


def _interpolate(
    bands: Iterator[Tensor], size: tuple[int, int], extent: tuple[float, float]
) -> Iterator[Tensor]:
    """Bands (K, rows, w) of a map as bands (K, rows, W0) of (H0, W0) = ``size``, bilinearly.

    As ``F.interpolate`` without aligned corners, but only for the ``extent`` of the map, in its cells, right and below
    of which nothing is wanted, and with no more in memory than a part of the rows.
    """
    height, width = size
    above, share = _taps(height, extent[0])
    first = done = 0  # first row that is still held; rows that are made
    held: Tensor | None = None
    for band in bands:
        held = band if held is None else torch.cat([held, band], 1)
        stop = first + held.shape[1]
        last = (
            stop >= extent[0]
        )  # no further row is wanted: where it would be, the edge stands for it
        ready = height if last else int((above + 1 < stop).sum())
        rows_at_once = max(1, CHUNK_BYTES // (4 * held.shape[0] * width))
        for start in range(done, ready, rows_at_once):
            chosen = slice(start, min(ready, start + rows_at_once))
            upper, lower = (
                held[:, (above[chosen] + step).clamp(max=stop - 1).to(held.device) - first]
                for step in (0, 1)
            )
            yield _widen(
                torch.lerp(upper, lower, share[chosen, None].to(held.device)), width, extent[1]
            )
        done = max(done, ready)
        if done < height:
            keep = min(int(above[done]), stop)
            held, first = held[:, keep - first :].clone(), keep


def _taps(fine: int, extent: float) -> tuple[Tensor, Tensor]:
    """For each of ``fine`` pixels over ``extent`` cells: the cell before its centre, and how far it is from there to the next."""
    centres = ((torch.arange(fine, dtype=torch.float64) + 0.5) * (extent / fine) - 0.5).clamp(min=0)
    before = centres.floor()
    return before.long(), (centres - before).float()


def _widen(rows: Tensor, width: int, extent: float) -> Tensor:
    """(K, rows, w) to (K, rows, W0), of which ``extent`` cells are wanted."""
    if extent == rows.shape[2]:
        return F.interpolate(
            rows[None], size=(rows.shape[1], width), mode="bilinear", align_corners=False
        )[0]
    wanted = rows[None, :, :, : int(extent) + 2]  # the last pixel lies between two of them
    return F.interpolate(
        wanted, scale_factor=(1.0, width / extent), mode="bilinear", align_corners=False
    )[0, :, :, :width]
