"""Colours for classes that have none of their own."""

from __future__ import annotations

import colorsys

Colour = tuple[int, int, int]


def bit_colour(value: int) -> Colour:
    """The colour of a label in Pascal VOC's devkit: its bits, dealt to red, green and blue from the top. All 256 differ."""
    channels = [0, 0, 0]
    for bit in range(8):
        channels[bit % 3] |= (value >> bit & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


def hue_colour(value: int) -> Colour:
    """One of evenly spread hues; black for 0. For short lists: bright, and easy to tell apart."""
    if value == 0:
        return 0, 0, 0
    red, green, blue = colorsys.hsv_to_rgb(value * 0.618 % 1, 0.65, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)
