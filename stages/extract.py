"""extract: run the frozen backbone once over every image and write features and masks to a feature store."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from pydantic import BeforeValidator, Field, field_serializer, field_validator
from tqdm import tqdm

import featurestore
import stages.backbones.backbone
import stages.data.images
from featurestore import (
    FeatureStore,
    FeatureStoreError,
    SampleError,
    SpecMismatchError,
    StoreReadError,
    StoreSpec,
)
from featurestore.codec import all_finite
from featurestore.prefetch import prefetch
from featurestore.room import check_room
from featurestore.writer import clear_after_publication
from stages.backbones.backbone import (
    OUTPUT_STRIDE,
    Backbone,
    BackboneError,
    build_backbone,
    known_backbone,
)
from stages.common.config import Config, Listed, Once
from stages.common.distributed import agree
from stages.common.errors import ConfigError, DataError
from stages.common.runtime import make_accelerator, progress, source_digest, verify_store
from stages.data.images import decode_image, decode_mask, read_bytes, resize_pair
from stages.data.manifest import SPLITS, Classes, Entry, read_manifest

Side = Annotated[int, Field(ge=64, le=4096, multiple_of=OUTPUT_STRIDE)]


def _both(size: object) -> object:
    """One number stands for height and width."""
    return (size, size) if isinstance(size, int) else size


class ExtractConfig(Config):
    """Section ``extract`` of params.yaml."""

    backbone: str = Field(
        "resnet101", description="resnet101 | resnet50 | efficientnet_lite0 | timm/NAME"
    )
    weights: str = Field("default", description="default (ImageNet) or path of a state dict")
    input_size: Annotated[tuple[Side, Side], BeforeValidator(_both), Listed] = Field(
        (256, 256), description="pixels, or [height, width]; a multiple of 32"
    )
    resize: Literal["stretch", "pad", "crop"] = Field(
        "stretch", description="how images get this size"
    )
    views: Annotated[tuple[Literal["identity", "hflip"], ...], Listed, Once] = Field(
        ("identity",),
        description="of training images; hflip adds mirrored ones, for hflip-views and view: random",
    )
    compute: Literal["fp32", "bf16"] = Field("fp32", description="precision of the backbone")
    batch_size: int = Field(16, ge=1, description="images a batch")
    feature_dtype: Literal["float16", "float32"] = Field(
        "float16", description="type of stored features"
    )
    compression: Literal["none", "zeros", "lz4", "zstd", "int8"] = Field(
        "none", description="storage of features; int8 is lossy"
    )
    store_images: bool = Field(True, description="store images beside features")

    @field_serializer("input_size", when_used="json")
    def _side(self, size: tuple[int, int]) -> int | tuple[int, int]:
        return size[0] if size[0] == size[1] else size

    @field_validator("backbone")
    @classmethod
    def _known(cls, name: str) -> str:
        if not known_backbone(name):
            raise ValueError(
                "unknown backbone; use resnet50, resnet101, efficientnet_lite0 or timm/NAME"
            )
        return name

    @field_validator("views")
    @classmethod
    def _with_identity(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        if "identity" not in views:
            raise ValueError("must have identity: everything is trained on the images as they are")
        return views


def run(
    config: ExtractConfig, *, dataset: Path, out: Path, scratch: Path, device: str, workers: int
) -> dict[str, FeatureStore]:
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
        Threads that decode images; the bytes written do not depend on it, nor on how many processes a
        launcher (torchrun) starts: shard i is made by rank i modulo their number.

    Returns
    -------
    dict
        The stores by split.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        Bad parameters; a image that changed since ``prepare`` or whose features do not fit; a bad store.
    """
    # The network, on its device.
    patience = InitProcessGroupKwargs(
        timeout=timedelta(days=1)
    )  # the first rank to be done waits for the last
    accelerator = make_accelerator(
        device, "bf16" if config.compute == "bf16" else "no", kwargs_handlers=[patience]
    )
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

    code = source_digest(sys.modules[__name__], stages.data.images, stages.backbones.backbone)

    # All splits are extracted before the first is published: an interrupted run finds every finished shard again,
    # and not one of them where DVC removes a stage's outputs before it starts.
    with (
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ExitStack() as unpublished,
    ):  # fp32 means fp32
        unfinished: list[tuple[featurestore.StoreWriter, list[tuple[Entry, str]], list[range]]] = []
        for split in SPLITS:
            views = config.views if split == "train" else ("identity",)
            samples: list[tuple[Entry, str]] = [
                (entry, view) for view in views for entry in entries if entry.split == split
            ]
            identity = featurestore.fingerprint(
                format_version=featurestore.FORMAT_VERSION,
                spec=spec.to_dict(),
                batch_size=config.batch_size,
                samples=[
                    (entry.id, entry.image_sha256, entry.mask_sha256, view)
                    for entry, view in samples
                ],
                code=code,
                torch=torch.__version__,
                device=accelerator.device.type,
            )
            shards = scratch / split / identity[:16]
            if agree(
                accelerator.is_main_process and _is_there(out / split, identity, shards, workers)
            ):
                continue
            with (
                accelerator.main_process_first()
            ):  # rank 0 holds the lock: the others follow once it has it
                writer = featurestore.create(
                    out / split,
                    spec,
                    scratch=shards,
                    fingerprint=identity,
                    overwrite=True,
                    rank=accelerator.process_index,
                    ranks=accelerator.num_processes,
                )
            unpublished.enter_context(writer)
            unfinished.append((writer, samples, writer.resume(len(samples))))
        if accelerator.is_main_process:
            check_room(writer for writer, _, _ in unfinished)
        for writer, samples, missing in unfinished:
            _fill(
                writer,
                samples,
                missing,
                config=config,
                classes=classes,
                backbone=backbone,
                accelerator=accelerator,
                workers=workers,
            )
        accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()  # rank 0 has published
    if accelerator.is_main_process:
        _mention_unfinished(scratch)
    return {split: featurestore.open(out / split) for split in SPLITS}


