"""The command that estimates disk, memory and time of a run before it starts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.commands.options import (
    device_option,
    load_params,
    load_preset,
    option,
    params_option,
)
from stages.common.text_table import markdown
from stages.common.windows import TILE, Grid

if TYPE_CHECKING:
    from featurestore import StoreSpec
    from featurestore.layers import Layer
    from stages.commands.params import Params
    from stages.estimate.step_cost import Cost

SUMMARY = Path("dataset/summary.json")
CLASSES = 21  # where nothing says how many


@click.command(short_help="Say what disk, memory and time a run will take.")
@params_option
@option("--preset", help="A preset's parameters in place of the file's; `init --list` names them.")
@option(
    "--images",
    "sizes",
    multiple=True,
    type=click.IntRange(3),
    help="Images; several for a table by size. Default: what prepare found.",
)
@option(
    "--classes",
    type=click.IntRange(2, 255),
    help=f"Classes of the data set. Default: those that prepare found, or {CLASSES}.",
)
@option(
    "--tflops",
    type=click.FloatRange(0, min_open=True),
    help="Hours at this assumed rate, in 1e12 operations a second.",
)
@option(
    "--measure",
    is_flag=True,
    help="Hours from a few steps of each kind, timed on this machine. Takes minutes.",
)
@option("--json", "as_json", is_flag=True, help="Print JSON in place of tables.")
@device_option
def estimate(
    path: Path,
    preset: str | None,
    sizes: tuple[int, ...],
    classes: int | None,
    tflops: float | None,
    measure: bool,
    as_json: bool,
    device: str,
) -> None:
    """Say how much disk, memory and time the parameters' stages will take, by number of images.

    Bytes of uncompressed stores are exact. Operations are counted, without computing them. Memory
    is approximate. Hours are an estimate: operations over --tflops, the rate that your device
    sustains in training (often a third of its peak), or measured steps times their number.
    """
    if tflops is not None and measure:
        raise click.UsageError("--tflops assumes a rate and --measure measures it; leave one out")
    params = load_params(path, device) if preset is None else load_preset(preset)
    cases = [_data(params, images, classes) for images in sizes or (None,)]

    from stages.estimate import step_cost
    from stages.estimate.sizes import joint_ratios

    gan, decoder = params.train_gan, params.train_decoder
    setup = step_cost.Setup(
        backbone=params.extract.backbone,
        input_size=params.extract.input_size,
        gan=gan.model_dump(),
        head={
            "head": decoder.decoder,
            "width": decoder.width,
            "atrous_rates": decoder.atrous_rates,
        },
        num_classes=cases[0].classes,
        ratios=joint_ratios(params.compared),
        trains_backbone=any(
            (variant.backbone or decoder.backbone) == "trained"
            for variant in params.compared.values()
        ),
        layers=params.extract.layers,
        dilate=params.extract.dilate,
        decoder_layers=decoder.layers,
    )
    costs, layers = step_cost.count(setup)
    if not params.compare.generators:
        del costs["gan"]
    seconds = None
    if measure:
        batches = {
            "backbone": params.extract.batch_size,
            "gan": gan.batch_size,
            "decoder": decoder.batch_size,
        }
        precisions = {
            "backbone": "no",
            "gan": gan.mixed_precision,
            "decoder": decoder.mixed_precision,
        }
        seconds = step_cost.measure(setup, batches, precisions, device=_device(device))
    results = [_estimate(data, params, costs, layers, seconds, tflops) for data in cases]
    hours = "hours, measured" if measure else f"hours at {tflops:g} TFLOP/s" if tflops else None
    if as_json:
        click.echo(json.dumps(results if len(results) > 1 else results[0], indent=1))
    else:
        click.echo(
            _by_size(results, hours) if len(results) > 1 else _as_text(results[0], params, hours)
        )


@dataclass(frozen=True)
class Data:
    """Images a split, the number of classes, and samples a split without added views."""

    images: dict[str, int]
    classes: int
    samples: dict[str, int]


def _data(params: Params, images: int | None, classes: int | None) -> Data:
    """Return the data set asked for, or found by prepare, or the scenes that wastesim will draw."""
    from stages.estimate.sizes import split_sizes

    prepare, drawn = params.prepare, params.prepare.wastesim
    is_wastesim = prepare.dataset == "wastesim"
    prepared = _prepared(prepare.dataset)
    if images is not None:
        ratios = prepare.ratios if prepare.split == "random" else (0.7, 0.15, 0.15)
        counts = split_sizes(images, ratios, prepare.train_fraction)
    elif prepared:
        counts = prepared.images
    elif is_wastesim:
        counts = {"train": drawn.train, "val": drawn.val, "test": drawn.test}
    else:
        raise click.UsageError(
            f"prepare has not counted images of {prepare.dataset} yet; name them with --images"
        )
    known = prepared.classes if prepared else 7 if is_wastesim else CLASSES
    samples = counts if params.extract.resize != TILE else _windows(params, counts)
    return Data(counts, classes or known, samples)


def _windows(params: Params, images: dict[str, int]) -> dict[str, int]:
    """Count the windows of a split's images, those without a label too."""
    from stages.data.manifest import read_manifest

    prepare, size = params.prepare, params.extract.input_size
    if prepare.dataset == "wastesim":
        windows = len(Grid.over((prepare.wastesim.size, prepare.wastesim.size), size))
        return {split: windows * count for split, count in images.items()}
    prepared = _prepared(prepare.dataset)
    if prepared is None or prepared.images != images:
        raise click.UsageError(
            "extract.resize: tile makes as many samples of an image as its size takes; run the"
            " prepare stage, and leave out --images"
        )
    samples = dict.fromkeys(images, 0)
    for entry in read_manifest(SUMMARY.parent)[0]:
        samples[entry.split] += len(Grid.over((entry.height, entry.width), size))
    return samples


