"""extract: run the frozen backbone once over every photograph and write features and masks to a feature store."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import featurestore
from featurestore import FeatureStore, FeatureStoreError, SampleError, StoreSpec
from stages.config import Config
from stages.data.images import decode_image, decode_mask, read_bytes, resize_pair
from stages.data.manifest import SPLITS, Classes, Entry, read_manifest
from stages.errors import ConfigError, DataError
from stages.models.backbone import OUTPUT_STRIDE, Backbone, BackboneError, build_backbone, known_backbone
from stages.runtime import make_accelerator, progress

Side = Annotated[int, Field(ge=32, le=4096, multiple_of=OUTPUT_STRIDE)]


class ExtractConfig(Config):
    """Section ``extract`` of params.yaml."""

    backbone: str
    weights: str
    input_size: Side | Annotated[tuple[Side, Side], Field(strict=False)]
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

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every photograph as it enters the backbone."""
        return (self.input_size, self.input_size) if isinstance(self.input_size, int) else self.input_size


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
        Processes that decode photographs; the bytes written do not depend on it.

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
    entries, classes = read_manifest(dataset)
    try:
        backbone = build_backbone(name=config.backbone, weights=config.weights)
    except BackboneError as error:
        raise (
            ConfigError("extract.backbone", str(error)) if config.weights == "default" else DataError(config.weights, str(error))
        ) from error
    backbone = backbone.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    digest = backbone.digest()
    spec = _spec(config, backbone, digest, classes)

    # One store a split.
    stores = {}
    for split in SPLITS:
        views = config.views if split == "train" else ("identity",)
        samples: list[tuple[Entry, str]] = [(entry, view) for view in views for entry in entries if entry.split == split]
        identity = featurestore.fingerprint(
            format_version=featurestore.FORMAT_VERSION,
            spec=spec.to_dict(),
            batch_size=config.batch_size,
            samples=[(entry.id, entry.image_sha256, entry.mask_sha256, view) for entry, view in samples],
            torch=torch.__version__,
            device=accelerator.device.type,
        )
        if not _is_there(out / split, identity):
            writer = featurestore.create(out / split, spec, scratch=scratch / split / identity[:16], fingerprint=identity, overwrite=True)
            with writer:
                missing = writer.resume(len(samples))
                # A batch never crosses a shard, so that a resumed run computes the very same batches.
                batches = [
                    list(span[start : start + config.batch_size]) for span in missing for start in range(0, len(span), config.batch_size)
                ]
                loader = DataLoader(
                    _Photographs(samples, classes, config.size, config.resize),
                    batch_sampler=batches,
                    num_workers=workers,
                    collate_fn=_stack,
                    pin_memory=accelerator.device.type == "cuda",
                )
                bar = progress((), f"extract: {split}", len(samples), "image")
                bar.update(len(samples) - sum(len(span) for span in missing))
                for positions, (images, masks) in zip(batches, loader, strict=True):
                    with accelerator.autocast():
                        features = backbone(images.to(accelerator.device, memory_format=torch.channels_last))
                    _append(writer, samples, positions, features.float().cpu().numpy(), masks, images)
                    bar.update(len(positions))
                bar.close()
        stores[split] = featurestore.open(out / split)
    return stores


def _spec(config: ExtractConfig, backbone: Backbone, digest: str, classes: Classes) -> StoreSpec:
    height, width = config.size
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


class _Photographs(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Photographs and masks at the backbone's size, read, checked against the manifest, resized, flipped."""

    def __init__(self, samples: list[tuple[Entry, str]], classes: Classes, size: tuple[int, int], rule: str) -> None:
        self.samples = samples
        self.classes = classes
        self.size = size
        self.rule = rule

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 photograph, (H, W) uint8 mask."""
        entry, view = self.samples[position]
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


def _stack(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, np.ndarray]:
    """(B, 3, H, W) uint8 photographs (stored channels last), (B, H, W) uint8 masks."""
    images = torch.from_numpy(np.stack([image for image, _ in samples])).permute(0, 3, 1, 2)
    return images, np.stack([mask for _, mask in samples])
