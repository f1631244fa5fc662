"""predict: images in, a folder of masks, overlays and probabilities out; it resumes."""

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
from itertools import takewhile
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import featurestore
from featurestore import StoreSpec
from featurestore.files import file_sha256, write_atomically, writing
from featurestore.prefetch import prefetch
from stages.common.errors import ConfigError, DataError
from stages.common.runtime import check_device, progress
from stages.data.images import IMAGE_SUFFIXES
from stages.reporting.overlay import legend, overlay
from stages.training.models import CONFIG_NAME, read_spec
from stages.use.segmenter import Segmentation, Segmenter, as_image
from stages.use.windows import View, WindowedImage

MANIFEST_NAME = "predictions.json"
CLASS_LIST = "classes.csv"
LEGEND_NAME = "legend.png"
SUFFIXES = {"masks": "png", "overlays": "jpg", "probabilities": "npz"}  # by folder of predictions
SOURCE = "featuregan"  # key of the PNG text that says what a mask was made from


def run(
    decoder: Path,
    inputs: Sequence[str],
    *,
    out: Path,
    view: View,
    overlays: bool,
    probabilities: bool,
    weights: str,
    backbone_weights: str,
    batch_size: int,
    device: str,
    workers: int,
    force: bool,
) -> tuple[int, int, list[DataError]]:
    """Segment images with a trained decoder; images that are finished already are skipped.

    Parameters
    ----------
    decoder
        Folder that ``train-decoder`` wrote.
    inputs
        Files, folders and patterns; see :func:`find_images`.
    out
        Folder of the predictions; see :class:`Predictions`.
    view
        How the network sees images of other sizes than its input size.
    overlays, probabilities
        Whether to write them, too.
    weights
        ``decoder`` (last epoch) or ``decoder-best``.
    backbone_weights
        Value of ``extract.weights``.
    batch_size
        Windows a batch.
    device
        ``auto``, ``cpu`` or ``cuda``.
    workers
        Threads that read, and threads that write.
    force
        Whether predictions of another decoder or view may be replaced.

    Returns
    -------
    images, finished, failed
        Number of images, number of those that were finished before, errors of unreadable ones.

    Raises
    ------
    ConfigError, DataError
        When an input, the decoder, its backbone's weights or ``out`` is wrong.
    StoreWriteError
        When the file system refuses.
    """
    check_device(device)
    jobs = find_images(inputs, out)
    wanted = {"masks": True, "overlays": overlays, "probabilities": probabilities}
    predictions = Predictions.open(
        out,
        decoder=decoder,
        weights=weights,
        view=view,
        kinds=tuple(kind for kind in SUFFIXES if wanted[kind]),
        force=force,
    )
    unfinished = [job for job in jobs if not predictions.is_finished(job)]
    failed: list[DataError] = []
    if unfinished:
        segmenter = Segmenter.load(
            decoder, weights=weights, backbone_weights=backbone_weights, device=device
        )
        failed = _segment(
            unfinished, predictions, segmenter, view=view, batch_size=batch_size, workers=workers
        )
    return len(jobs), len(jobs) - len(unfinished), failed


# -- images ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """An image, and the path of its predictions below their folders, without a suffix."""

    image: Path
    name: Path


@dataclass(frozen=True)
class Decoded:
    """An image on its way to the networks."""

    job: Job
    source: str  # of Predictions.source
    image: Image.Image | None  # for the overlay
    windows: WindowedImage


def find_images(inputs: Sequence[str], out: Path) -> list[Job]:
    """Find all images of the inputs.

    Parameters
    ----------
    inputs
        A file, a folder (searched recursively, without hidden files and ``out``) or a pattern such
        as ``photos/*/a*.jpg`` (``**``: any folders). Predictions keep the path of their image below
        the folder, or below the pattern's last folder without ``*``.
    out
        Folder of the predictions.

    Raises
    ------
    ConfigError
        When an input matches no image, or two images would have the same output.
    """
    jobs: dict[Path, Job] = {}
    for text in inputs:
        images = _images_of(text, out)
        if not images:
            nothing = "no such file or folder, nor a pattern of one"
            if Path(text).is_dir():
                nothing = f"there is no image ({', '.join(IMAGE_SUFFIXES)}) in this folder"
            raise ConfigError(text, nothing)
        for job in images:
            other = jobs.setdefault(job.name, job)
            if other.image.resolve() != job.image.resolve():
                raise ConfigError(
                    str(job.image),
                    f"would have the same output, {job.name}.png, as {other.image}; "
                    "predict them into two folders, or rename one",
                )
    return list(jobs.values())


