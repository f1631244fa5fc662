"""wastesim, the data set of the project: drawn images of a waste-sorting belt with exact masks.

Every object is a height map with a material. Its silhouette is given in coordinates of the object,
bent by smooth noise, shaded by one lamp, and laid over what is below it with a soft shadow. Equal
seeds give equal pixels.
"""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from stages.common.errors import DataError
from stages.data.manifest import Classes, Pair

CLASSES = Classes(
    names=("belt", "paper", "cardboard", "plastic bottle", "plastic film", "metal can", "glass"),
    palette=(
        (60, 60, 66),
        (235, 235, 225),
        (190, 140, 85),
        (70, 170, 230),
        (235, 150, 215),
        (245, 190, 40),
        (50, 160, 90),
    ),
)
OBJECT_LIST = "objects.csv"
LIGHT = np.array([-0.45, -0.6, 0.66])  # towards the lamp: from the upper left


@dataclass(frozen=True)
class Abundance:
    """Frequency and size of a class.

    Attributes
    ----------
    share
        Fraction of the objects, up to a common factor.
    smallest, largest
        Range of the length, as fractions of the scene's side in 0..1.
    """

    share: float
    smallest: float
    largest: float


def read_abundances(root: Path) -> dict[str, Abundance]:
    """Read the mixture on the belt from ``root/objects.csv``.

    The columns are class, share, smallest, largest.

    Raises
    ------
    DataError
        When the file is missing, or lacks usable numbers for a class other than the belt.
    """
    path = root / OBJECT_LIST
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = {
                row["class"]: Abundance(
                    *(float(row[key]) for key in ("share", "smallest", "largest"))
                )
                for row in csv.DictReader(file)
            }
    except OSError as error:
        raise DataError(
            path,
            f"the belt's mixture cannot be read ({error.strerror}); "
            "prepare.root must hold this file",
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            path, f"needs the columns class, share, smallest, largest with numbers ({error})"
        ) from error
    usable = all(row.share >= 0 and 0 < row.smallest <= row.largest <= 1 for row in rows.values())
    total = sum(row.share for row in rows.values())
    if tuple(rows) != CLASSES.names[1:] or not usable or total <= 0:
        raise DataError(
            path,
            f"needs one line each for {', '.join(CLASSES.names[1:])}, in this order, "
            "with sizes in 0..1",
        )
    return rows


def write_pairs(
    folder: Path,
    *,
    root: Path,
    images: dict[str, int],
    size: int,
    objects: tuple[int, int],
    seed: int,
    workers: int,
) -> list[Pair]:
    """Draw the data set into ``folder/images`` and ``folder/masks``.

    Parameters
    ----------
    folder
        Destination of the images and masks.
    root
        Folder of ``objects.csv``.
    images
        Number of scenes by split.
    size
        Side of a scene in pixels.
    objects
        Smallest and largest number of objects in a scene.
    seed
        Seed; scene n of a split depends only on seed, split and n.
    workers
        Number of threads that draw.
    """
    abundances = read_abundances(root)

    def write(split_number: int, split: str, number: int) -> Pair:
        pair = Pair(
            f"{split}-{number:04d}",
            folder / "images" / split / f"{number:04d}.jpg",
            folder / "masks" / split / f"{number:04d}.png",
            split,
        )
        rng = np.random.default_rng([seed, split_number, number])
        image, mask = draw_scene(rng, abundances, size, objects)
        Image.fromarray(image).save(pair.image, quality=92)
        labels = Image.fromarray(mask).convert("P")
        labels.putpalette([channel for colour in CLASSES.palette for channel in colour])
        labels.save(pair.mask)
        return pair

    for kind in ("images", "masks"):
        for split in images:
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
    scenes = [
        (split_number, split, number)
        for split_number, (split, count) in enumerate(images.items())
        for number in range(count)
    ]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return list(pool.map(write, *zip(*scenes, strict=True)))


