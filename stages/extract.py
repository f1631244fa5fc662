"""extract: run the frozen backbone once over every photograph and write features and masks to a feature store."""

from __future__ import annotations

import hashlib
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, field_validator
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import featurestore
import stages.data.images
import stages.models.backbone
from featurestore import FeatureStore, FeatureStoreError, SampleError, SpecMismatchError, StoreSpec
from stages.config import Config
from stages.data.images import decode_image, decode_mask, read_bytes, resize_pair
from stages.data.manifest import SPLITS, Classes, Entry, read_manifest
from stages.errors import ConfigError, DataError
from stages.models.backbone import OUTPUT_STRIDE, Backbone, BackboneError, build_backbone, known_backbone
from stages.runtime import make_accelerator, progress, source_digest

Side = Annotated[int, Field(ge=64, le=4096, multiple_of=OUTPUT_STRIDE)]


def _both(size: object) -> object:
    """One number stands for height and width."""
    return (size, size) if isinstance(size, int) else size


class ExtractConfig(Config):
    """Section ``extract`` of params.yaml."""

    backbone: str
    weights: str
    input_size: Annotated[tuple[Side, Side], BeforeValidator(_both), Field(strict=False)]
    resize: Literal["stretch", "pad", "crop"]
    views: Annotated[tuple[Literal["identity", "hflip"], ...], Field(strict=False, min_length=1)]
    compute: Literal["fp32", "bf16"]
    batch_size: int = Field(ge=1)
    feature_dtype: Literal["float16", "float32"]
    compression: Literal["none", "lz4", "zstd"]
    store_images: bool

    @field_validator("backbone")
    @classmethod
    def _known(cls, name: str) -> str:
        if not known_backbone(name):
            raise ValueError("unknown backbone; use resnet50, resnet101, efficientnet_lite0 or timm/NAME")
        return name

    @field_validator("views")
    @classmethod
    def _unique(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(views)) < len(views):
            raise ValueError("a view stands twice")
        return views


def run(config: ExtractConfig, *, dataset: Path, out: Path, scratch: Path, device: str, workers: int) -> dict[str, FeatureStore]:
    """Write the stores ``out/train``, ``out/val`` and ``out/test``; the hflip view is made of train alone.

    Parameters
    ----------
    config
        Backbone, size, storage.
    dataset
        Folder of the manifest.
    out
        Folder of the stores; each appears whole or not at all.
    scratch
        Where finished shards wait; those of an interrupted run with the same inputs are taken over.
    device
        ``auto``, ``cpu`` or ``cuda``.
    workers
        Processes that decode photographs; the bytes written do not depend on it, nor on how many processes a
        launcher (torchrun, SLURM) starts: shard i is made by rank i modulo their number.

    Returns
    -------
    dict
        The stores by split.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        Bad parameters; a photograph that changed since ``prepare`` or whose features do not fit; a bad store.
    """
    # The network, on its device.
    accelerator = make_accelerator(device, "bf16" if config.compute == "bf16" else "no")
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    torch.backends.cudnn.deterministic = True
    entries, classes = read_manifest(dataset)
    try:
        backbone = build_backbone(name=config.backbone, weights=config.weights)
    except BackboneError as error:
        if config.weights == "default":
            raise ConfigError("extract.backbone", str(error)) from error
        raise DataError(config.weights, str(error).removeprefix(f"{config.weights}: ")) from error
    backbone = backbone.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    digest = backbone.digest()
    spec = _spec(config, backbone, digest, classes)

    code = source_digest(sys.modules[__name__], stages.data.images, stages.models.backbone)

    # All splits are extracted before the first is published: an interrupted run finds every finished shard again,
    # and not one of them where DVC removes a stage's outputs before it starts.
    with ExitStack() as unpublished:
        for split in SPLITS:
            views = config.views if split == "train" else ("identity",)
            samples: list[tuple[Entry, str]] = [(entry, view) for view in views for entry in entries if entry.split == split]
            identity = featurestore.fingerprint(
                format_version=featurestore.FORMAT_VERSION,
                spec=spec.to_dict(),
                batch_size=config.batch_size,
                samples=[(entry.id, entry.image_sha256, entry.mask_sha256, view) for entry, view in samples],
                code=code,
                torch=torch.__version__,
                device=accelerator.device.type,
            )
            if _is_there(out / split, identity):
                continue
            writer = featurestore.create(out / split, spec, scratch=scratch / split / identity[:16], fingerprint=identity, overwrite=True)
            unpublished.enter_context(writer)
            missing = writer.resume(len(samples), rank=accelerator.process_index, ranks=accelerator.num_processes)
            # A batch never crosses a shard, so that a resumed run computes the very same batches.
            batches = [
                list(span[start : start + config.batch_size]) for span in missing for start in range(0, len(span), config.batch_size)
            ]
            loader = DataLoader(
                _Photographs(samples, classes, config.input_size, config.resize),
                batch_sampler=batches,
                num_workers=workers,
                collate_fn=_stack,
                pin_memory=accelerator.device.type == "cuda",
            )
            bar = progress((), f"extract: {split}", sum(len(span) for span in missing), "image")
            for positions, batch in zip(batches, loader, strict=True):
                if isinstance(batch, DataError):
                    raise batch
                images, masks = batch
                with accelerator.autocast():
                    features = backbone(images.to(accelerator.device, memory_format=torch.channels_last))
                _append(writer, samples, positions, features.float().cpu().numpy(), masks, images)
                bar.update(len(positions))
            bar.close()
        accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()  # rank 0 has published
    return {split: featurestore.open(out / split) for split in SPLITS}


