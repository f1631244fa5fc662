"""What every data set tells ``prepare`` about itself, and how its files are paired."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from stages.common.errors import DataError
from stages.data.images import IMAGE_SUFFIXES, MASK_SUFFIXES, broken_link
from stages.data.manifest import SPLITS, Classes, Pair
from stages.datasets.findings import Finding

NAME, FILE = "{name}", "{file}"  # of an image, in prepare.mask_pattern
Convert = Callable[[Pair], "np.ndarray | None"]


@dataclass(frozen=True)
class DatasetLayout:
    """The content of a data set's folder.

    Attributes
    ----------
    pairs
        All images with their masks, each in the split of the data set's owners.
    classes
        Names and colours by class index, and the void value of masks that are used unchanged.
    convert
        Returns a pair's mask as (H, W) uint8 class indices with 255 for void, or None where the
        file holds such indices already. Raises ``DataError`` for a file that cannot be read and
        for a value that the data set does not define.
    findings
        What the reader left out or doubts, such as annotations without an outline.
    unlabelled
        Ids and files of images without labels.
    """

    pairs: list[Pair]
    classes: Classes
    convert: Convert | None = None
    findings: Sequence[Finding] = ()
    unlabelled: Sequence[tuple[str, Path]] = ()


@dataclass(frozen=True)
class Archive:
    """A file that everyone may download.

    Attributes
    ----------
    url, md5
        Address and checksum.
    inside
        Folder of the archive that is needed.
    target
        Destination of that folder.
    has
        A folder that ``target`` holds once the data is there.
    """

    url: str
    md5: str
    inside: str
    target: Path
    has: str


def first_folder(root: Path, names: tuple[str, ...], what: str, where: str) -> Path:
    """Return the first existing folder below ``root``; tools unpack one archive differently.

    Parameters
    ----------
    root, names
        Folder of the data set, and paths below it in order of preference.
    what, where
        For the error message: the content of the folder, and where to get it.

    Raises
    ------
    DataError
        When there is none of them.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    others = f", and no {' or '.join(names[1:])} either" if names[1:] else ""
    raise DataError(
        root / names[0],
        f"there is no such folder{others}; the {what} belong there ({where})",
    )


def pairs_by_suffix(
    images: Path,
    masks: Path,
    split: str,
    *,
    image_suffix: str = ".jpg",
    mask_suffix: str = ".png",
    below: str = "",
) -> list[Pair]:
    """Pair files of two folders by the text before their suffixes, which is the id.

    A missing partner is reported when the pair is checked.

    Parameters
    ----------
    images, masks
        Folders of the images and the masks.
    split
        ``train``, ``val`` or ``test``.
    image_suffix, mask_suffix
        Ends of the file names.
    below
        Pattern of folders in between, such as ``*/``; they are not part of the id.
    """
    names = {
        file.relative_to(folder).as_posix().removesuffix(suffix)
        for folder, suffix in ((images, image_suffix), (masks, mask_suffix))
        for file in folder.glob(f"{below}*{suffix}")
    }
    return [
        Pair(
            Path(name).name, images / f"{name}{image_suffix}", masks / f"{name}{mask_suffix}", split
        )
        for name in sorted(names)
    ]


def pairs_by_stem(
    images: Path, masks: Path, split: str, prefix: str = "", pattern: str = NAME
) -> list[Pair]:
    """Pair files of two folders by their names, whatever their formats.

    A missing partner is reported when the pair is checked. The folder of the masks may be that of
    the images.

    Parameters
    ----------
    images, masks
        Folders of the images and the masks.
    split
        ``train``, ``val`` or ``test``.
    prefix
        Begin of the ids; the rest is the image's name without its suffix.
    pattern
        Name of the mask without its suffix: ``{name}`` stands for the image's name without its
        suffix, ``{file}`` for the name with it. Other files among the masks are left out.

    Raises
    ------
    DataError
        When a folder is missing, two files of a folder share a stem, or masks are missing that
        another pattern finds.
    """
    for folder, content in ((images, "images"), (masks, "masks")):
        if link := broken_link(folder):
            raise DataError(folder, f"is {link}")
        if not folder.is_dir():
            raise DataError(folder, f"there is no such folder; put the {content} there")
    image_files = files_by_stem(images, IMAGE_SUFFIXES)
    mask_files = files_by_stem(masks, MASK_SUFFIXES)
    expression = re.escape(pattern).replace(re.escape(NAME), "(?P<name>.+)")
    expression = expression.replace(re.escape(FILE), "(?P<name>.+)[.][^.]+")
    names = {
        stem: found["name"] for stem in mask_files if (found := re.fullmatch(expression, stem))
    }
    if images == masks:  # the masks are no images
        image_files = {stem: file for stem, file in image_files.items() if stem not in names}
    wanted = {stem: mask_name(pattern, file) for stem, file in image_files.items()}
    _check_pattern(masks, image_files, mask_files, wanted, pattern)
    wanted = {**{name: stem for stem, name in names.items()}, **wanted}
    return [
        Pair(
            prefix + name,
            image_files.get(name, images / f"{name}.jpg"),
            mask_files.get(stem, masks / f"{stem}.png"),
            split,
        )
        for name, stem in sorted(wanted.items())
    ]


