"""Bytes of stores, caches and models, memory, operations and hours, by number of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from typing_extensions import NotRequired

from featurestore import StoreSpec
from featurestore.dataset import names_of
from stages.augment.base import VariantConfig
from stages.augment.featuregan import FeatureGANConfig
from stages.augment.registry import CombinedConfig
from stages.datasets.splits import split_counts
from stages.estimate.step_cost import ADAM, Cost

EXACT = ("none", "int8")  # layouts whose size does not depend on the values
Variants = Mapping[str, VariantConfig]


class StoreRow(TypedDict):
    """Size of one split's store."""

    split: str
    samples: int
    bytes: int


class SizeRow(TypedDict):
    """Bytes of something on disk or in memory."""

    what: str
    bytes: float


class WorkRow(TypedDict):
    """Work of a stage, all seeds together; the sum of all stages has no samples."""

    part: str
    gflop_a_sample: NotRequired[float]
    samples: NotRequired[int]
    pflop: float
    hours: NotRequired[float]


TRAINED = "trained backbone"  # a kind of step, beside the decoder's


def split_sizes(images: int, ratios: Sequence[float], train_fraction: float) -> dict[str, int]:
    """Divide a number of images among the splits, as the prepare stage does at random."""
    counts = split_counts(images, ratios)
    return {**counts, "train": math.ceil(round(train_fraction * counts["train"], 6))}


def store_rows(spec: StoreSpec, views: int, images: Mapping[str, int]) -> list[StoreRow]:
    """Compute samples and bytes of each split's store; HDF5 adds a few kilobytes a shard.

    ``views`` is the number of views of a training image; windows count as images.
    """
    samples = {split: count * (views if split == "train" else 1) for split, count in images.items()}
    return [
        {"split": split, "samples": count, "bytes": count * spec.sample_bytes}
        for split, count in samples.items()
    ]


def cache_bytes(
    spec: StoreSpec,
    views: int,
    images: Mapping[str, int],
    needs_images: bool,
    variants: Variants,
) -> int:
    """Compute what ``--cache`` holds of training and validation, decoded.

    Images are held only where an image encoder, a generator of images or a trained backbone reads
    them. ``views`` is the number of stored views of a training image; the variant that reads the
    most of them counts.
    """
    sample = sum(
        math.prod(shape) * np.dtype(dtype).itemsize
        for shape, dtype in map(spec.row, names_of(spec, needs_images))
    )
    read = max((_views_read(variant, views) for variant in variants.values()), default=1)
    return int(sample * (read * images["train"] + images["val"]))


def _views_read(variant: VariantConfig, views: int) -> int:
    """Return how many of the stored views of a training image a variant reads."""
    return views if variant.view == "random" else 1 + variant.needs_mirrored