def _prepared(dataset: str) -> Data | None:
    """Return what prepare found, unless it was of another data set or has not run."""
    from stages.common.errors import DataError

    if not SUMMARY.exists():
        return None
    try:
        read = json.loads(SUMMARY.read_text(encoding="utf-8"))
        images = {split: counts["images"] for split, counts in read["splits"].items()}
        known = dataset in ("auto", read["dataset"])
        return Data(images, len(read["classes"]), images) if known else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = (
            f"cannot be read ({error!r}); run the prepare stage again, "
            "or name --images and --classes"
        )
        raise DataError(SUMMARY, message) from error


def _estimate(
    data: Data,
    params: Params,
    costs: Mapping[str, Cost],
    layers: Sequence[Layer],
    seconds: Mapping[str, float] | None,
    tflops: float | None,
) -> dict[str, Any]:
    """Return all that is said of one number of images."""
    from stages.data.views import stored_views
    from stages.estimate import sizes

    extract, gan, decoder = params.extract, params.train_gan, params.train_decoder
    seeds = len(params.compare.seeds)
    variants = {
        name: variant.model_copy(update={"backbone": variant.backbone or decoder.backbone})
        for name, variant in params.compared.items()
    }
    spec = _store_spec(params, layers, data.classes)
    views = len(stored_views(extract.views))
    stores = sizes.store_rows(spec, views, data.samples)
    features = sum(row["bytes"] for row in stores)
    models = sizes.model_bytes(costs, variants, seeds)
    images = bool(gan.reads_images) or any(each.backbone == "trained" for each in variants.values())
    cached = sizes.cache_bytes(spec, views, data.samples, images, variants)
    doubled = 2 if gan.unlabelled else 1  # an unlabelled sample beside each labelled one
    micro_batches = {
        "gan": doubled * gan.batch_size / gan.gradient_accumulation,
        "decoder": decoder.batch_size / decoder.gradient_accumulation,
    }
    samples = {
        "extract": sum(row["samples"] for row in stores),
        "gan": doubled * gan.frozen_epochs * gan.repeats * data.samples["train"],
        "decoder": decoder.epochs * decoder.repeats * data.samples["train"] * seeds,
    }
    return {
        "images": data.images,
        "classes": data.classes,
        "features": list(spec.feature_shape),
        "compression": extract.compression,
        "stores": stores,
        "disk": [
            {"what": "features/", "bytes": features},
            {"what": "models/, about", "bytes": models},
            {"what": "DVC's cache, if it can link", "bytes": 0},
            {"what": "DVC's cache, if it must copy", "bytes": features + models},
        ],
        "memory": sizes.memory_rows(costs, micro_batches, variants, cached),
        "work": sizes.work_rows(
            costs, seconds, tflops, samples=samples, family=gan.family, variants=variants
        ),
    }