def draw_scene(
    rng: np.random.Generator, abundances: dict[str, Abundance], size: int, objects: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Parameters
    ----------
    rng
        Source of all random numbers.
    abundances
        Frequency and size by class; see :func:`read_abundances`.
    size
        Side of the scene in pixels, S.
    objects
        Smallest and largest number of objects.

    Returns
    -------
    (S, S, 3) uint8, (S, S) uint8
        The image and the mask.
    """
    canvas = _belt(rng, size)
    mask = np.zeros((size, size), np.uint8)
    shares = np.array([row.share for row in abundances.values()])
    for _ in range(rng.integers(objects[0], objects[1] + 1)):
        value = 1 + int(rng.choice(len(shares), p=shares / shares.sum()))
        name = CLASSES.names[value]
        length = size * rng.uniform(abundances[name].smallest, abundances[name].largest)
        u, v = _object_frame(rng, size, length, bend=0.25 if name == "plastic film" else 0.06)
        layer = DRAWERS[name](rng, u, v, length)
        shadow = gaussian_filter(np.roll(layer.alpha, (3, 2), (0, 1)), 2.5)[..., None]
        canvas = canvas * (1 - 0.45 * shadow)
        canvas = canvas * (1 - layer.alpha[..., None]) + layer.colour * layer.alpha[..., None]
        mask[layer.inside] = value
    blurred = gaussian_filter(canvas, (0.5, 0.5, 0))
    canvas = blurred * rng.uniform(0.85, 1.15) + rng.normal(0, 0.012, canvas.shape)
    return (np.clip(canvas, 0, 1) * 255).astype(np.uint8), mask


@dataclass(frozen=True)
class Layer:
    """A drawn object over the whole scene.

    Attributes
    ----------
    colour
        (S, S, 3) in 0..1.
    alpha
        (S, S) opacity in 0..1.
    inside
        (S, S) bool, the silhouette.
    """

    colour: np.ndarray
    alpha: np.ndarray
    inside: np.ndarray


# -- coordinates, noise, light ---------------------------------------------------------------------


def _noise(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Draw smooth noise of mean 0, standard deviation 1 and bumps of about ``scale`` pixels."""
    field = gaussian_filter(rng.standard_normal(shape), scale, mode="wrap")
    return field / (field.std() + 1e-9)


def _object_frame(
    rng: np.random.Generator, size: int, length: float, bend: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return each pixel's coordinates (u along, v across) in an object that spans -1..1 along u."""
    y, x = np.mgrid[:size, :size].astype(np.float64)
    angle = rng.uniform(0, 2 * np.pi)
    x, y = x - rng.uniform(0.08, 0.92) * size, y - rng.uniform(0.08, 0.92) * size
    u = (x * np.cos(angle) + y * np.sin(angle)) / (length / 2)
    v = (-x * np.sin(angle) + y * np.cos(angle)) / (length / 2)
    scale = max(2.0, length / 5)
    return u + bend * _noise(rng, u.shape, scale), v + bend * _noise(rng, v.shape, scale)


def _shaded(
    colour: np.ndarray, height: np.ndarray, *, depth: float, gloss: float, sharpness: float = 30.0
) -> np.ndarray:
    """Light a height map (S, S) by Lambert and Blinn-Phong; ``depth`` scales its slopes."""
    down, right = np.gradient(height * depth)
    normal = np.stack([-right, -down, np.ones_like(height)], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    diffuse = np.clip(normal @ LIGHT, 0, None)
    halfway = LIGHT + np.array([0.0, 0.0, 1.0])
    specular = np.clip(normal @ (halfway / np.linalg.norm(halfway)), 0, None) ** sharpness
    return colour * (0.4 + 0.75 * diffuse[..., None]) + gloss * specular[..., None]


def _layer(
    colour: np.ndarray, distance: np.ndarray, length: float, opacity: float | np.ndarray = 1.0
) -> Layer:
    """Cut out a silhouette with an edge of one soft pixel.

    ``distance`` is signed, negative inside, in units of half a ``length``.
    """
    soft = np.clip(0.5 - distance * length / 2, 0, 1)
    return Layer(colour, soft * opacity, distance < 0)


def _box(u: np.ndarray, v: np.ndarray, half_u: float, half_v: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)


def _plain(shape: tuple[int, int], colour: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.asarray(colour, np.float64), (*shape, 3)).copy()


# -- materials -------------------------------------------------------------------------------------


def _belt(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw dark, ribbed, scuffed rubber under an uneven lamp."""
    y, x = np.mgrid[:size, :size]
    ribs = 0.035 * (np.sin((y + rng.uniform(0, 20)) * 2 * np.pi / rng.uniform(7, 11)) > 0.75)
    scuffs = (
        0.02 * _noise(rng, (size, size), 6)
        + 0.012 * _noise(rng, (size, size), 1)
        + 0.03 * np.abs(_noise(rng, (size, size), 20))
    )
    lamp = 1.1 - 0.35 * np.hypot(x / size - rng.uniform(0.3, 0.7), y / size - rng.uniform(0.3, 0.7))
    grey = (0.24 + rng.uniform(-0.05, 0.06) + ribs + scuffs) * lamp
    return grey[..., None] * np.array([1.0, 0.99, 1.03])


def _paper(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, length: float) -> Layer:
    """Draw a crumpled sheet, blank or printed."""
    half = rng.uniform(0.45, 0.8)
    creases = sum(np.abs(_noise(rng, u.shape, length / count)) for count in (5, 9))
    colour = _plain(
        u.shape, rng.uniform(0.82, 0.97) * np.array([1.0, 0.99, rng.uniform(0.9, 0.98)])
    )
    if rng.random() < 0.6:
        lines = (
            (np.sin(v * rng.uniform(35, 60)) > 0.2)
            & (_noise(rng, u.shape, 1.2) > -0.3)
            & (_box(u, v, 0.8, half * 0.8) < 0)
        )
        colour[lines] *= 0.55
    return _layer(_shaded(colour, creases, depth=0.9, gloss=0.02), _box(u, v, 1.0, half), length)


def _cardboard(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, length: float) -> Layer:
    """Draw a torn brown piece with flutes, a fold and at times a strip of tape."""
    half = rng.uniform(0.5, 0.9)
    torn = _box(u, v, 1.0, half) + 0.05 * _noise(rng, u.shape, 2.0)
    flutes = 0.05 * np.sin(u * rng.uniform(40, 60))
    fold = np.abs(v - rng.uniform(-0.4, 0.4)) * 6
    colour = (
        _plain(u.shape, np.array([0.66, 0.48, 0.3]) * rng.uniform(0.8, 1.15))
        * (1 + flutes + 0.04 * _noise(rng, u.shape, 1.5))[..., None]
    )
    if rng.random() < 0.4:
        tape = np.abs(u - rng.uniform(-0.5, 0.5)) < 0.12
        colour[tape] = 0.6 * colour[tape] + 0.4 * np.array([0.85, 0.78, 0.6])
    return _layer(_shaded(colour, np.minimum(fold, 1.5), depth=1.0, gloss=0.0), torn, length)


def _bottle(
    u: np.ndarray, v: np.ndarray, body: float, neck: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape a bottle with a round bottom, body, shoulder and neck, all in half lengths.

    Returns
    -------
    radius, distance, across
        Each (S, S): the radius along the axis, the signed distance from the silhouette, and the
        position across the bottle in -1..1.
    """
    shoulder = body + (neck - body) * np.clip((u - 0.25) / 0.4, 0, 1) ** 1.5
    radius = shoulder * np.sqrt(np.clip(1 - np.clip((-0.75 - u) / 0.25, 0, 1) ** 2, 0, 1))
    distance = np.maximum(np.abs(u) - 1, np.abs(v) - radius)
    return radius, distance, np.clip(v / np.maximum(radius, 0.02), -1, 1)


def _plastic_bottle(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, length: float) -> Layer:
    """Draw a see-through bottle with a coloured cap, often a label, dents."""
    radius, distance, across = _bottle(u, v, rng.uniform(0.3, 0.38), 0.12)
    height = (
        np.sqrt(1 - across**2) * radius * length / 2
        + 0.8 * _noise(rng, u.shape, length / 14)
        + 0.6 * np.sin(u * 22)
    )
    tint = np.array([(0.72, 0.86, 0.95), (0.55, 0.8, 0.62), (0.9, 0.93, 0.95)][rng.integers(3)])
    colour, opacity = _plain(u.shape, tint), np.full(u.shape, rng.uniform(0.5, 0.7))
    marks = [(u > 0.82, rng.uniform(0.2, 0.95, 3))]
    if rng.random() < 0.65:
        marks.append((np.abs(u + 0.2) < 0.25, rng.uniform(0.15, 0.95, 3)))
    for where, paint in marks:
        colour[where], opacity[where] = paint, 0.97
    return _layer(_shaded(colour, height, depth=0.8, gloss=0.55), distance, length, opacity)


def _plastic_film(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, length: float) -> Layer:
    """Draw a crumpled, half-transparent bag."""
    distance = np.hypot(u * 0.95, v * rng.uniform(1.1, 1.6)) - 0.9
    wrinkles = np.abs(_noise(rng, u.shape, length / 14)) + 0.6 * np.abs(
        _noise(rng, u.shape, length / 30)
    )
    tint = np.array(
        [(0.93, 0.94, 0.96), (0.55, 0.65, 0.85), (0.35, 0.36, 0.4), (0.85, 0.6, 0.6)][
            rng.integers(4)
        ]
    )
    opacity = np.clip(rng.uniform(0.4, 0.6) + 0.15 * wrinkles, 0, 0.95)
    return _layer(
        _shaded(_plain(u.shape, tint), wrinkles, depth=2.2, gloss=0.5, sharpness=18),
        distance,
        length,
        opacity,
    )


def _metal_can(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, length: float) -> Layer:
    """Draw a drinks can on its side, printed, with bare rims, more or less crushed."""
    half = rng.uniform(0.5, 0.58) * (1 - rng.uniform(0, 0.35) * np.exp(-((u / 0.35) ** 2)))
    distance = np.maximum(
        np.abs(u) - 1 + 0.12 * np.clip(np.abs(v) / 0.55, 0, 1) ** 2, np.abs(v) - half
    )
    across = np.clip(v / half, -1, 1)
    bands = 0.5 + 0.5 * np.cos(across * rng.uniform(5, 8))  # the room, mirrored along the wall
    colour = np.where(
        (np.abs(u) < 0.82)[..., None], _plain(u.shape, rng.uniform(0.1, 0.9, 3)), 0.75
    )
    stripe = np.abs(np.sin(u * 3 + across * rng.uniform(-1, 1)) - rng.uniform(-0.5, 0.5)) < 0.2
    colour[stripe & (np.abs(u) < 0.82)] = rng.uniform(0.2, 1.0, 3)
    colour = colour * (0.55 + 0.55 * bands)[..., None]
    height = np.sqrt(1 - across**2) * 0.5 * length / 2 + rng.uniform(0, 1.5) * _noise(
        rng, u.shape, length / 9
    )
    return _layer(_shaded(colour, height, depth=0.6, gloss=0.65, sharpness=22), distance, length)


def _glass(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, length: float) -> Layer:
    """Draw a green, brown or clear bottle, whole or a shard of one."""
    radius, distance, across = _bottle(u, v, rng.uniform(0.26, 0.32), 0.1)
    if rng.random() < 0.4:  # broken: keep one side of a ragged line
        distance = np.maximum(distance, u - rng.uniform(-0.1, 0.4) + 0.12 * np.abs(np.sin(v * 15)))
    tint = np.array([(0.1, 0.36, 0.16), (0.36, 0.2, 0.08), (0.5, 0.6, 0.58)][rng.integers(3)])
    walls = 0.55 + 0.6 * np.abs(across) ** 3  # light is caught in the thick edges
    streak = 0.75 * np.exp(-(((across + rng.uniform(0.2, 0.5)) / 0.1) ** 2)) * (np.abs(u) < 0.9)
    colour = _plain(u.shape, tint) * walls[..., None] + streak[..., None]
    height = np.sqrt(1 - across**2) * radius * length / 2
    return _layer(
        _shaded(colour, height, depth=0.5, gloss=0.7, sharpness=60),
        distance,
        length,
        rng.uniform(0.82, 0.93),
    )


DRAWERS = {
    "paper": _paper,
    "cardboard": _cardboard,
    "plastic bottle": _plastic_bottle,
    "plastic film": _plastic_film,
    "metal can": _metal_can,
    "glass": _glass,
}
