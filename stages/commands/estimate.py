"""What a run will take, before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from stages.commands.options import PRESETS, device_option, load_params, option, params_option
from stages.common.text_table import markdown

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
    params: Path,
    preset: str | None,
    sizes: tuple[int, ...],
    classes: int | None,
    tflops: float | None,
    measure: bool,
    as_json: bool,
    device: str,
) -> None:
    """Say how much disk, memory and time the parameters' stages will take, by number of images.

    Bytes of uncompressed stores are exact; operations are counted on networks without values, in seconds; memory is
    rough; hours are an estimate: operations over --tflops, which is what your device sustains in training (a third of its peak is
    common), or measured steps times their number.
    """
    if tflops is not None and measure:
        raise click.UsageError("--tflops assumes a rate and --measure measures it; leave one out")
    if preset is not None:
        params = PRESETS / f"{preset}.yaml"
        if not params.exists():
            raise click.UsageError(
                f"unknown preset {preset!r}; choose from {', '.join(sorted(path.stem for path in PRESETS.glob('*.yaml')))}"
            )
    sections = load_params(params, device)
    cases = [_found(sections, images, classes) for images in sizes or (None,)]

    from stages.estimate import step_cost
    from stages.estimate.sizes import joint_ratios

    networks = [sections[name] for name in ("extract", "train_gan", "train_decoder")]
    variants = {name: sections["variants"][name] for name in sections["compare"].names}
    kinds: dict[str, Any] = {"num_classes": cases[0]["classes"], "ratios": joint_ratios(variants)}
    costs, shape = step_cost.count(*networks, **kinds)
    seconds = step_cost.measure(*networks, **kinds, device=_device(device)) if measure else None
    results = [
        _estimate(found, sections, variants, costs, shape, seconds, tflops) for found in cases
    ]
    hours = "hours, measured" if measure else f"hours at {tflops:g} TFLOP/s" if tflops else None
    if as_json:
        click.echo(json.dumps(results if len(results) > 1 else results[0], indent=1))
    else:
        click.echo(
            _by_size(results, hours) if len(results) > 1 else _as_text(results[0], sections, hours)
        )


def _found(sections: dict[str, Any], images: int | None, classes: int | None) -> dict[str, Any]:
    """Images a split and number of classes: those asked for, those that prepare found, or those that wastesim will draw."""
    from stages.common.errors import DataError
    from stages.estimate.sizes import split_sizes

    prepare = sections["prepare"]
    summary: dict[str, Any] = {}
    if SUMMARY.exists():
        try:
            read = json.loads(SUMMARY.read_text(encoding="utf-8"))
            if read["dataset"] == prepare.dataset:  # or it is of other parameters
                summary = {
                    "images": {split: part["images"] for split, part in read["splits"].items()},
                    "classes": len(read["classes"]),
                }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                SUMMARY,
                f"cannot be read ({error!r}); run the prepare stage again, or name --images and --classes",
            ) from error
    if images is not None:
        ratios = prepare.ratios if prepare.split == "random" else (0.7, 0.15, 0.15)
        counts = split_sizes(images, ratios, prepare.train_fraction)
    elif summary:
        counts = summary["images"]
    elif prepare.dataset == "wastesim":
        drawn = prepare.wastesim
        counts = {"train": drawn.train, "val": drawn.val, "test": drawn.test}
    else:
        raise click.UsageError(
            f"prepare has not counted images of {prepare.dataset} yet; name them with --images"
        )
    return {
        "images": counts,
        "classes": classes
        or summary.get("classes", 7 if prepare.dataset == "wastesim" else CLASSES),
    }


def _estimate(
    found: dict[str, Any],
    sections: dict[str, Any],
    variants: dict[str, Any],
    costs: Any,
    shape: tuple[int, ...],
    seconds: dict[str, float] | None,
    tflops: float | None,
) -> dict[str, Any]:
    """Everything that is said of one number of images."""
    from stages.estimate.sizes import (
        cache_bytes,
        memory_rows,
        model_bytes,
        store_rows,
        store_spec,
        work_rows,
    )

    extract, gan, decoder = (sections[name] for name in ("extract", "train_gan", "train_decoder"))
    seeds, training = len(sections["compare"].seeds), found["images"]["train"]
    spec = store_spec(extract, shape, found["classes"])
    stores = store_rows(spec, extract, found["images"])
    samples, features = (
        {row["split"]: row["samples"] for row in stores},
        sum(row["bytes"] for row in stores),
    )
    models = model_bytes(costs, variants, seeds)
    settings: dict[str, Any] = {
        "gan": gan,
        "decoder": decoder,
        "variants": variants,
        "seeds": seeds,
    }
    return {
        **found,
        "features": list(shape),
        "compression": extract.compression,
        "stores": stores,
        "disk": [
            {"what": "features/", "bytes": features},
            {"what": "models/, about", "bytes": models},
            {"what": "DVC's cache, if it can link", "bytes": 0},
            {"what": "DVC's cache, if it must copy", "bytes": features + models},
        ],
        "memory": memory_rows(
            costs, gan, decoder, variants, cache_bytes(spec, found["images"], gan, variants)
        ),
        "work": work_rows(
            costs, seconds, tflops, samples=samples, train_images=training, **settings
        ),
    }


def _device(device: str) -> str:
    from stages.common.runtime import on_cpu

    return "cpu" if on_cpu(device) else "cuda"


def _as_text(result: dict[str, Any], sections: dict[str, Any], hours: str | None) -> str:
    """Format tables for a terminal and for Markdown."""
    from stages.estimate.sizes import EXACT

    extract, seeds = sections["extract"], len(sections["compare"].seeds)
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