def model_bytes(costs: Mapping[str, Cost], variants: Variants, seeds: int) -> int:
    """Estimate ``models/``: the GAN, two decoders a run (last and best), joint runs with their GAN.

    A GAN has its optimizers' state; that of a joint run has no untrained generator.
    """
    gan = costs["gan"].weight_bytes if "gan" in costs else 0
    decoder = costs["decoder"].weight_bytes // ADAM * 4 * 2
    joint = sum(1 for variant in variants.values() if _joint_ratio(variant))
    trained = sum(variant.backbone == "trained" for variant in variants.values())
    backbone = costs[TRAINED].weight_bytes // ADAM * 4 * 2 if trained else 0
    return gan + seeds * (len(variants) * decoder + joint * gan * 3 // 4 + trained * backbone)


def memory_rows(
    costs: Mapping[str, Cost], micro_batches: Mapping[str, float], variants: Variants, cached: int
) -> list[SizeRow]:
    """Estimate memory: weights, gradients, Adam's moments, and what back-propagation keeps.

    All in float32. A decoder that trains alone keeps the real batch and as many batches as the
    largest of the variants adds.

    Parameters
    ----------
    micro_batches
        Samples of a micro-batch, by stage: ``gan`` and ``decoder``.
    cached
        Bytes that ``--cache`` holds.
    """
    alone = [variant.added_batches for variant in variants.values() if not _joint_ratio(variant)]
    stages = {
        "gan": "train-gan",
        "decoder": "train-decoder: alone",
        TRAINED: "train-decoder: more for a trained backbone",
    }
    rows: list[SizeRow] = []
    for name, cost in costs.items():
        if cost.weight_bytes:
            batch = micro_batches.get(name, micro_batches["decoder"])
            batch *= 1 + max(alone, default=0) if name == "decoder" else 1
            size = cost.weight_bytes + batch * cost.activation_bytes
            rows.append({"what": stages.get(name, f"train-decoder: {name}"), "bytes": size})
    return [*rows, {"what": "--cache host or device: more", "bytes": cached}]


def work_rows(
    costs: Mapping[str, Cost],
    seconds: Mapping[str, float] | None,
    tflops: float | None,
    *,
    samples: Mapping[str, int],
    family: str,
    variants: Variants,
) -> list[WorkRow]:
    """Compute operations and hours of each stage, without evaluation, monitor and report.

    Parameters
    ----------
    costs, seconds
        Of a sample in each kind of step: counted, and measured if that was asked for. Without
        ``gan`` in ``costs`` no GAN is trained.
    tflops
        Assumed rate in 1e12 operations a second, if hours are operations over it.
    samples
        Samples that each stage reads in all: ``extract``, ``gan``, and ``decoder``, all seeds.
    family
        ``train_gan.family``.
    variants
        Those compared, by name.
    """
    kinds: dict[str, Mapping[str, float]] = {"extract": {"backbone": 1}}
    kinds |= {"train-gan": {"gan": 1}} if "gan" in costs else {}
    for name, variant in variants.items():
        kinds[f"train-decoder: {name}"] = _steps(variant, family)
    rows: list[WorkRow] = []
    for part, times in kinds.items():
        count = samples[{"extract": "extract", "train-gan": "gan"}.get(part, "decoder")]
        operations = sum(number * costs[kind].operations for kind, number in times.items())
        row: WorkRow = {
            "part": part,
            "gflop_a_sample": operations / 1e9,
            "samples": count,
            "pflop": operations * count / 1e15,
        }
        if seconds is not None:
            one = sum(number * seconds[kind] for kind, number in times.items())
            row["hours"] = one * count / 3600
        elif tflops is not None:
            row["hours"] = operations * count / (tflops * 1e12) / 3600
        rows.append(row)
    total: WorkRow = {"part": "all", "pflop": sum(row["pflop"] for row in rows)}
    if "hours" in rows[0]:
        total["hours"] = sum(row["hours"] for row in rows)
    return [*rows, total]


def decoder_passes(variant: VariantConfig) -> float:
    """Return how many times as much the decoder computes as in a training on real batches."""
    return _steps(variant, "gan").get("decoder", 0.0)


def _steps(variant: VariantConfig, family: str) -> dict[str, float]:
    """Return how many steps of each kind a sample takes in the training of a decoder.

    Other augmenters cost little beside the decoder. After ``until`` real batches take the place of
    generated ones. A teacher costs a forward pass, a third of a step, except in the first training.
    """
    ratio, real, rounds = _joint_ratio(variant), 1.0 + variant.added_batches, variant.teacher_rounds
    kinds = {
        "decoder": (1 + rounds) * real,
        "generator": (1 + rounds) * variant.until * _generated(variant, family),
    }
    if variant.needs_unlabelled:
        kinds["decoder"] += max(rounds, 1) / 3 - (rounds > 0)
    if ratio:
        kinds = {f"joint {ratio}:1": variant.until, "decoder": (1 - variant.until) * real}
    kinds[TRAINED] = float(variant.backbone == "trained")  # only the real batch passes it
    return {kind: times for kind, times in kinds.items() if times}


def _generated(variant: VariantConfig, family: str) -> float:
    """Return how many batches a frozen generator makes beside each real one.

    For a class swap a GAN generates from the old and the new mask; a flow takes half of its steps
    twice.
    """
    if isinstance(variant, CombinedConfig):
        return sum(_generated(member, family) for member in variant.of)
    if not isinstance(variant, FeatureGANConfig) or variant.generator == "joint":
        return 0.0
    if variant.class_swap:
        return float(variant.ratio * variant.fraction * (1 if family == "flow" else 2))
    return float(variant.ratio * (variant.vary or 1))


def joint_ratios(variants: Variants) -> list[int]:
    """Return the different ratios of the variants that train the GAN jointly."""
    return sorted({_joint_ratio(variant) for variant in variants.values()} - {0})


def _joint_ratio(variant: VariantConfig) -> int:
    """Return generated samples a mask in a joint training; 0 for other variants."""
    if isinstance(variant, FeatureGANConfig) and variant.generator == "joint":
        return variant.ratio
    return 0