def _fill(
    writer: featurestore.StoreWriter,
    samples: list[tuple[Entry, str]],
    missing: list[range],
    *,
    config: ExtractConfig,
    classes: Classes,
    backbone: Backbone,
    accelerator: Accelerator,
    workers: int,
) -> None:
    """Append the missing samples. Three things at once: threads decode images, the backbone computes, a thread writes.

    On the CPU two batches are computed at once, each by half of PyTorch's threads: while one waits for its slowest
    thread, which decoding may hold up, the other goes on. A GPU has a queue of its own.
    """
    todo = [samples[position] for span in missing for position in span]
    read = partial(_read_pair, classes=classes, size=config.input_size, rule=config.resize)
    pairs = prefetch(read, todo, workers=workers, ahead=2 * config.batch_size)
    batches = (list(islice(pairs, size)) for size in _batch_sizes(missing, config.batch_size))
    forward = partial(
        _forward,
        accelerator=accelerator,
        backbone=backbone,
        dtype=getattr(torch, config.feature_dtype),
    )
    streams, threads = (0 if accelerator.device.type == "cuda" else 2), torch.get_num_threads()
    computed = prefetch(
        forward,
        batches,
        workers=streams,
        initializer=partial(torch.set_num_threads, max(1, threads // 2)),
    )
    write = partial(_append, writer=writer)
    try:
        with progress((), f"extract: {writer.path.name}", len(todo), "image") as bar:
            for written in prefetch(
                write, computed, workers=1, ahead=2
            ):  # two wait while a shard goes to disk
                bar.update(written)
    finally:
        torch.set_num_threads(threads)


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


def check_spec(config: ExtractConfig, path: Path) -> StoreSpec:
    """The spec of a store, which must have been extracted with the present parameters.

    ``weights`` cannot be compared without loading them: the store knows their digest, and no name. DVC watches the key, not the file.

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
            raise SpecMismatchError(message, path=path, expected=expected, actual=found)
    return spec


def _is_there(path: Path, identity: str, scratch: Path, workers: int) -> bool:
    """Whether a sound store of exactly these inputs lies at ``path`` already; what its writer may have left in ``scratch`` goes then.

    Raises
    ------
    StoreReadError, StoreBusyError
        When the store cannot be read here, which is no reason to replace it; when it is being written.
    """
    try:
        store = featurestore.open(path)
        if store.fingerprint != identity:
            return False
        verify_store(store, workers=workers)
    except StoreReadError:
        raise
    except FeatureStoreError as problem:
        if path.exists():
            tqdm.write(f"{problem}: extracting it again")
        return False
    clear_after_publication(path, scratch)
    return True


def _mention_unfinished(scratch: Path) -> None:
    """Name the shards that an interrupted extraction with other parameters left: nothing else would remind of them."""
    for folder in (
        folder
        for split in SPLITS
        for folder in (scratch / split).glob("[0-9a-f]*")
        if folder.is_dir()
    ):
        with suppress(OSError):  # at work just now, for another project
            size = sum(file.stat().st_size for file in folder.iterdir())
            tqdm.write(
                f"{folder}: {size / 1e9:.1f} GB of an unfinished extraction with other parameters; remove it if it is not to go on"
            )


@dataclass
class _Computed:
    """One batch on its way from the device to the store."""

    samples: list[tuple[Entry, str]]  # B
    images: torch.Tensor  # (B, 3, H, W) uint8, on the CPU
    masks: np.ndarray  # (B, H, W) uint8
    features: torch.Tensor  # (B, C, h, w) as computed, on the device
    stored: torch.Tensor  # the same in the store's type, on the CPU
    arrived: torch.cuda.Event | None  # when ``stored`` is there


def _batch_sizes(missing: list[range], batch_size: int) -> Iterator[int]:
    """Sizes of the batches. None crosses a shard, so that a resumed run computes the very same batches."""
    for span in missing:
        for start in range(0, len(span), batch_size):
            yield min(batch_size, len(span) - start)


def _forward(
    batch: list[tuple[tuple[Entry, str], np.ndarray, np.ndarray]],
    *,
    accelerator: Accelerator,
    backbone: Backbone,
    dtype: torch.dtype,
) -> _Computed:
    """Images and masks through the backbone; on a GPU nothing here waits for it."""
    cuda = accelerator.device.type == "cuda"
    # (B, H, W, 3) -> (B, 3, H, W), channels last in memory
    images = torch.from_numpy(np.stack([image for _, image, _ in batch])).permute(0, 3, 1, 2)
    moved = (images.pin_memory() if cuda else images).to(accelerator.device, non_blocking=True)
    with accelerator.autocast():
        features = backbone(moved)
    converted = torch.empty(features.shape, dtype=dtype, device=features.device)
    torch.mul(features, 1, out=converted)  # vectorised on the CPU, which ``Tensor.half`` is not
    stored, arrived = converted, None
    if cuda:
        stored = torch.empty(converted.shape, dtype=dtype, pin_memory=True)
        stored.copy_(converted, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    return _Computed(
        [sample for sample, _, _ in batch],
        images,
        np.stack([mask for _, _, mask in batch]),
        features,
        stored,
        arrived,
    )


def _append(batch: _Computed, *, writer: featurestore.StoreWriter) -> int:
    """Append a batch to the store; the number of its samples."""
    if batch.arrived is not None:
        batch.arrived.synchronize()
    pictures = batch.images.permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    for row, ((entry, view), features) in enumerate(
        zip(batch.samples, batch.stored.numpy(), strict=True)
    ):
        if not all_finite(
            features
        ):  # beyond float16's range all look infinite: the value itself says more
            features = batch.features[row].float().cpu().numpy()
        picture = pictures[row] if writer.spec.has_images else None
        try:
            writer.append(
                id=entry.id, features=features, mask=batch.masks[row], image=picture, view=view
            )
        except SampleError as error:
            raise DataError(
                entry.image, f"{error}; is this image sound, and extract.weights right?"
            ) from error
    return len(batch.masks)


def _read_pair(
    sample: tuple[Entry, str], *, classes: Classes, size: tuple[int, int], rule: str
) -> tuple[tuple[Entry, str], np.ndarray, np.ndarray]:
    """The sample, its image (H, W, 3) uint8 and its mask (H, W) uint8: read, checked against the manifest, resized, flipped."""
    entry, view = sample
    image_path, mask_path = Path(entry.image), Path(entry.mask)
    image_bytes, mask_bytes = read_bytes(image_path, "image"), read_bytes(mask_path, "mask")
    for path, content, sha256 in (
        (image_path, image_bytes, entry.image_sha256),
        (mask_path, mask_bytes, entry.mask_sha256),
    ):
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(
                path, "this file changed since the prepare stage; run `dvc repro`, or prepare again"
            )
    picture = decode_image(image_bytes, image_path)
    mask = decode_mask(
        mask_bytes, mask_path, num_classes=len(classes.names), void_index=classes.void_index
    )
    image, mask = resize_pair(picture, mask, size=size, rule=rule)
    return (sample, image[:, ::-1], mask[:, ::-1]) if view == "hflip" else (sample, image, mask)