def _store_spec(params: Params, layers: Sequence[Layer], num_classes: int) -> StoreSpec:
    """Return the spec of the stores that extract will write, as far as sizes depend on it."""
    from stages.estimate.step_cost import store_spec

    extract = params.extract
    return store_spec(
        layers,
        backbone=extract.backbone,
        input_size=extract.input_size,
        named=bool(extract.layers),
        dilate=extract.dilate,
        num_classes=num_classes,
        resize=extract.resize,
        compute=extract.compute,
        feature_dtype=extract.feature_dtype,
        has_images=extract.store_images,
        compression=extract.compression,
    )


def _device(device: str) -> str:
    from stages.common.runtime import on_cpu

    return "cpu" if on_cpu(device) else "cuda"


def _as_text(result: dict[str, Any], params: Params, hours: str | None) -> str:
    """Format tables for a terminal and for Markdown."""
    from stages.estimate.sizes import EXACT

    extract, seeds = params.extract, len(params.compare.seeds)
    images = ", ".join(f"{split} {count:,}" for split, count in result["images"].items())
    exact = "exactly"
    if extract.compression not in EXACT:
        exact = f"about, at most: {extract.compression} takes less as a rule"
    stores = [
        (row["split"], f"{row['samples']:,}", _size(row["bytes"])) for row in result["stores"]
    ]
    disk, memory = (
        [(row["what"], _size(row["bytes"])) for row in result[key]] for key in ("disk", "memory")
    )
    work = [
        (
            row["part"],
            _number(row.get("gflop_a_sample")),
            f"{row['samples']:,}" if "samples" in row else "",
            _number(row["pflop"]),
            *([_number(row["hours"])] if hours else []),
        )
        for row in result["work"]
    ]
    heads = ("work", "GFLOP a sample", "samples", "PFLOP", *([hours] if hours else []))
    estimated = "Hours are an estimate; e" if hours else "E"
    return "\n".join(
        [
            f"images: {images}; {result['classes']} classes",
            f"features: {' x '.join(map(str, result['features']))} {extract.feature_dtype},"
            f" views {', '.join(extract.views)}, {'with' if extract.store_images else 'without'}"
            f" images, compression {extract.compression} ({exact})\n",
            f"{markdown(('store', 'samples', 'size'), stores, aligned=True)}\n",
            f"{markdown(('disk', 'size'), disk, aligned=True)}\n",
            f"{markdown(('memory, about, in float32', 'size'), memory, aligned=True)}\n",
            f"{markdown(heads, work, aligned=True)}\n",
            f"For {seeds} {'seed' if seeds == 1 else 'seeds'}. {estimated}valuation, the monitor"
            " and the report are not counted.",
        ]
    )


def _by_size(results: list[dict[str, Any]], hours: str | None) -> str:
    """Format what grows with the number of images, one row a number."""
    rows = [
        (
            f"{sum(result['images'].values()):,}",
            _size(result["disk"][0]["bytes"]),
            _size(result["disk"][-1]["bytes"]),
            _number(result["work"][-1]["pflop"]),
            *([_number(result["work"][-1]["hours"])] if hours else []),
        )
        for result in results
    ]
    heads = ("images", "features/", "DVC's copy, if any", "PFLOP", *([hours] if hours else []))
    return markdown(heads, rows, aligned=True)


def _size(count: float) -> str:
    """Bytes in units of 1000, three digits."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
