"""extract: run the frozen backbone once over every image; write features and masks to a store."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from pydantic import BeforeValidator, Field, field_serializer, field_validator
from tqdm import tqdm

import featurestore
import stages.backbones
import stages.common.windows
import stages.data
from featurestore import FeatureStore, SampleError, SpecMismatchError
from featurestore.disk_space import check_disk_space
from featurestore.float16 import all_finite
from featurestore.layers import Layer, map_shape
from featurestore.prefetch import prefetch
from featurestore.prepared_sample import PreparedSample
from stages.backbones.backbone import Backbone, BackboneError
from stages.backbones.build import build_backbone, known_backbone
from stages.backbones.compute import Computed, compute
from stages.common.config import Config, LayerName, Listed, Once, Seed
from stages.common.distributed import agree
from stages.common.errors import ConfigError, DataError
from stages.common.runtime import (
    has_sound_store,
    make_accelerator,
    progress,
    source_digest,
    to_channels_last,
)
from stages.common.windows import TILE
from stages.data.manifest import SPLITS, UNLABELLED, Classes, read_manifest
from stages.data.samples import Sample, labelled_windows, list_samples, read_samples
from stages.data.views import ViewName, configured_views, is_seeded, stored_views

STORES = (*SPLITS, UNLABELLED)
Compression = Literal["none", "zeros", "lz4", "zstd", "int8"]
Side = Annotated[int, Field(ge=64, le=4096)]


def _both(size: object) -> object:
    """Let one number stand for height and width."""
    return (size, size) if isinstance(size, int) else size


class ExtractConfig(Config):
    """Section ``extract`` of params.yaml."""

    backbone: str = Field(
        "resnet101", description="resnet101 | resnet50 | efficientnet_lite0 | timm/NAME"
    )
    weights: str = Field("default", description="default (ImageNet) or path of a state dict")
    layers: Annotated[tuple[LayerName, ...], Listed, Once] = Field(
        (), description="names, or block numbers of a ViT; []: the last one"
    )
    dilate: bool = Field(
        True, description="true: CNNs dilated to stride 8; false: native strides, less work"
    )
    input_size: Annotated[tuple[Side, Side], BeforeValidator(_both), Listed] = Field(
        (256, 256),
        description="pixels, or [height, width]; a multiple of the stride, or of a ViT's patch",
    )
    resize: Literal["stretch", "pad", "crop", "tile"] = Field(
        "stretch", description="how images get this size; tile: windows at the images' scale"
    )
    views: Annotated[tuple[ViewName, ...], Listed, Once] = Field(
        ("identity",),
        description="identity | hflip | rotate | crop | colour | random-K (K random mixtures)"
        " of training images; read by view: random and by hflip-views",
    )
    view_seed: Seed = Field(0, description="seed of rotate, crop, colour and random-K")
    compute: Literal["fp32", "bf16"] = Field("fp32", description="precision of the backbone")
    batch_size: int = Field(16, ge=1, description="images a batch")
    feature_dtype: Literal["float16", "float32"] = Field("float16", description="stored type")
    compression: Compression = Field("none", description="storage of features; int8 is lossy")
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
            raise ValueError("must contain identity: trainings read the unchanged images")
        if len(set(stored_views(views))) < len(stored_views(views)):
            raise ValueError("random-K is listed twice; list it once, with the larger K")
        return views


def run(
    config: ExtractConfig, *, dataset: Path, out: Path, scratch: Path, device: str, workers: int
) -> dict[str, FeatureStore]:
    """Write the stores ``train`` (several views), ``val``, ``test``, ``unlabelled`` (or empty).

    Parameters
    ----------
    config
        Backbone, size, storage.
    dataset
        Folder of the manifest.
    out
        Folder of the stores; each appears whole or not at all.
    scratch
        Folder of finished shards; those of an interrupted run with equal inputs are reused.
    device
        ``auto``, ``cpu`` or ``cuda``.
    workers
        Number of threads that decode images, and of threads that check and encode. The bytes
        written depend neither on it nor on the number of processes of a launcher (torchrun): rank i
        modulo their number makes shard i.

    Returns
    -------
    dict
        The stores by split.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        For wrong parameters; for an image that changed since ``prepare`` or whose features cannot
        be stored; for a bad store.
    """
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))  # ranks wait for the slowest
    precision = "bf16" if config.compute == "bf16" else "no"
    accelerator = make_accelerator(device, precision, kwargs_handlers=[patience])
    entries, classes = read_manifest(dataset)
    backbone, layers = build(config)
    backbone = to_channels_last(backbone, accelerator.device)
    spec = _spec(config, backbone, layers, classes)

    # No split is published before all are extracted: DVC removes a stage's outputs before it
    # starts, and an interrupted run must find its finished shards again. fp32 excludes TF32.
    with (
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ExitStack() as unpublished,
    ):
        unfinished: list[tuple[featurestore.StoreWriter, list[Sample], list[range]]] = []
        for split in STORES:
            views = stored_views(config.views) if split == "train" else ("identity",)
            images = [entry for entry in entries if entry.split == split]
            samples = list_samples(images, views, size=config.input_size, rule=config.resize)
            identity = _identity(config, spec, samples, accelerator.device.type)
            shards = scratch / split / identity[:16]
            if agree(
                accelerator.is_main_process
                and has_sound_store(out / split, identity, shards, workers)
            ):
                continue
            if split == "train" and config.resize == TILE:
                samples = labelled_windows(
                    samples, classes, size=config.input_size, workers=workers
                )
            with accelerator.main_process_first():  # the others follow once rank 0 has the lock
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
            check_disk_space(writer for writer, _, _ in unfinished)
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
    return {split: featurestore.open(out / split) for split in STORES}


def build(config: ExtractConfig) -> tuple[Backbone, list[Layer]]:
    """Build the backbone, and describe the layers that a store holds.

    Raises
    ------
    ConfigError, DataError
        When it has no such layers, or its weights cannot be downloaded, read or do not fit.
    """
    try:
        backbone = build_backbone(
            name=config.backbone,
            weights=config.weights,
            layers=config.layers,
            dilate=config.dilate,
            size=config.input_size,
        )
        return backbone, backbone.stored_layers(config.input_size)
    except BackboneError as error:
        if error.key == "weights" and config.weights != "default":
            message = str(error).removeprefix(f"{config.weights}: ")
            raise DataError(config.weights, message) from error
        raise ConfigError(f"extract.{error.key}", str(error)) from error


def _identity(
    config: ExtractConfig, spec: featurestore.StoreSpec, samples: list[Sample], device: str
) -> str:
    """Hash all that the bytes of a store depend on."""
    return featurestore.fingerprint(
        format_version=featurestore.FORMAT_VERSION,  # the spec tells a layered store
        spec=spec.to_dict(),
        batch_size=config.batch_size,
        samples=[each.identity for each in samples],
        code=source_digest(
            sys.modules[__name__], stages.common.windows, stages.data, stages.backbones
        ),
        torch=torch.__version__,
        device=device,
        **({"view_seed": config.view_seed} if is_seeded(each.view for each in samples) else {}),
    )


def _fill(
    writer: featurestore.StoreWriter,
    samples: list[Sample],
    missing: list[range],
    *,
    config: ExtractConfig,
    classes: Classes,
    backbone: Backbone,
    accelerator: Accelerator,
    workers: int,
) -> None:
    """Append the missing samples.

    Threads decode images, the backbone computes, threads check and encode, and one thread writes.

    On the CPU two batches are computed at once, each by half of PyTorch's threads: while one waits
    for its slowest thread, which decoding may delay, the other continues. A GPU has its own queue.
    """
    todo = [samples[position] for span in missing for position in span]
    read = partial(
        read_samples,
        classes=classes,
        seed=config.view_seed,
        size=config.input_size,
        rule=config.resize,
    )
    images = (list(group) for _, group in groupby(todo, lambda sample: sample.entry))
    ahead = 1 if config.resize == TILE else 2 * config.batch_size  # whole images, or small ones
    pairs = chain.from_iterable(prefetch(read, images, workers=workers, ahead=ahead))
    batches = (list(islice(pairs, size)) for size in _batch_sizes(missing, config.batch_size))
    forward = partial(
        _forward,
        accelerator=accelerator,
        backbone=backbone,
        dtype=getattr(torch, config.feature_dtype),
    )
    threads = torch.get_num_threads()
    computed = prefetch(
        forward,
        batches,
        workers=0 if accelerator.device.type == "cuda" else 2,
        initializer=partial(torch.set_num_threads, max(1, threads // 2)),
    )
    prepared = prefetch(
        partial(_prepare, writer=writer),
        _samples(computed),
        workers=workers,
        ahead=2 * config.batch_size,  # while the disk is busy
    )
    written = prefetch(writer.write, prepared, workers=1, ahead=config.batch_size)
    try:
        for _ in progress(written, f"extract: {writer.path.name}", len(todo), "image"):
            pass
    finally:
        torch.set_num_threads(threads)


def _spec(
    config: ExtractConfig, backbone: Backbone, layers: list[Layer], classes: Classes
) -> featurestore.StoreSpec:
    shape = map_shape(layers, config.input_size)
    return featurestore.StoreSpec(
        feature_shape=shape,
        mask_shape=config.input_size,
        class_names=classes.names,
        palette=classes.palette,
        backbone=backbone.name,
        weights_digest=backbone.digest(),
        output_stride=round(config.input_size[0] / shape[1]),
        normalization_mean=backbone.mean,
        normalization_std=backbone.std,
        resize=config.resize,
        compute=config.compute,
        nonnegative=backbone.nonnegative,
        feature_dtype=config.feature_dtype,
        has_images=config.store_images,
        compression=config.compression,
        layer_names=tuple(layer.name for layer in layers if config.layers),
        layer_shapes=tuple(layer.shape for layer in layers if config.layers),
        native_strides=not config.dilate,
    )


def check_spec(config: ExtractConfig, path: Path) -> featurestore.StoreSpec:
    """Return the spec of a store that was extracted with the present parameters.

    Not compared are ``weights``, which would need loading them (the store has their digest, and DVC
    watches the key, not the file), and ``view_seed``, which the store does not have.

    Raises
    ------
    FeatureStoreError
        When there is no sound store at ``path``, or its spec differs; the error names the
        parameter.
    """
    store = featurestore.open(path)
    spec, views = store.spec, config.views if path.name == "train" else ("identity",)
    wanted = {
        "backbone": (spec.backbone, config.backbone),
        "input_size": (spec.mask_shape, config.input_size),
        "resize": (spec.resize, config.resize),
        "compute": (spec.compute, config.compute),
        "feature_dtype": (spec.feature_dtype, config.feature_dtype),
        "compression": (spec.compression, config.compression),
        "store_images": (spec.has_images, config.store_images),
        "dilate": (not spec.native_strides, config.dilate),
        "layers": (sorted(spec.layer_names), sorted(config.layers)),
        "views": (sorted(configured_views(store.views)), sorted(views)),
    }
    for key, (actual, expected) in wanted.items():
        if actual != expected:
            raise SpecMismatchError(
                f"was extracted with {key} {actual}, but the parameters say {expected}; "
                "run the extract stage again",
                path=path,
                expected=expected,
                actual=actual,
            )
    return spec


def _mention_unfinished(scratch: Path) -> None:
    """Name the shards that an interrupted extraction with other parameters left."""
    folders = [folder for split in STORES for folder in (scratch / split).glob("[0-9a-f]*")]
    for folder in filter(Path.is_dir, folders):
        with suppress(OSError):  # an extraction of another project is working there
            size = sum(file.stat().st_size for file in folder.iterdir())
            tqdm.write(
                f"{folder}: {size / 1e9:.1f} GB of an unfinished extraction with other parameters; "
                "remove it unless you resume that extraction"
            )


class _Batch(NamedTuple):
    """One batch: what was read, and its features."""

    samples: Sequence[Sample]  # B
    images: np.ndarray  # (B, H, W, 3) uint8
    masks: np.ndarray  # (B, H, W) uint8
    computed: Computed


def _batch_sizes(missing: list[range], batch_size: int) -> Iterator[int]:
    """Yield the sizes of the batches.

    No batch crosses a shard, so that a resumed run computes the same batches.
    """
    for span in missing:
        for start in range(0, len(span), batch_size):
            yield min(batch_size, len(span) - start)


def _forward(
    batch: list[tuple[Sample, np.ndarray, np.ndarray]],
    *,
    accelerator: Accelerator,
    backbone: Backbone,
    dtype: torch.dtype,
) -> _Batch:
    """Compute a batch; on a GPU nothing here waits for the result."""
    samples, images, masks = zip(*batch, strict=True)
    stacked = np.stack(images)
    # (B, H, W, 3) -> (B, 3, H, W), channels last in memory
    computed = compute(torch.from_numpy(stacked).permute(0, 3, 1, 2), backbone, accelerator, dtype)
    return _Batch(samples, stacked, np.stack(masks), computed)


def _samples(batches: Iterable[_Batch]) -> Iterator[tuple[_Batch, int]]:
    """Name the samples of batches by their rows, without waiting for a GPU."""
    for batch in batches:
        for row in range(len(batch.samples)):
            yield batch, row


def _prepare(sample: tuple[_Batch, int], *, writer: featurestore.StoreWriter) -> PreparedSample:
    """Check and encode a sample for the store, once its features are on the CPU.

    Raises
    ------
    DataError
        When its features cannot be stored.
    """
    batch, row = sample
    of, layers = batch.samples[row], batch.computed.layers(row)
    features = {
        # As computed where it is not finite: float16 shows only inf beyond its range.
        layer.name: array if all_finite(array := stored.numpy()) else computed.float().cpu().numpy()
        for layer, (stored, computed) in zip(writer.spec.layers, layers, strict=True)
    }
    try:
        return writer.prepare(
            id=of.id,
            features=features,
            mask=batch.masks[row],
            image=batch.images[row] if writer.spec.has_images else None,
            view=of.view,
        )
    except SampleError as error:
        raise DataError(
            of.entry.image, f"{error}; is this image sound, and extract.weights right?"
        ) from error