def _images_of(text: str, out: Path) -> list[Job]:
    path = Path(text)
    if path.is_file():
        return [Job(path, Path(path.stem))]
    if path.is_dir():
        root = path
        files = [
            file
            for file in path.rglob("*")
            if not any(name.startswith(".") for name in file.relative_to(path).parts)
        ]
    else:  # patterns do not match hidden files
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        files = [Path(name) for name in glob.glob(text, recursive=True)]
    return [
        Job(file, file.relative_to(root).with_suffix(""))
        for file in sorted(files)
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not file.is_dir()
        and not file.resolve().is_relative_to(out.resolve())
    ]


# -- predictions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictions:
    """A folder of one decoder's predictions; made by :meth:`open`.

    A mask is written after all other files of its image. Its PNG names the model and the image's
    file, which tells whether an image is finished.

    Attributes
    ----------
    path
        ``masks/NAME.png`` (class indices with the palette), ``overlays/NAME.jpg``,
        ``probabilities/NAME.npz`` (float16, (K, H, W)); ``classes.csv``, ``legend.png`` and
        ``predictions.json``.
    spec
        Spec of the decoder: class names and palette.
    identity
        Fingerprint of the decoder and the view.
    kinds
        ``masks``, and ``overlays`` and ``probabilities`` where they are wanted.
    """

    path: Path
    spec: StoreSpec
    identity: str
    kinds: tuple[str, ...]

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        decoder: Path,
        weights: str,
        view: View,
        kinds: tuple[str, ...],
        force: bool = False,
    ) -> Predictions:
        """Start a folder of predictions, or continue one of the same decoder and view.

        Parameters
        ----------
        path
            A folder that is new, empty, or holds predictions.
        decoder, weights
            Folder of the decoder, and the name of its weights.
        view
            How the network sees images of other sizes than its input size.
        kinds
            What to write.
        force
            Whether predictions of another decoder or view may be replaced.

        Raises
        ------
        DataError
            When there is no decoder, or the folder holds other files, or predictions of another
            decoder or view.
        """
        spec, file = read_spec(decoder), decoder / f"{weights}.safetensors"
        if not file.is_file():
            raise DataError(file, "there is no such weights file; run the train-decoder stage")
        model = featurestore.fingerprint(
            weights=file_sha256(file), config=file_sha256(decoder / CONFIG_NAME)
        )
        if view.mode == "resize" and spec.resize in ("stretch", "pad"):  # one window
            view = replace(view, overlap=View.overlap)
        settings = {"model": model, **asdict(view)}
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            _check_folder(path, settings, force=force)
            manifest = {"decoder": str(decoder), "weights": weights, **settings}
            colours = _encoded(legend(spec.class_names, spec.palette), "PNG")
            write_atomically(path / MANIFEST_NAME, f"{json.dumps(manifest, indent=1)}\n".encode())
            write_atomically(path / CLASS_LIST, _class_list(spec).encode())
            write_atomically(path / LEGEND_NAME, colours)
        return cls(path, spec, featurestore.fingerprint(**settings), kinds)

    def file(self, kind: str, job: Job) -> Path:
        """Return the path of an image's ``masks``, ``overlays`` or ``probabilities`` file."""
        return self.path / kind / job.name.parent / f"{job.name.name}.{SUFFIXES[kind]}"

    def source(self, job: Job) -> str:
        """Describe the model and the image's file: size and time of change.

        Raises
        ------
        DataError
            When the file is gone.
        """
        try:
            state = os.stat(job.image)
        except OSError as error:
            raise DataError(job.image, f"this image cannot be read ({error.strerror})") from error
        return json.dumps(
            {"identity": self.identity, "bytes": state.st_size, "changed": state.st_mtime_ns}
        )

    def is_finished(self, job: Job) -> bool:
        """Return whether all wanted files exist, of this model and of the image's current file."""
        exist = all(self.file(kind, job).is_file() for kind in self.kinds)
        return exist and self._stored_source(job) == self.source(job)

    def _stored_source(self, job: Job) -> str | None:
        """Return what the existing mask was made from; None if there is no readable mask."""
        try:
            with Image.open(self.file("masks", job)) as mask:
                return mask.info.get(SOURCE)
        except (OSError, SyntaxError, ValueError):
            return None

    def write(self, decoded: Decoded, result: Segmentation) -> None:
        """Write the wanted files of an image, each wholly or not at all, the mask last.

        Files of another model, or of an earlier image file, are removed.

        Raises
        ------
        StoreWriteError
            When the file system refuses.
        """
        job = decoded.job
        contents: dict[str, bytes] = {}
        if result.probabilities is not None:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, probabilities=result.probabilities)
            contents["probabilities"] = buffer.getvalue()
        if decoded.image is not None:
            coloured = overlay(np.asarray(decoded.image), result.classes, self.spec.palette)
            contents["overlays"] = _encoded(Image.fromarray(coloured), "JPEG", quality=92)
        mask, text = Image.fromarray(result.classes).convert("P"), PngInfo()
        mask.putpalette([value for colour in self.spec.palette for value in colour])
        text.add_text(SOURCE, decoded.source)
        contents["masks"] = _encoded(mask, "PNG", pnginfo=text)
        outdated = SUFFIXES.keys() - contents if self._stored_source(job) != decoded.source else ()
        for kind in outdated:
            with writing(self.file(kind, job)):
                self.file(kind, job).unlink(missing_ok=True)
        for kind, content in contents.items():
            with writing(self.file(kind, job)):
                self.file(kind, job).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.file(kind, job), content)


