"""What a configuration will take: bytes of the feature stores, of models and caches, memory, operations and hours, by number of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from featurestore import StoreSpec
from featurestore.dataset import names_of
from stages.backbones.backbone import OUTPUT_STRIDE
from stages.estimate.step_cost import ADAM, Cost

SPLITS = ("train", "val", "test")
EXACT = ("none", "int8")  # layouts whose size does not depend on the values


def split_sizes(images: int, ratios: Sequence[float], train_fraction: float) -> dict[str, int]:
    """Images a split, as the prepare stage divides them at random."""
    train, val = round(images * ratios[0]), round(images * ratios[1])
    return {
        "train": math.ceil(round(train_fraction * train, 6)),
        "val": val,
        "test": images - train - val,
    }


def store_spec(extract: Any, feature_shape: tuple[int, ...], num_classes: int) -> StoreSpec:
    """What the extract stage will write, as far as sizes depend on it."""
    return StoreSpec(
        feature_shape=(feature_shape[0], feature_shape[1], feature_shape[2]),
        mask_shape=extract.input_size,
        class_names=tuple(map(str, range(num_classes))),
        palette=((0, 0, 0),) * num_classes,
        backbone=extract.backbone,
        weights_digest="",
        output_stride=OUTPUT_STRIDE,
        normalization_mean=(0, 0, 0),
        normalization_std=(1, 1, 1),
        resize=extract.resize,
        compute=extract.compute,
        nonnegative=False,
        feature_dtype=extract.feature_dtype,
        has_images=extract.store_images,
        compression=extract.compression,
    )


def store_rows(spec: StoreSpec, extract: Any, images: Mapping[str, int]) -> list[dict[str, Any]]:
    """Samples and bytes of each split's store; HDF5 itself adds a few kilobytes a shard."""
    views = {"train": len(extract.views)}
    samples = {split: images[split] * views.get(split, 1) for split in SPLITS}
    return [
        {"split": split, "samples": count, "bytes": count * spec.sample_bytes}
        for split, count in samples.items()
    ]


def cache_bytes(
    spec: StoreSpec, images: Mapping[str, int], gan: Any, variants: Mapping[str, Any]
) -> int:
    """What ``--cache`` holds of the training and validation splits: decoded, and images only where an image encoder reads them."""
    names = names_of(gan.image_encoder)
    sample = sum(
        math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in map(spec.row, names)
    )
    views = 2 if any(variant.needs_mirrored for variant in variants.values()) else 1
    return int(sample * (views * images["train"] + images["val"]))


def model_bytes(costs: Mapping[str, Cost], variants: Mapping[str, Any], seeds: int) -> int:
    """Roughly what ``models/`` takes: the GAN with its optimizers, each decoder twice (last and best), joint ones with their GAN."""
    gan, decoder = costs["gan"].weight_bytes, costs["decoder"].weight_bytes // ADAM * 4 * 2
    joint = sum(1 for variant in variants.values() if _ratio(variant))
    return gan + seeds * (
        len(variants) * decoder + joint * gan * 3 // 4
    )  # without the untrained generator


def memory_rows(
    costs: Mapping[str, Cost], gan: Any, decoder: Any, variants: Mapping[str, Any], cached: int
) -> list[dict[str, Any]]:
    """Bytes of memory, roughly: weights, gradients, Adam's moments, and what back-propagation keeps of a batch, all in float32.

    A decoder that trains alone keeps as many batches as the largest of the variants adds, and the real one.
    """
    parts = {"gan": gan.gradient_accumulation, "decoder": decoder.gradient_accumulation}
    added = max(
        (variant.added_batches for variant in variants.values() if not _ratio(variant)), default=0
    )
    rows = []
    for name, cost in costs.items():
        if cost.weight_bytes:
            of = "gan" if name == "gan" else "decoder"
            batch = (
                (gan if of == "gan" else decoder).batch_size
                / parts[of]
                * (1 + added if name == "decoder" else 1)
            )
            stage = {"gan": "train-gan", "decoder": "train-decoder: alone"}.get(
                name, f"train-decoder: {name}"
            )
            rows.append({"what": stage, "bytes": cost.weight_bytes + batch * cost.activation_bytes})
    rows.append({"what": "--cache host or device: more", "bytes": cached})
    return rows


def work_rows(
    costs: Mapping[str, Cost],
    seconds: Mapping[str, float] | None,
    tflops: float | None,
    *,
    samples: int,
    train_images: int,
    gan: Any,
    decoder: Any,
    variants: Mapping[str, Any],
    seeds: int,
) -> list[dict[str, Any]]:
    """Operations and hours of each stage, all seeds together; evaluation, monitor and report left out.

    Parameters
    ----------
    costs, seconds
        Of a sample in each kind of step: counted, and measured where that was asked for.
    tflops
        Assumed rate, in 1e12 operations a second, where hours are to be operations over it.
    samples, train_images
        Samples of all stores, and training images (mirrored views do not count).
    variants
        Those compared, by name.
    """
    seen = decoder.epochs * decoder.repeats * train_images * seeds
    parts: list[tuple[str, dict[str, float], float]] = [
        ("extract", {"backbone": 1}, samples),
        ("train-gan", {"gan": 1}, gan.frozen_epochs * gan.repeats * train_images),
    ]
    for name, variant in variants.items():
        ratio = _ratio(variant)
        # What the other augmenters do to a batch costs little beside the decoder.
        real = 1.0 + variant.added_batches
        if ratio:  # what comes after until is real batches in the place of generated ones
            kinds = {f"joint {ratio}:1": variant.until, "decoder": (1 - variant.until) * real}
        else:
            kinds = {"decoder": real, "generator": variant.until * _generated(variant, gan.family)}
        kinds = {kind: times for kind, times in kinds.items() if times}
        parts.append((f"train-decoder: {name}", kinds, seen))
    rows: list[dict[str, Any]] = []
    for part, kinds, count in parts:
        operations = sum(times * costs[kind].operations for kind, times in kinds.items())
        row = {
            "part": part,
            "gflop_a_sample": operations / 1e9,
            "samples": count,
            "pflop": operations * count / 1e15,
        }
        if seconds is not None:
            row["hours"] = (
                sum(times * seconds[kind] for kind, times in kinds.items()) * count / 3600
            )
        elif tflops is not None:
            row["hours"] = operations * count / (tflops * 1e12) / 3600
        rows.append(row)
    total = {key: sum(row[key] for row in rows) for key in ("pflop", "hours") if key in rows[0]}
    return [*rows, {"part": "all", **total}]


def _generated(variant: Any, family: str) -> float:
    """Batches that a finished generator makes beside each real one."""
    if variant.augmenter == "combined":
        return sum(_generated(member, family) for member in variant.of)
    if variant.augmenter != "featuregan" or variant.generator == "joint":
        return 0.0
    if (
        variant.class_swap
    ):  # a GAN is asked for the old mask and for the new one, a flow goes half of its way twice
        return float(variant.ratio * variant.fraction * (1 if family == "flow" else 2))
    return float(variant.ratio * (variant.vary or 1))


def joint_ratios(variants: Mapping[str, Any]) -> list[int]:
    """Draws a mask of the variants that train the GAN on, each once."""
    return sorted({_ratio(variant) for variant in variants.values()} - {0})


def _ratio(variant: Any) -> int:
    """Draws a mask of a joint training; 0 for other variants."""
    return (
        int(variant.ratio)
        if variant.augmenter == "featuregan" and variant.generator == "joint"
        else 0
    )
