"""A trained decoder in use: images of any size in, a class for every pixel out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from featurestore import StoreSpec
from stages.common.errors import ConfigError
from stages.common.runtime import make_accelerator, to_channels_last
from stages.common.windows import OVERLAP
from stages.data.images import decode_image, read_bytes, too_deep, upright
from stages.segmentation.joining import join
from stages.training.models import load_backbone, load_decoder, read_precision, read_spec
from stages.use.windows import View, WindowedImage, cut

Input: TypeAlias = Image.Image | np.ndarray | str | Path

WEIGHTS = ("decoder", "decoder-best")


@dataclass(frozen=True)
class Segmentation:
    """The classes of an image.

    Attributes
    ----------
    classes
        (H0, W0) uint8.
    probabilities
        (K, H0, W0) in 0..1; None unless requested.
    """

    classes: np.ndarray
    probabilities: np.ndarray | None


class Segmenter:
    """Backbone and decoder as one network for images; use :meth:`load` to make one.

    >>> segmenter = Segmenter.load("models/decoders/baseline-0")
    >>> classes = segmenter("photo.jpg")  # (H, W) uint8, of the image's height and width

    An image is a path, a PIL image or an (H, W, 3) uint8 RGB array. Files and PIL images are turned
    as their EXIF tag says. All methods take the keywords of :class:`stages.use.windows.View`:
    ``mode``, ``overlap`` and ``scale``.

    Attributes
    ----------
    spec
        Spec of the features that the decoder was trained on; it has ``class_names`` and
        ``palette`` by class index.
    device
        Device of both networks.

    Parameters
    ----------
    backbone
        (B, 3, H, W) uint8 to features (B, C, h, w).
    decoder
        Features to logits (B, K, h, w).
    spec
        Input size, resize rule, precision of the backbone.
    device
        Device that both networks move to.
    precision
        Precision of the decoder: ``no`` (float32), ``bf16`` or ``fp16``. Default: ``no``. Without a
        GPU ``fp16`` is computed in float32.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decoder: nn.Module,
        spec: StoreSpec,
        *,
        device: torch.device,
        precision: str = "no",
    ) -> None:
        self.spec = spec
        self.device = device
        self._backbone = to_channels_last(backbone, device)
        self._decoder = to_channels_last(decoder, device)
        self._tf32 = precision == "tf32"
        self._precision = {
            "bf16": torch.bfloat16,
            "fp16": torch.float16 if device.type == "cuda" else None,
        }.get(precision)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        weights: str = "decoder",
        backbone_weights: str | Path = "default",
        device: str = "auto",
    ) -> Segmenter:
        """Load a decoder that ``train-decoder`` wrote, and the backbone of its features.

        Parameters
        ----------
        path
            Folder such as ``models/decoders/baseline-0``.
        weights
            ``decoder`` (last epoch) or ``decoder-best`` (best mIoU on val).
        backbone_weights
            Value of ``extract.weights``: ``default``, or the path of a state dict.
        device
            ``auto``, ``cpu`` or ``cuda``.

        Raises
        ------
        DataError
            When there is no trained decoder at ``path``, it is damaged, or its features were made
            with other backbone weights.
        ConfigError
            When the default weights are not available, or ``weights`` or ``device`` does not exist.
        """
        if weights not in WEIGHTS:
            message = f"should be {' or '.join(WEIGHTS)}, found {weights!r}"
            raise ConfigError("weights", message, expected=WEIGHTS, actual=weights)
        folder, spec = Path(path), read_spec(path)
        return cls(
            device=make_accelerator(device, "no").device,
            decoder=load_decoder(folder, weights=weights),
            backbone=load_backbone(folder, weights=weights, backbone_weights=str(backbone_weights)),
            spec=spec,
            precision=read_precision(folder),
        )

    def __call__(
        self, image: Input, *, mode: str = "resize", overlap: float = OVERLAP, scale: float = 1.0
    ) -> np.ndarray:
        """Return the class of every pixel of an image, (H, W) uint8."""
        return next(self.segment([image], mode=mode, overlap=overlap, scale=scale))

    def probabilities(
        self, image: Input, *, mode: str = "resize", overlap: float = OVERLAP, scale: float = 1.0
    ) -> np.ndarray:
        """Return the probability of every class at every pixel, (K, H, W) float32 in 0..1."""
        windows = self.cut(image, View(mode, overlap, scale))
        probabilities = next(self.run([windows], probabilities=np.float32)).probabilities
        assert probabilities is not None
        return probabilities

    def segment(
        self,
        images: Iterable[Input],
        *,
        batch_size: int = 8,
        mode: str = "resize",
        overlap: float = OVERLAP,
        scale: float = 1.0,
    ) -> Iterator[np.ndarray]:
        """Segment images, ``batch_size`` windows at a time.

        Yields
        ------
        array
            (H, W) uint8, the classes of one image; in the order of ``images``.
        """
        view = View(mode, overlap, scale)
        windows = (self.cut(image, view) for image in images)
        return (result.classes for result in self.run(windows, batch_size=batch_size))

    def cut(self, image: Input, view: View) -> WindowedImage:
        """Cut an image into windows for :meth:`run`.

        This step needs no network: threads may do it ahead.

        Raises
        ------
        DataError
            When a file is missing or damaged.
        ValueError
            When an array is no RGB image.
        """
        return cut(as_image(image), window=self.spec.mask_shape, rule=self.spec.resize, view=view)

    @torch.inference_mode()
    def run(
        self,
        images: Iterable[WindowedImage],
        *,
        batch_size: int = 8,
        probabilities: type[np.floating] | None = None,
    ) -> Iterator[Segmentation]:
        """Segment images; a batch may hold windows of several images.

        Parameters
        ----------
        images
            Results of :meth:`cut`, read as batches need them.
        batch_size
            Windows a batch.
        probabilities
            Type of the probabilities. Default: none are computed.
        """
        waiting: deque[WindowedImage] = deque()

        def windows() -> Iterator[np.ndarray]:
            for image in images:
                waiting.append(image)
                yield from image.windows()

        logits = self._logits(windows(), batch_size)
        for first in logits:
            image = waiting.popleft()
            yield self._join(image, chain([first], islice(logits, len(image) - 1)), probabilities)

    def _logits(self, windows: Iterator[np.ndarray], batch_size: int) -> Iterator[Tensor]:
        """Compute logits (K, h, w) of each window (H, W, 3) uint8."""
        kind = self.device.type
        while batch := list(islice(windows, batch_size)):
            # (B, H, W, 3) -> (B, 3, H, W), channels last in memory
            pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(self.device)
            # The backbone computes as in `extract`, without TF32; the decoder as in evaluation.
            with (
                torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
                torch.autocast(kind, torch.bfloat16, enabled=self.spec.compute == "bf16"),
            ):
                features = self._backbone(pixels).float()
            features = features.contiguous(memory_format=torch.channels_last)
            with (
                torch.backends.cudnn.flags(enabled=True, allow_tf32=self._tf32),
                torch.autocast(kind, self._precision, enabled=self._precision is not None),
            ):
                logits = self._decoder(features)
            yield from logits.float()

    def _join(
        self, image: WindowedImage, logits: Iterator[Tensor], kind: type[np.floating] | None
    ) -> Segmentation:
        classes = np.empty(image.size, np.uint8)
        size = (self.spec.num_classes, *image.size)
        probabilities = None if kind is None else np.empty(size, kind)
        done = 0
        for band in join(image.grid, logits, size=image.size, probabilities=kind is not None):
            rows = slice(done, done + band.shape[1])
            classes[rows] = band.max(0).indices.byte().cpu().numpy()
            if probabilities is not None:
                probabilities[:, rows] = band.cpu().numpy()
            done = rows.stop
        assert done == len(classes)
        return Segmentation(classes, probabilities)


def as_image(image: Input) -> Image.Image:
    """Read or convert an image to RGB, upright.

    Raises
    ------
    DataError
        When a file is missing or damaged.
    ValueError
        When an array or a PIL image has another format.
    """
    if isinstance(image, Image.Image):
        if depth := too_deep(image):
            raise ValueError(f"this image {depth}")
        return upright(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            actual = f"{image.shape} {image.dtype}"
            raise ValueError(f"an image must be an (H, W, 3) uint8 array, RGB; found {actual}")
        return Image.fromarray(image)
    return decode_image(read_bytes(Path(image), "image"), Path(image))