def _check_folder(path: Path, settings: dict[str, object], *, force: bool) -> None:
    """Refuse a folder of other files, or of predictions with other settings.

    With ``force``, predictions with other settings are removed.
    """
    manifest = path / MANIFEST_NAME
    if not manifest.is_file():
        if any(not name.endswith(".partial") for name in os.listdir(path)):
            raise DataError(
                path,
                f"is not empty, and no folder of predictions (it has no {MANIFEST_NAME}); "
                "name a new folder",
            )
        return
    try:
        actual = json.loads(manifest.read_text(encoding="utf-8"))
        different = [key for key, value in settings.items() if actual.get(key) != value]
    except (OSError, ValueError, AttributeError) as error:
        if not force:
            raise DataError(
                manifest,
                f"cannot be read ({error}); add --force to write it anew, or name another folder",
            ) from error
        actual, different = {}, ["model"]
    if different and not force:
        key = different[0]
        setting = f"{key} {actual.get(key)}, not {settings[key]}"
        what = "another decoder" if key == "model" else setting
        message = (
            f"holds predictions of {what}; add --force to replace them, or name another folder"
        )
        raise DataError(path, message, expected=settings, actual=actual)
    for kind in SUFFIXES if different else ():
        shutil.rmtree(path / kind, ignore_errors=True)


def _class_list(spec: StoreSpec) -> str:
    """List the classes as ``classes.csv`` of a data set of the kind ``folder``."""
    buffer = io.StringIO()
    rows = [(name, *colour) for name, colour in zip(spec.class_names, spec.palette, strict=True)]
    csv.writer(buffer, lineterminator="\n").writerows([("name", "red", "green", "blue"), *rows])
    return buffer.getvalue()


def _encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# -- segmentation ----------------------------------------------------------------------------------


def _segment(
    jobs: Sequence[Job],
    predictions: Predictions,
    segmenter: Segmenter,
    *,
    view: View,
    batch_size: int,
    workers: int,
) -> list[DataError]:
    """Segment images and write the wanted files; return the errors of unreadable images.

    Three steps run at once: threads decode and resize, the networks compute, threads encode and
    write.
    """
    failed: list[DataError] = []
    waiting: deque[Decoded] = deque()

    def decode(job: Job) -> Decoded | DataError:
        try:
            source, image = predictions.source(job), as_image(job.image)
        except DataError as error:
            return error
        kept = image if "overlays" in predictions.kinds else None
        return Decoded(job, source, kept, segmenter.cut(image, view))

    def windowed_images() -> Iterator[WindowedImage]:
        for decoded in prefetch(decode, jobs, workers=workers, ahead=batch_size):
            if isinstance(decoded, DataError):
                failed.append(decoded)
                bar.update()
            else:
                waiting.append(decoded)
                yield decoded.windows

    with progress((), "predict", len(jobs), "image") as bar:
        segmentations = segmenter.run(
            windowed_images(),
            batch_size=batch_size,
            probabilities=np.float16 if "probabilities" in predictions.kinds else None,
        )
        results = ((waiting.popleft(), segmentation) for segmentation in segmentations)
        for _ in prefetch(lambda pair: predictions.write(*pair), results, workers=workers):
            bar.update()
    return failed
