"""Overlays of predicted classes in colour over their image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Palette = Sequence[tuple[int, int, int]]
OPACITY = 0.5  # of a class's colour
BLACK = (0, 0, 0)


def overlay(image: np.ndarray, classes: np.ndarray, palette: Palette) -> np.ndarray:
    """Blend an image with the colours of its classes, with thin white lines between classes.

    Parameters
    ----------
    image
        (H, W, 3) uint8.
    classes
        (H, W) uint8.
    palette
        A colour a class. A black class, by custom the background, leaves the image as it is.

    Returns
    -------
    (H, W, 3) uint8
    """
    colours = np.zeros((256, 3), np.float32)
    colours[: len(palette)] = palette
    weight = np.ones((256, 1), np.float32)  # of the image, by class
    weight[[value for value, colour in enumerate(palette) if tuple(colour) != BLACK]] = 1 - OPACITY
    # Looking up by class avoids float32 arrays (H, W, 3) besides the blend itself.
    blend = image * weight[classes]
    blend += (colours * (1 - weight))[classes]
    blend[_borders(classes)] = 255
    return blend.astype(np.uint8)


def _borders(classes: np.ndarray) -> np.ndarray:
    """Mark pixels (H, W) next to another class; lines are wider in images above 1000 pixels."""
    edge = np.zeros(classes.shape, bool)
    edge[:-1] |= classes[:-1] != classes[1:]
    edge[:, :-1] |= classes[:, :-1] != classes[:, 1:]
    for _ in range(max(classes.shape) // 1000):
        edge[1:] |= edge[:-1]
        edge[:, 1:] |= edge[:, :-1]
    return edge


def legend(class_names: Sequence[str], palette: Palette) -> Image.Image:
    """Draw the colour, number and name of each class, in columns of at most 25 classes."""
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