def mask_name(pattern: str, image: Path) -> str:
    """Return the name, without its suffix, that a pattern gives the mask of an image."""
    return pattern.replace(NAME, image.stem).replace(FILE, image.name)


def _check_pattern(
    folder: Path,
    images: Mapping[str, Path],
    masks: Mapping[str, Path],
    wanted: Mapping[str, str],
    pattern: str,
) -> None:
    """Refuse a pattern by which masks are missing that another pattern finds; name the other."""
    missing = [stem for stem in images if wanted[stem] not in masks]
    others: Counter[str] = Counter()
    for stem in missing[:20]:  # some are enough to see a pattern
        part, sign = (images[stem].name, FILE), (stem, NAME)
        others.update(
            mask.replace(*(part if part[0] in mask else sign), 1) for mask in masks if stem in mask
        )
    other = max(others, key=lambda name: (others[name], -len(name)), default=pattern)
    found = sum(mask_name(other, image) in masks for image in images.values())
    if 2 * found > len(images) and found > len(images) - len(missing):
        raise DataError(
            folder,
            f"{len(missing)} of {len(images)} images have no mask named {pattern}, and {found} "
            f"have one named {other}; set prepare.mask_pattern to '{other}'",
            expected=pattern,
            actual=other,
        )


def files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """List the files of a folder with one of these suffixes, by stem, sorted by name.

    Raises
    ------
    DataError
        When two files share a stem.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in suffixes and not file.name.startswith("."):
            other = files.setdefault(file.stem, file)
            if other != file:
                raise DataError(
                    file,
                    f"has the same id ({file.stem}) as {other.name}; rename one of them",
                )
    return files


def file_of_stem(folder: Path, stem: str, suffixes: tuple[str, ...]) -> Path:
    """Return the file of a folder with this stem; one with the first suffix if there is none."""
    files = [folder / f"{stem}{suffix}" for suffix in suffixes]
    return next((file for file in files if file.is_file()), files[0])


def first_file(folders: Sequence[Path], name: str) -> Path:
    """Return the first existing file of a name below these folders, else the first place.

    Where a tool wrote a path of its own machine, only the last part of the name is looked for.
    """
    name = name.replace("\\", "/")
    places = [folder / part for folder in folders for part in (name, PurePosixPath(name).name)]
    return next((place for place in places if place.is_file()), places[0])


def image_id(name: str) -> str:
    """Return an image's name without its suffix, with its folders where they are below the root."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        path = PurePosixPath(path.name)
    return path.with_suffix("").as_posix()


def split_of_subset(name: str, path: Path, split: str) -> str:
    """Return the split that a tool's subset, or a folder, is named after.

    Parameters
    ----------
    name
        Such as ``Train``, ``valid`` or ``val2017``; any with a random split.
    path
        For the error message.
    split
        ``prepare.split``; a random split divides all subsets anew.

    Raises
    ------
    DataError
        When it is named after none.
    """
    found = next((split for split in SPLITS if name.lower().startswith(split)), None)
    if found is None and split != "random":
        where = f"the subset {name!r}" if name else "images outside of subsets"
        raise DataError(
            path,
            f"has {where}, expected subsets named train, val and test; set prepare.split to "
            "random to divide all images",
            expected=SPLITS,
            actual=name,
        )
    return found or "train"
