"""Colours for classes to which the data set gives none."""

from __future__ import annotations

import colorsys

Colour = tuple[int, int, int]


def bit_colour(value: int) -> Colour:
    """Return the colour of a label, 0..255, in Pascal VOC's devkit; all 256 differ.

    The label's bits go to red, green and blue in turn, the lowest to the channels' highest bits.
    """
    channels = [0, 0, 0]
    for bit in range(8):
        channels[bit % 3] |= (value >> bit & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


def hue_colour(value: int) -> Colour:
    """Return one of evenly spread, bright hues; black for 0. For short lists."""
    if value == 0:
        return 0, 0, 0
    red, green, blue = colorsys.hsv_to_rgb(value * 0.618 % 1, 0.65, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)
