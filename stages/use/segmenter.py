"""A trained decoder in use: photographs of any size in, a class for every pixel out."""

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
from stages.common.runtime import make_accelerator
from stages.data.images import decode_image, read_bytes, too_deep, upright
from stages.training.models import load_decoder, read_precision, read_spec
from stages.use.trained_backbone import load_backbone
from stages.use.windows import Photograph, View, cut, join

Input: TypeAlias = Image.Image | np.ndarray | str | Path

WEIGHTS = ("decoder", "decoder-best")


@dataclass(frozen=True)
class Segmentation:
    """What a photograph shows: classes (H0, W0) uint8, and probabilities (K, H0, W0) in 0..1 where they were asked for."""

    classes: np.ndarray
    probabilities: np.ndarray | None


class Segmenter:
    """Backbone and decoder as one network for photographs; made by :meth:`load`.

    >>> segmenter = Segmenter.load("models/decoders/baseline-0")
    >>> classes = segmenter("photo.jpg")  # (H, W) uint8, of the photograph's own height and width

    A photograph is a path, a PIL image (turned as its EXIF tag says, as files are) or an (H, W, 3) uint8 array, red green blue.
    Keywords of all methods are those of :class:`stages.use.windows.View`: ``mode``, ``overlap``, ``scale``.

    Attributes
    ----------
    spec
        Of the features that the decoder was trained on; ``spec.class_names`` and ``spec.palette`` by class index.
    device
        Where both networks are.

    Parameters
    ----------
    backbone
        (B, 3, H, W) uint8 to features (B, C, h, w).
    decoder
        Features to scores (B, K, h, w).
    spec
        Input size, resize rule, precision of the backbone.
    precision
        Of the decoder: ``no``, ``bf16`` or ``fp16``. The last one takes effect on GPUs alone; elsewhere it is computed in float32.
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
        self._backbone = backbone.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._decoder = decoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
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
        """A decoder that ``train-decoder`` left, with the backbone that its features came from.

        Parameters
        ----------
        path
            Folder such as ``models/decoders/baseline-0``.
        weights
            ``decoder`` (last epoch) or ``decoder-best`` (best mIoU on val).
        backbone_weights
            What ``extract.weights`` was: ``default``, or the path of a state dict.
        device
            ``auto``, ``cpu`` or ``cuda``.

        Raises
        ------
        DataError
            When there is no trained decoder at ``path``, it is damaged, or its features came from other backbone weights.
        ConfigError
            When the default weights cannot be had, there are no such ``weights``, or no such device.
        """
        if weights not in WEIGHTS:
            raise ConfigError(
                "weights",
                f"should be {' or '.join(WEIGHTS)}, found {weights!r}",
                expected=WEIGHTS,
                actual=weights,
            )
        folder = Path(path)
        where = make_accelerator(device, "no").device
        spec, precision, decoder = (
            read_spec(folder),
            read_precision(folder),
            load_decoder(folder, weights=weights),
        )
        backbone = load_backbone(spec, str(backbone_weights))
        return cls(backbone, decoder, spec, device=where, precision=precision)

    def __call__(
        self, image: Input, *, mode: str = "resize", overlap: float = 0.25, scale: float = 1.0
    ) -> np.ndarray:
        """(H, W) uint8: the class of every pixel of a photograph."""
        return next(self.segment([image], mode=mode, overlap=overlap, scale=scale))

    def probabilities(
        self, image: Input, *, mode: str = "resize", overlap: float = 0.25, scale: float = 1.0
    ) -> np.ndarray:
        """(K, H, W) float32 in 0..1: the probability of every class at every pixel of a photograph."""
        cuts = [self.cut(image, View(mode, overlap, scale))]
        found = next(self.run(cuts, probabilities=np.float32)).probabilities
        assert found is not None
        return found

    def segment(
        self,
        images: Iterable[Input],
        *,
        batch_size: int = 8,
        mode: str = "resize",
        overlap: float = 0.25,
        scale: float = 1.0,
    ) -> Iterator[np.ndarray]:
        """(H, W) uint8 of each photograph, in their order, as they are ready; ``batch_size`` windows pass the networks at once."""
        view = View(mode, overlap, scale)
        return (
            found.classes
            for found in self.run(
                (self.cut(image, view) for image in images), batch_size=batch_size
            )
        )

    def cut(self, image: Input, view: View) -> Photograph:
        """A photograph as windows for :meth:`run`; the part of the work that needs no network, for threads to do ahead.

        Raises
        ------
        DataError
            When a file is missing or damaged.
        ValueError
            When an array is no photograph.
        """
        return cut(as_image(image), window=self.spec.mask_shape, rule=self.spec.resize, view=view)

    @torch.inference_mode()
    def run(
        self,
        photographs: Iterable[Photograph],
        *,
        batch_size: int = 8,
        probabilities: type[np.floating] | None = None,
    ) -> Iterator[Segmentation]:
        """Segment photographs, the windows of several in one batch.

        Parameters
        ----------
        photographs
            As :meth:`cut` gave them; taken as batches need them.
        batch_size
            Windows that pass the networks at once.
        probabilities
            Type of the probabilities, where they are wanted.
        """
        waiting: deque[Photograph] = deque()

        def windows() -> Iterator[np.ndarray]:
            for photograph in photographs:
                waiting.append(photograph)
                yield from photograph.windows()

        scores = self._scores(windows(), batch_size)
        for first in scores:
            photograph = waiting.popleft()
            own = chain([first], islice(scores, len(photograph) - 1))
            yield self._assemble(photograph, own, probabilities)

    def _scores(self, windows: Iterator[np.ndarray], batch_size: int) -> Iterator[Tensor]:
        """(K, h, w) scores of each window (H, W, 3) uint8."""
        kind = self.device.type
        while batch := list(islice(windows, batch_size)):
            pixels = (
                torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(self.device)
            )  # (B, 3, H, W), channels last in memory
            # As the features were extracted, where fp32 means fp32, and as the decoder was evaluated.
            with (
                torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
                torch.autocast(kind, torch.bfloat16, enabled=self.spec.compute == "bf16"),
            ):
                features = (
                    self._backbone(pixels).float().contiguous(memory_format=torch.channels_last)
                )
            with torch.autocast(kind, self._precision, enabled=self._precision is not None):
                scores = self._decoder(features)
            yield from scores.float()

    def _assemble(
        self, photograph: Photograph, scores: Iterator[Tensor], kind: type[np.floating] | None
    ) -> Segmentation:
        classes = np.empty(photograph.size, np.uint8)
        shares = None if kind is None else np.empty((self.spec.num_classes, *photograph.size), kind)
        done = 0
        for rows in join(photograph, scores, probabilities=kind is not None):
            made = slice(done, done + rows.shape[1])
            classes[made] = rows.max(0).indices.byte().cpu().numpy()
            if shares is not None:
                shares[:, made] = rows.cpu().numpy()
            done = made.stop
        assert done == len(classes)
        return Segmentation(classes, shares)


def as_image(image: Input) -> Image.Image:
    """A photograph in RGB, upright, from whatever stands for it.

    Raises
    ------
    DataError
        When a file is missing or damaged.
    ValueError
        When an array or an image in memory is no photograph.
    """
    if isinstance(image, Image.Image):
        if depth := too_deep(image):
            raise ValueError(f"this photograph {depth}")
        return upright(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                f"a photograph is an (H, W, 3) uint8 array, red green blue, not {image.shape} {image.dtype}"
            )
        return Image.fromarray(image)
    path = Path(image)
    return decode_image(read_bytes(path, "photograph"), path)
