"""predict: photographs in, a folder of masks, overlays and probabilities out, a part of which may be there already."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import featurestore
from featurestore import StoreSpec
from featurestore.files import file_sha256, write_atomically, writing
from featurestore.prefetch import prefetch
from stages.common.errors import ConfigError, DataError
from stages.common.runtime import progress
from stages.data.images import IMAGE_SUFFIXES
from stages.reporting.overlay import legend, overlay
from stages.training.models import CONFIG_NAME, read_spec
from stages.use.segmenter import Segmentation, Segmenter, as_image
from stages.use.windows import Photograph, View

MANIFEST_NAME = "predictions.json"
CLASS_LIST = "classes.csv"
LEGEND_NAME = "legend.png"
MASKS, OVERLAYS, PROBABILITIES = "masks", "overlays", "probabilities"
MADE_FROM = "featuregan"  # key of the text in a mask's PNG


# -- what goes in -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A photograph, and where its predictions belong: the path below each folder of them, without a suffix."""

    image: Path
    name: Path


def find_photographs(inputs: Sequence[str], out: Path) -> list[Job]:
    """All photographs that the inputs stand for.

    Parameters
    ----------
    inputs
        A file, a folder (with all below it, hidden files and ``out`` itself left aside) or a pattern such as ``photos/*/a*.jpg``
        (``**`` stands for any folders). A photograph keeps its path below the folder, or below the part of the pattern that has
        no ``*``.
    out
        Where the predictions go.

    Raises
    ------
    ConfigError
        When an input stands for no photograph, or two photographs would have one name.
    """
    jobs: dict[Path, Job] = {}
    for text in inputs:
        found = list(_photographs_of(text, out))
        if not found:
            nothing = f"there is no photograph ({', '.join(IMAGE_SUFFIXES)}) in this folder"
            raise ConfigError(
                text,
                nothing if Path(text).is_dir() else "no such file or folder, nor a pattern of one",
            )
        for job in found:
            other = jobs.setdefault(job.name, job)
            if other.image.resolve() != job.image.resolve():
                message = f"would have the same output, {job.name}.png, as {other.image}; predict them into two folders, or rename one"
                raise ConfigError(str(job.image), message)
    return list(jobs.values())


def _photographs_of(text: str, out: Path) -> Iterator[Job]:
    path = Path(text)
    if path.is_file():
        yield Job(path, Path(path.stem))
    elif path.is_dir():
        for folder, folders, files in os.walk(path):
            inside = (name for name in folders if not name.startswith("."))
            folders[:] = sorted(
                name for name in inside if (Path(folder) / name).resolve() != out.resolve()
            )
            yield from (
                _below(Path(folder) / name, path) for name in sorted(files) if _is_photograph(name)
            )
    else:
        start = Path(
            *path.parts[
                : next(
                    (number for number, part in enumerate(path.parts) if glob.has_magic(part)), 0
                )
            ]
        )
        for name in sorted(glob.glob(text, recursive=True)):
            if (
                _is_photograph(Path(name).name)
                and Path(name).is_file()
                and not Path(name).resolve().is_relative_to(out.resolve())
            ):
                yield _below(Path(name), start)


def _below(file: Path, folder: Path) -> Job:
    return Job(file, file.relative_to(folder).with_suffix(""))


