"""Views of training images: mirrored, rotated, cropped or recoloured, with their masks.

A view is a function of the image, its id, the name of the view and a seed. It depends on no other
image, view, batch or process.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import AfterValidator

from featurestore import VOID
from stages.data.images import resize_pair

UNSEEDED = ("identity", "hflip")  # without random numbers
DRAWN = ("rotate", "crop", "colour")  # each draws its strength; random-K combines them
RANDOM = re.compile(r"random-(\d+)")
MOST = 1000  # random views of an image

ANGLE = 15.0  # degrees, largest rotation in either direction
SIDE = 0.5  # smallest side of a crop, as a fraction of the image's
STRENGTH = 0.4  # brightness, contrast and saturation are multiplied by 1 - STRENGTH to 1 + STRENGTH
HUE = 0.1  # largest shift of the hue in either direction, as a fraction of the colour circle


def _known(name: str) -> str:
    """Check a name in ``extract.views``."""
    count = RANDOM.fullmatch(name)
    if count and name == f"random-{int(count[1])}" and 1 <= int(count[1]) <= MOST:
        return name
    if name not in UNSEEDED + DRAWN:
        known = ", ".join(UNSEEDED + DRAWN)
        raise ValueError(f"should be {known} or random-K with K from 1 to {MOST}")
    return name


ViewName = Annotated[str, AfterValidator(_known)]


def stored_views(names: Iterable[str]) -> tuple[str, ...]:
    """Return the views that a store holds for ``extract.views``.

    >>> stored_views(["identity", "crop", "random-2"])
    ('identity', 'crop', 'random-0', 'random-1')
    """
    views: list[str] = []
    for name in names:
        count = RANDOM.fullmatch(name)
        views += [f"random-{number}" for number in range(int(count[1]))] if count else [name]
    return tuple(views)


def configured_views(views: Iterable[str]) -> tuple[str, ...]:
    """Return ``extract.views`` of a store that holds these views, in order.

    >>> configured_views(["identity", "identity", "crop", "random-0", "random-1"])
    ('identity', 'crop', 'random-2')
    """
    different = tuple(dict.fromkeys(views))
    named = tuple(view for view in different if not RANDOM.fullmatch(view))
    count = len(different) - len(named)
    return (*named, f"random-{count}") if count else named


def is_seeded(views: Iterable[str]) -> bool:
    """Return whether one of the views depends on the seed."""
    return any(view not in UNSEEDED for view in views)


def make_view(
    image: Image.Image,
    mask: np.ndarray,
    *,
    id: str,
    view: str,
    seed: int,
    size: tuple[int, int],
    rule: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Make a view of an image and its mask, at the size of the store.

    Colours, rotation and crop change the image at its original size, so that a crop has the detail
    of the original. Then it is resized, and mirrored last: ``hflip`` mirrors the stored image.

    Parameters
    ----------
    image, mask
        RGB image, and mask (height, width) uint8 of its size.
    id
        Id of the image.
    view
        Name of a stored view: see :func:`stored_views`.
    seed
        Seed of the strengths.
    size, rule
        (H, W) and resize rule, see :func:`stages.data.images.resize_pair`.

    Returns
    -------
    (H, W, 3) uint8, (H, W) uint8
        The mask is changed as the image is, by nearest neighbour. Where a rotation leaves the image
        the image is black and the mask is 255.
    """
    rng = _rng(seed, id, view)
    changes = _drawn_changes(rng) if RANDOM.fullmatch(view) else {view}
    if "colour" in changes:
        image = _recoloured(image, rng)
    if "rotate" in changes:
        image, mask = _rotated(image, mask, rng.uniform(-ANGLE, ANGLE))
    if "crop" in changes:
        image, mask = _cropped(image, mask, rng)
    pixels, labels = resize_pair(image, mask, size=size, rule=rule)
    return (pixels[:, ::-1], labels[:, ::-1]) if "hflip" in changes else (pixels, labels)


def _rng(seed: int, id: str, view: str) -> np.random.Generator:
    """Build the source of random numbers of one view of one image."""
    name = int.from_bytes(hashlib.sha256(f"{view} {id}".encode()).digest(), "big")
    return np.random.default_rng([seed, name])


def _drawn_changes(rng: np.random.Generator) -> set[str]:
    """Draw the changes of a random view.

    It is mirrored with probability 0.5. One of the seven sets of rotation, crop and colour that are
    not empty is applied, all with the same probability: no random view is a copy of another.
    """
    mirrored, chosen = rng.random() < 0.5, 1 + int(rng.random() * (2 ** len(DRAWN) - 1))
    changes = {name for number, name in enumerate(DRAWN) if chosen >> number & 1}
    return changes | {"hflip"} if mirrored else changes


def _rotated(image: Image.Image, mask: np.ndarray, angle: float) -> tuple[Image.Image, np.ndarray]:
    """Rotate about the centre by an angle in degrees; the size stays."""
    labels = Image.fromarray(mask).rotate(angle, Image.Resampling.NEAREST, fillcolor=VOID)
    return image.rotate(angle, Image.Resampling.BILINEAR), np.asarray(labels)


def _cropped(
    image: Image.Image, mask: np.ndarray, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    """Cut out a part with the aspect ratio of the image, at a random place."""
    scale = rng.uniform(SIDE, 1)
    height, width = (round(scale * side) for side in (image.height, image.width))
    top = int(rng.random() * (image.height - height + 1))
    left = int(rng.random() * (image.width - width + 1))
    part = mask[top : top + height, left : left + width]
    return image.crop((left, top, left + width, top + height)), np.ascontiguousarray(part)


def _recoloured(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast, saturation and hue, in this order."""
    # Imported here: it takes a second, and every command reads the names of the views.
    from torchvision.transforms.v2 import functional as F

    for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
        image = adjust(image, rng.uniform(1 - STRENGTH, 1 + STRENGTH))
    return F.adjust_hue(image, rng.uniform(-HUE, HUE))