def _spec(config: ExtractConfig, backbone: Backbone, digest: str, classes: Classes) -> StoreSpec:
    height, width = config.input_size
    return StoreSpec(
        feature_shape=(backbone.channels, height // OUTPUT_STRIDE, width // OUTPUT_STRIDE),
        mask_shape=(height, width),
        class_names=classes.names,
        palette=classes.palette,
        backbone=backbone.name,
        weights_digest=digest,
        output_stride=OUTPUT_STRIDE,
        normalization_mean=backbone.mean,
        normalization_std=backbone.std,
        resize=config.resize,
        compute=config.compute,
        nonnegative=backbone.nonnegative,
        feature_dtype=config.feature_dtype,
        has_images=config.store_images,
        compression=config.compression,
    )


def check_spec(config: ExtractConfig, path: Path) -> None:
    """Refuse a store that was extracted with other parameters than the present ones.

    Raises
    ------
    FeatureStoreError
        When there is no sound store at ``path``, or its spec differs; the text names the parameter.
    """
    spec = featurestore.open(path).spec
    wanted = {
        "backbone": (spec.backbone, config.backbone),
        "input_size": (spec.mask_shape, config.input_size),
        "resize": (spec.resize, config.resize),
        "compute": (spec.compute, config.compute),
        "feature_dtype": (spec.feature_dtype, config.feature_dtype),
        "compression": (spec.compression, config.compression),
        "store_images": (spec.has_images, config.store_images),
    }
    for key, (found, expected) in wanted.items():
        if found != expected:
            message = f"was extracted with {key} {found}, but the parameters say {expected}; run the extract stage again"
            raise SpecMismatchError(message, path=path, expected=expected, found=found)


def _is_there(path: Path, identity: str) -> bool:
    """Whether a sound store of exactly these inputs lies at ``path`` already."""
    try:
        store = featurestore.open(path)
        if store.fingerprint != identity:
            return False
        store.verify()
    except FeatureStoreError as problem:
        if path.exists():
            tqdm.write(f"{problem}: extracting it again")
        return False
    return True


def _append(
    writer: featurestore.StoreWriter,
    samples: list[tuple[Entry, str]],
    positions: list[int],
    features: np.ndarray,
    masks: np.ndarray,
    images: torch.Tensor,
) -> None:
    pictures = images.permute(0, 2, 3, 1).numpy() if writer.spec.has_images else [None] * len(positions)  # (B, H, W, 3)
    for position, feature, mask, picture in zip(positions, features, masks, pictures, strict=True):
        entry, view = samples[position]
        try:
            writer.append(id=entry.id, features=feature, mask=mask, image=picture, view=view)
        except SampleError as error:
            raise DataError(entry.image, f"{error}; is this photograph sound, and extract.weights right?") from error


class _Photographs(Dataset[tuple[np.ndarray, np.ndarray] | DataError]):
    """Photographs and masks at the backbone's size, read, checked against the manifest, resized, flipped.

    A bad file comes as a value, not as an exception: PyTorch's worker processes would wrap it in a traceback.
    """

    def __init__(self, samples: list[tuple[Entry, str]], classes: Classes, size: tuple[int, int], rule: str) -> None:
        self.samples = samples
        self.classes = classes
        self.size = size
        self.rule = rule

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray] | DataError:
        """(H, W, 3) uint8 photograph, (H, W) uint8 mask."""
        try:
            return self._read(*self.samples[position])
        except DataError as problem:
            return problem

    def _read(self, entry: Entry, view: str) -> tuple[np.ndarray, np.ndarray]:
        image_path, mask_path = Path(entry.image), Path(entry.mask)
        image_bytes, mask_bytes = read_bytes(image_path, "photograph"), read_bytes(mask_path, "mask")
        for path, content, sha256 in ((image_path, image_bytes, entry.image_sha256), (mask_path, mask_bytes, entry.mask_sha256)):
            if hashlib.sha256(content).hexdigest() != sha256:
                raise DataError(path, "this file changed since the prepare stage; run `dvc repro`, or prepare again")
        classes = self.classes
        image = decode_image(image_bytes, image_path)
        mask = decode_mask(mask_bytes, mask_path, num_classes=len(classes.names), void_index=classes.void_index)
        image, mask = resize_pair(image, mask, size=self.size, rule=self.rule)
        if view == "hflip":
            image, mask = image[:, ::-1], mask[:, ::-1]
        return np.ascontiguousarray(image), np.ascontiguousarray(mask)


def _stack(samples: list[tuple[np.ndarray, np.ndarray] | DataError]) -> tuple[torch.Tensor, np.ndarray] | DataError:
    """(B, 3, H, W) uint8 photographs (stored channels last), (B, H, W) uint8 masks; or the first problem."""
    images, masks = [], []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        images.append(sample[0])
        masks.append(sample[1])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), np.stack(masks)