def _is_photograph(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")


# -- what comes out -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictions:
    """A folder of one decoder's predictions; made by :meth:`open`.

    A mask is written after everything else of its photograph. Its PNG says of which model and of which file it is, so
    that one look tells whether a photograph is finished.

    Attributes
    ----------
    path
        ``masks/NAME.png`` (class indices with the palette), and as asked for ``overlays/NAME.jpg`` and
        ``probabilities/NAME.npz`` (float16, (K, H, W)); ``classes.csv``, ``legend.png``, ``predictions.json``.
    spec
        Of the decoder: class names and palette.
    identity
        Of the decoder, and of how it looked at photographs.
    overlays, probabilities
        Whether these are wanted beside the masks.
    """

    path: Path
    spec: StoreSpec
    identity: str
    overlays: bool
    probabilities: bool

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        decoder: Path,
        weights: str,
        view: View,
        overlays: bool,
        probabilities: bool,
        force: bool = False,
    ) -> Predictions:
        """Start a folder, or go on with one of the same decoder and view.

        Parameters
        ----------
        path
            A folder that is new, empty, or of predictions.
        decoder, weights
            Folder of the decoder, and the name of its weights.
        force
            Whether predictions of another decoder or view may be replaced.

        Raises
        ------
        DataError
            When there is no decoder, or the folder holds something else, or predictions of another decoder or view.
        """
        spec, file = read_spec(decoder), decoder / f"{weights}.safetensors"
        if not file.is_file():
            raise DataError(file, "there is no such weights file; run the train-decoder stage")
        model = featurestore.fingerprint(
            weights=file_sha256(file), config=file_sha256(decoder / CONFIG_NAME)
        )
        if view.mode == "resize" and spec.resize != "crop":  # one window, which overlaps no other
            view = replace(view, overlap=View.overlap)
        settings = {"model": model, **asdict(view)}
        manifest = path / MANIFEST_NAME
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            there = [name for name in os.listdir(path) if not name.endswith(".partial")]
        if manifest.is_file():
            if not _check(manifest, settings, force):
                for kind in (
                    MASKS,
                    OVERLAYS,
                    PROBABILITIES,
                ):  # of another decoder, and so of other classes perhaps
                    shutil.rmtree(path / kind, ignore_errors=True)
        elif there:
            raise DataError(
                path,
                f"is not empty, and no folder of predictions (it has no {MANIFEST_NAME}); name a new folder",
            )
        described = {"decoder": str(decoder), "weights": weights, **settings}
        with writing(path):
            write_atomically(manifest, (json.dumps(described, indent=1) + "\n").encode())
            write_atomically(path / CLASS_LIST, _class_list(spec).encode())
            write_atomically(
                path / LEGEND_NAME, _encoded(legend(spec.class_names, spec.palette), "PNG")
            )
        return cls(path, spec, featurestore.fingerprint(**settings), overlays, probabilities)

    def file(self, kind: str, job: Job) -> Path:
        """Where a photograph's ``masks``, ``overlays`` or ``probabilities`` belong."""
        suffix = {MASKS: "png", OVERLAYS: "jpg", PROBABILITIES: "npz"}[kind]
        return self.path / kind / job.name.parent / f"{job.name.name}.{suffix}"

    def made_from(self, job: Job) -> str:
        """What a finished mask says of itself: the model, and the photograph's file as it is now.

        Raises
        ------
        DataError
            When the file is gone.
        """
        try:
            state = os.stat(job.image)
        except OSError as error:
            raise DataError(
                job.image, f"this photograph cannot be read ({error.strerror})"
            ) from error
        return json.dumps(
            {"identity": self.identity, "bytes": state.st_size, "changed": state.st_mtime_ns}
        )

    def is_finished(self, job: Job) -> bool:
        """Whether everything that is wanted of a photograph is there, of this model and of the file as it is now."""
        wanted = [
            kind
            for kind, asked in ((OVERLAYS, self.overlays), (PROBABILITIES, self.probabilities))
            if asked
        ]
        if not all(self.file(kind, job).is_file() for kind in wanted):
            return False
        return self._found(job) == self.made_from(job)

    def _found(self, job: Job) -> str | None:
        """What the mask that is there was made from; None where there is none, or none of ours."""
        try:
            with Image.open(self.file(MASKS, job)) as mask:
                return mask.info.get(MADE_FROM)
        except (OSError, SyntaxError, ValueError):
            return None

    def write(
        self, job: Job, made_from: str, image: Image.Image | None, found: Segmentation
    ) -> None:
        """Write what is wanted of a photograph, each file wholly or not at all, the mask last.

        What is there of another model, or of the file as it was, goes: the new mask would speak for it.

        Raises
        ------
        StoreWriteError
            When the file system refuses.
        """
        contents: dict[str, bytes] = {}
        if found.probabilities is not None:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, probabilities=found.probabilities)
            contents[PROBABILITIES] = buffer.getvalue()
        if image is not None:
            coloured = overlay(np.asarray(image), found.classes, self.spec.palette)
            contents[OVERLAYS] = _encoded(Image.fromarray(coloured), "JPEG", quality=92)
        mask = Image.fromarray(found.classes).convert("P")
        mask.putpalette([part for colour in self.spec.palette for part in colour])
        text = PngInfo()
        text.add_text(MADE_FROM, made_from)
        contents[MASKS] = _encoded(mask, "PNG", pnginfo=text)
        if self._found(job) != made_from:
            for kind in {OVERLAYS, PROBABILITIES} - contents.keys():
                with writing(self.file(kind, job)):
                    self.file(kind, job).unlink(missing_ok=True)
        for kind, content in contents.items():
            path = self.file(kind, job)
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content)


