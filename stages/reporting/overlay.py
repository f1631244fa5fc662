"""Predicted classes in colour over the image that they were predicted from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

OPACITY = 0.5  # of a class's colour
BLACK = (0, 0, 0)


def overlay(
    image: np.ndarray, classes: np.ndarray, palette: Sequence[tuple[int, int, int]]
) -> np.ndarray:
    """The image (H, W, 3) uint8 with its classes (H, W) uint8 in colour and thin white lines between them.

    A class whose colour is black, as the background's is by custom, is left as photographed.
    """
    colours = np.zeros((256, 3), np.float32)
    colours[: len(palette)] = palette
    kept = np.ones((256, 1), np.float32)  # share of the image
    kept[[value for value, colour in enumerate(palette) if tuple(colour) != BLACK]] = 1 - OPACITY
    # Both are looked up by class, so that nothing of (H, W, 3) float32 is made but the blend itself.
    blend = image * kept[classes]
    blend += (colours * (1 - kept))[classes]
    blend[borders(classes)] = 255
    return blend.astype(np.uint8)


def borders(classes: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels next to one of another class, in lines that grow with the image from one pixel on."""
    edge = np.zeros(classes.shape, bool)
    edge[:-1] |= classes[:-1] != classes[1:]
    edge[:, :-1] |= classes[:, :-1] != classes[:, 1:]
    for _ in range(max(classes.shape) // 1000):
        edge[1:] |= edge[:-1]
        edge[:, 1:] |= edge[:, :-1]
    return edge


def legend(class_names: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    """What the colours mean: a field and a name a class, in as many columns as make a sheet of them."""
    font = ImageFont.load_default(16)
    rows = min(len(class_names), 25)
    columns = -(-len(class_names) // rows)
    number = int(font.getlength(str(len(class_names) - 1)))
    width = 70 + number + int(max(font.getlength(name) for name in class_names))
    sheet = Image.new("RGB", (columns * width + 12, rows * 26 + 12), "white")
    draw = ImageDraw.Draw(sheet)
    for value, (name, colour) in enumerate(zip(class_names, palette, strict=True)):
        x, y = 12 + value // rows * width, 9 + value % rows * 26
        draw.rectangle((x, y, x + 26, y + 18), fill=tuple(colour), outline="#888888")
        draw.text((x + 36 + number, y + 9), str(value), fill="#666666", font=font, anchor="rm")
        draw.text((x + 46 + number, y + 9), name, fill="black", font=font, anchor="lm")
    return sheet
