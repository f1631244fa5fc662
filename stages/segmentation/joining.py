"""Logits of the windows of an image, joined at the size of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.common.windows import Grid

CHUNK_BYTES = 8 << 20  # of logits at the size of the image that are in memory at once
_bilinear = partial(F.interpolate, mode="bilinear", align_corners=False)


def join(
    grid: Grid, logits: Iterator[Tensor], *, size: tuple[int, int], probabilities: bool
) -> Iterator[Tensor]:
    """Join the windows' logits at the size of the image, in bands of rows from top to bottom.

    One window's logits are interpolated bilinearly from (h, w) to the size of the image. Several
    windows' logits become probabilities first, which are averaged where windows overlap.

    Parameters
    ----------
    grid
        Windows that the network saw, over the image as it was resized for it.
    logits
        (K, h, w) of each window.
    size
        (H0, W0) of the image.
    probabilities
        Whether bands hold probabilities. Otherwise they may hold logits.

    Yields
    ------
    Tensor
        (K, rows, W0) float32, together (K, H0, W0). The next band may overwrite its memory.
    """
    if len(grid) > 1:
        averaged = _average(grid, logits)
        if grid.size != size:
            averaged = _interpolate(averaged, size, grid.size)
        yield from averaged
        return
    whole = next(logits).float()
    # The image covers a fraction of the (h, w) cells; right of it and below it is padding.
    sides = zip(grid.size, whole.shape[-2:], grid.window, strict=True)
    height, width = (pixels * cells / window for pixels, cells, window in sides)
    for rows in _interpolate(iter([whole]), size, (height, width)):
        yield rows.softmax(0) if probabilities else rows


def _average(grid: Grid, logits: Iterator[Tensor]) -> Iterator[Tensor]:
    """Average probabilities (K, rows, Ws) of the resized image over windows.

    One row of windows is in memory; the next band overwrites the last.
    """
    (height, width), (rows, columns) = grid.window, grid.size
    down, across = _coverage(rows, grid.tops, height), _coverage(columns, grid.lefts, width)
    total: Tensor | None = None
    for top, following in zip(grid.tops, (*grid.tops[1:], rows), strict=True):
        for left in grid.lefts:
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