def _check(manifest: Path, settings: dict[str, object], force: bool) -> bool:
    """Whether predictions are of the same decoder and view; refuse others, unless they are to be replaced."""
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        other = [key for key, value in settings.items() if found.get(key) != value]
    except (OSError, ValueError, AttributeError) as error:
        if force:
            return False
        raise DataError(
            manifest,
            f"cannot be read ({error}); add --force to write it anew, or name another folder",
        ) from error
    if other and not force:
        what = (
            "another decoder"
            if other[0] == "model"
            else f"{other[0]} {found.get(other[0])}, not {settings[other[0]]}"
        )
        message = (
            f"holds predictions of {what}; add --force to replace them, or name another folder"
        )
        raise DataError(manifest.parent, message, expected=settings, actual=found)
    return not other


def _class_list(spec: StoreSpec) -> str:
    """The classes as a data set of the kind ``folder`` lists them, mask value 0 first."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["name", "red", "green", "blue"])
    writer.writerows(
        [name, *colour] for name, colour in zip(spec.class_names, spec.palette, strict=True)
    )
    return buffer.getvalue()


def _encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


# -- the work -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decoded:
    """A photograph on its way to the networks."""

    job: Job
    made_from: str
    image: Image.Image | None  # for the overlay
    photograph: Photograph


def predict(
    jobs: Sequence[Job],
    predictions: Predictions,
    segmenter: Segmenter,
    *,
    view: View,
    batch_size: int,
    workers: int,
) -> list[DataError]:
    """Segment photographs and write what is wanted of them.

    Three things at once: threads decode and scale, the networks compute, threads encode and write.

    Returns
    -------
    list
        What is wrong with the photographs that could not be read; all others are finished.

    Raises
    ------
    StoreWriteError
        When the file system refuses.
    """
    failed: list[DataError] = []
    waiting: deque[_Decoded] = deque()

    def decode(job: Job) -> _Decoded | DataError:
        try:
            made_from, image = predictions.made_from(job), as_image(job.image)
        except DataError as error:
            return error
        return _Decoded(
            job, made_from, image if predictions.overlays else None, segmenter.cut(image, view)
        )

    def photographs() -> Iterator[Photograph]:
        for decoded in prefetch(decode, jobs, workers=workers, ahead=batch_size):
            if isinstance(decoded, DataError):
                failed.append(decoded)
                bar.update()
                continue
            waiting.append(decoded)
            yield decoded.photograph

    def write(pair: tuple[_Decoded, Segmentation]) -> None:
        decoded, found = pair
        predictions.write(decoded.job, decoded.made_from, decoded.image, found)

    with progress((), "predict", len(jobs), "photo") as bar:
        found = segmenter.run(
            photographs(),
            batch_size=batch_size,
            probabilities=np.float16 if predictions.probabilities else None,
        )
        pairs = ((waiting.popleft(), segmentation) for segmentation in found)
        for _ in prefetch(write, pairs, workers=workers):
            bar.update()
    return failed
