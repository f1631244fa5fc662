"""Unlabelled images: those of a folder, or those that ``train_fraction`` leaves out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from stages.common.errors import ConfigError, DataError
from stages.data.images import IMAGE_SUFFIXES, decode_image, read_bytes
from stages.data.manifest import UNLABELLED, Entry, Pair
from stages.datasets.config import PrepareConfig

LEFT_OUT = "left-out"


def find_unlabelled(
    config: PrepareConfig, pairs: Sequence[Pair], kept: Sequence[Pair]
) -> list[tuple[str, Path]]:
    """Find the images that ``prepare.unlabelled`` names.

    Parameters
    ----------
    config
        Section ``prepare``.
    pairs, kept
        All labelled pairs, and those that ``train_fraction`` keeps.

    Returns
    -------
    list of (str, Path)
        Ids and files, sorted by id.

    Raises
    ------
    DataError
        When there is no such folder, or no image in it.
    ConfigError
        When ``train_fraction`` leaves out no image.
    """
    if not config.unlabelled:
        return []
    if config.unlabelled == LEFT_OUT:
        ids = {pair.id for pair in kept}
        found = [(pair.id, pair.image) for pair in pairs if pair.id not in ids]
        if not found:
            message = f"{LEFT_OUT} needs images that prepare.train_fraction leaves out; lower it"
            raise ConfigError("prepare.unlabelled", message)
        return sorted(found)
    folder = Path(config.root) / config.unlabelled
    if not folder.is_dir():
        raise DataError(folder, "there is no such folder; correct prepare.unlabelled")
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )
    if not files:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise DataError(folder, f"holds no image ({kinds}); correct prepare.unlabelled")
    return [(f"{UNLABELLED}/{file.relative_to(folder).as_posix()}", file) for file in files]


def check_unlabelled(
    images: Sequence[tuple[str, Path]],
    labelled: Sequence[Entry],
    config: PrepareConfig,
    *,
    workers: int,
) -> tuple[list[Entry], list[DataError]]:
    """Read every unlabelled image.

    Returns
    -------
    list of Entry, list of DataError
        Lines of the manifest, without a mask; images that cannot be read or are labelled, too.
    """
    by_hash = {entry.image_sha256: entry for entry in labelled}

    def check(image: tuple[str, Path]) -> Entry | DataError:
        id, path = image
        try:
            content = read_bytes(path, "image")
            decoded = decode_image(
                content,
                path,
                max_pixels=config.max_pixels,
                remedy="increase prepare.max_pixels, or make the image smaller",
            )
        except DataError as problem:
            return problem
        sha256 = hashlib.sha256(content).hexdigest()
        if (other := by_hash.get(sha256)) is not None:
            return DataError(
                path,
                f"is unlabelled here, and labelled as {other.image} of the split {other.split!r}; "
                "remove it from prepare.unlabelled",
            )
        size = (decoded.width, decoded.height)
        return Entry(id, path.as_posix(), "", UNLABELLED, *size, sha256, "")

    with ThreadPoolExecutor(max(1, workers)) as pool:
        title = "prepare: unlabelled"
        bar = tqdm(pool.map(check, images), title, len(images), unit="image", disable=None)
        results = list(bar)
    return (
        [result for result in results if isinstance(result, Entry)],
        [result for result in results if isinstance(result, DataError)],
    )
