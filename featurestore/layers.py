"""Layers of a backbone in one store, and the geometry of the one map that they are assembled into.

The map has the grid of the finest layer of stride 8 or more. Coarser layers are upsampled to
the grid; finer ones are folded: each square of r x r pixels becomes r*r channels of one pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GRID_STRIDE = 8  # image pixels; no grid is finer
LAYERS = "layers"  # HDF5 group of the layers

Size = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """One layer as it is stored.

    Parameters
    ----------
    name
        Name in the backbone, such as ``layer3`` or ``11``; empty for the only layer of a store
        that names none.
    shape
        (c, h, w) of a sample.
    """

    name: str
    shape: tuple[int, int, int]

    @property
    def group(self) -> str:
        """HDF5 group of the layer's datasets, ``layers/NAME``; empty is the file's root."""
        return f"{LAYERS}/{self.name}" if self.name else ""

    def dataset(self, name: str) -> str:
        """Return the path of one of the layer's datasets, such as ``features``, in the file."""
        return f"{self.group}/{name}".lstrip("/")


def grid_size(layers: Sequence[Layer], image_size: Size) -> Size:
    """Find the grid (h, w) for images (H, W): the size of the finest layer of stride 8 or more.

    Where all layers are finer, the grid has stride 8.
    """
    sizes = [layer.shape[1:] for layer in layers]
    coarse = [size for size in sizes if size[0] * GRID_STRIDE <= image_size[0]]
    return max(coarse, default=(image_size[0] // GRID_STRIDE, image_size[1] // GRID_STRIDE))


def fold(layer: Layer, grid: Size) -> int:
    """Compute r, layer pixels per grid pixel along each side; 1: the layer is not folded.

    Raises
    ------
    ValueError
        When a finer layer is no whole multiple of the grid.
    """
    _, height, width = layer.shape
    if height <= grid[0] and width <= grid[1]:
        return 1
    factor = height // grid[0]
    if (height, width) != (factor * grid[0], factor * grid[1]):
        raise ValueError(
            f"layer {layer.name!r} of {height} x {width} is no multiple of the grid"
            f" {grid[0]} x {grid[1]}"
        )
    return factor


def map_shape(layers: Sequence[Layer], image_size: Size) -> tuple[int, int, int]:
    """Compute the shape (C, h, w) of the assembled map of images (H, W).

    Raises
    ------
    ValueError
        When a finer layer is no whole multiple of the grid.
    """
    grid = grid_size(layers, image_size)
    return sum(layer.shape[0] * fold(layer, grid) ** 2 for layer in layers), *grid
