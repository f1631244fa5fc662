"""report: tables, curves and pictures in one self-contained HTML file, and as CSV and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import jinja2
import numpy as np
import pandas as pd
import torch
from pydantic import Field, model_validator
from typing_extensions import Self

import featurestore
from featurestore import FeatureStore
from featurestore.dataset import gather_maps
from featurestore.files import write_atomically
from stages.common.config import Config, Listed, Once, Seed
from stages.common.runtime import generator as random_generator
from stages.common.runtime import make_accelerator, write_json
from stages.gan.fidelity import DIMENSIONS
from stages.reporting import charts, pictures, tables
from stages.reporting.curves import read_curves, trained_gan
from stages.reporting.features import (
    normalised_pair,
    project,
    sample_vectors,
    subsample_channels,
)
from stages.reporting.verdict import verdict
from stages.training.feature_source import compute_features
from stages.training.models import (
    has_trained_backbone,
    load_backbone,
    load_decoder,
    load_generator,
)

VECTORS_A_SAMPLE = 10  # in the projection; vectors of one image resemble each other
BATCH_SIZE = 8  # samples whose features are in memory together
WEIGHTS = {"before": "generator-initial", "after": "generator"}  # of the GAN's pretraining


class CompareConfig(Config):
    """Section ``compare`` of params.yaml: which variants are trained, each with which seeds."""

    variants: Annotated[tuple[str, ...], Listed, Once] = Field(
        ("baseline",), description="variants that read features only"
    )
    unlabelled_variants: Annotated[tuple[str, ...], Listed, Once] = Field(
        (), description="variants that read features/unlabelled"
    )
    gan_variants: Annotated[tuple[str, ...], Listed, Once] = Field(
        ("featuregan-1x", "featuregan-2x"), description="variants that read models/gan"
    )
    generators: Annotated[tuple[Literal["gan"], ...], Listed, Once] = Field(
        ("gan",), description="trained by train-gan; [] if no variant reads one"
    )
    seeds: Annotated[tuple[Seed, ...], Listed, Field(min_length=1), Once] = Field(
        (0, 1, 2), description="every variant is trained with every seed"
    )

    @property
    def names(self) -> tuple[str, ...]:
        """All variants, in the order of tables."""
        return self.variants + self.unlabelled_variants + self.gan_variants

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.names:
            raise ValueError("all lists of variants are empty; name at least one variant")
        if self.gan_variants and not self.generators:
            raise ValueError(
                f"{self.gan_variants[0]} reads models/gan; set generators to [gan], or empty"
                " gan_variants"
            )
        return self


class ReportConfig(Config):
    """Section ``report`` of params.yaml."""

    headline_classes: Annotated[tuple[str, ...], Listed, Once] = Field(
        (), description="classes of the mIoU; empty: all"
    )
    block_length: int = Field(
        1, ge=1, description="consecutive test images per bootstrap block; about 20 for video"
    )
    pictures: int = Field(4, ge=1, le=50, description="test images with predictions shown")
    umap_points: int = Field(1000, ge=50, description="real vectors, and as many generated ones")
    umap_neighbors: int = Field(15, ge=2, description="neighbors in UMAP")
    umap_min_dist: float = Field(0.1, ge=0, le=1, description="smallest distance in UMAP")
    grid_samples: int = Field(8, ge=1, le=32, description="masks in the feature grids")
    grid_channels: int = Field(12, ge=1, description="channels in the feature grids")
    seed: Seed = Field(0, description="seed of the chosen images, masks and vectors")


def run(
    config: ReportConfig,
    compared: CompareConfig,
    *,
    features: Path,
    gan: Path,
    decoders: Path,
    metrics: Path,
    out: Path,
    device: str,
) -> str:
    """Write the report into ``out``.

    Parameters
    ----------
    config, compared
        What is shown, of which decoders.
    features, gan, decoders, metrics
        Outputs of the other stages.
    out
        Folder of ``index.html``, ``comparison.json``, ``comparison.csv``, ``comparison.txt``,
        ``metrics.json``, ``per_class.csv``, ``val_miou.csv`` and ``val_miou_gan.csv``.
    device
        Device that generates features and predicts masks.

    Returns
    -------
    str
        The comparison as a table for a terminal.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        A class that does not exist; a missing or damaged result.
    """
    results = tables.read_results(metrics, compared.names, compared.seeds)
    rows = tables.compare(results, config.headline_classes, block_length=config.block_length)
    text = tables.as_text(rows)
    out.mkdir(parents=True, exist_ok=True)
    # Each file is a new one: DVC may have linked the old one to its cache.
    write_atomically(out / "comparison.txt", f"{text}\n".encode())
    accelerator = make_accelerator(device, "no")
    train, test = featurestore.open(features / "train"), featurestore.open(features / "test")
    # Without a GAN, as after `choose` where it did not help, its parts are left out.
    has_gan = bool(compared.generators) and gan.is_dir()
    template = resources.files("stages.reporting").joinpath("report.html")
    page = jinja2.Template(template.read_text(encoding="utf-8"), autoescape=True).render(
        config=config,
        seeds=compared.seeds,
        train=train,
        test=test,
        palette=[charts.css_colour(colour) for colour in test.spec.palette],
        mixtures=min(DIMENSIONS, train.spec.feature_shape[0]),
        charts=charts,
        verdict=verdict(rows, len(test), config.block_length),
        predictions=_predictions(config, compared, test, decoders, accelerator.device),
        **_tables(rows, tables.per_class(results), out),
        **_curves(compared, metrics, out),
        **(_generated(config, train, gan, accelerator.device) if has_gan else {}),
    )
    write_atomically(out / "index.html", page.encode())
    return text


def _tables(rows: Sequence[tables.Row], by_class: pd.DataFrame, out: Path) -> dict[str, object]:
    """Write the tables, and prepare those of the page."""
    write_json(out / "comparison.json", rows)
    write_json(out / "metrics.json", {row["variant"]: tables.headline(row) for row in rows})
    flat = tables.flat(rows).to_csv(index=False, float_format="%.4f")
    write_atomically(out / "comparison.csv", flat.encode())
    write_atomically(out / "per_class.csv", by_class.to_csv(float_format="%.4f").encode())
    return {
        "differences": charts.differences(rows),
        "headings": tables.HEADINGS,
        "rows": [zip(tables.cells(row), tables.sort_keys(row), strict=True) for row in rows],
        "absent": sorted({name for row in rows for name in row["absent_classes"]}),
        "all_classes": [(row["variant"], f"{row['miou_all']['mean']:.2f}") for row in rows],
        "by_class": by_class,
        "class_intervals": {row["variant"]: row["iou_intervals_by_class"] for row in rows},
        "isnan": np.isnan,
    }


def _curves(compared: CompareConfig, metrics: Path, out: Path) -> dict[str, object]:
    """Draw the curves of all trainings, and write the mean mIoU on the validation split."""
    gan = read_curves(metrics / "train-gan") if compared.generators else {}
    runs = {
        name: [read_curves(metrics / f"{name}-{seed}") for seed in compared.seeds]
        for name in compared.names
    }
    miou = charts.mean_over_seeds(runs, "val/miou")
    for kind in ("", "unlabelled_", "gan_"):  # a file for each list that dvc.yaml plots
        names = getattr(compared, f"{kind}variants")
        file = out / f"val_miou{f'_{kind}'.rstrip('_')}.csv"
        write_atomically(file, miou[list(names)].to_csv(float_format="%.4f").encode())
    first = {name: seeds[0] for name, seeds in runs.items()}
    joint = {name: curves for name, curves in first.items() if trained_gan(curves)}
    by_run = {name: charts.gan_curves(gan, curves) for name, curves in joint.items()}
    return {
        "decoder_curves": charts.decoder_curves(runs),
        "gan_curves": by_run or ({"": charts.gan_curves(gan)} if gan else {}),
        "monitor": charts.monitor_curves({"train-gan": gan, **first}),
    }


def _generated(
    config: ReportConfig, store: FeatureStore, gan: Path, device: torch.device
) -> dict[str, object]:
    """Draw UMAP before and after the GAN's pretraining, and feature grids, of training masks."""
    wanted = max(config.grid_samples, -(-config.umap_points // VECTORS_A_SAMPLE))
    positions = store.positions("identity")  # what the GAN learned from
    chosen = np.random.default_rng(config.seed).choice(
        positions, size=min(wanted, len(positions)), replace=False
    )
    vectors, classes, maps = _sample(config, store, gan, device, chosen)
    real, before, after = project(
        [vectors[name] for name in ("real", *WEIGHTS)],
        neighbors=config.umap_neighbors,
        min_dist=config.umap_min_dist,
        seed=config.seed,
    )
    spec, shown = store.spec, chosen[: config.grid_samples]
    channels = subsample_channels(spec.feature_shape[0], config.grid_channels)
    grids = normalised_pair(*(maps[name][: len(shown), channels] for name in ("real", "after")))
    masks = pictures.colour_masks(store.gather("masks", shown), spec.palette)
    images = store.gather("images", shown) if spec.has_images else None
    return {
        "umap": charts.projections(real, before, after),
        "umap_classes": charts.projections_by_class(
            (real, classes), (after, classes), spec.class_names, spec.palette
        ),
        "strips": [
            pictures.feature_strip(name, grid, masks, images)
            for name, grid in zip(("Real", "Generated"), grids, strict=True)
        ],
    }


def _sample(
    config: ReportConfig, store: FeatureStore, gan: Path, device: torch.device, chosen: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """Sample real features, and features generated before and after the GAN's pretraining.

    Returns
    -------
    tuple
        By kind of features: vectors (n, C) at the same random positions, in the GAN's scale.
        Their classes (n,). By kind: feature maps (B, C, h, w) of the first samples.
    """
    generators = {
        name: load_generator(gan, weights=weights).to(device) for name, weights in WEIGHTS.items()
    }
    draws = {name: random_generator(device, config.seed) for name in generators}
    scale = generators["after"].feature_scale.cpu().numpy()
    sampled: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
    shown: list[dict[str, np.ndarray]] = []
    for batch in np.array_split(chosen, -(-len(chosen) // BATCH_SIZE)):
        masks = store.gather("masks", batch)
        features = {"real": gather_maps(store, batch).numpy()}
        for name, network in generators.items():
            made = network.generate(torch.from_numpy(masks).to(device), generator=draws[name])
            features[name] = made.float().cpu().numpy()
        count = VECTORS_A_SAMPLE * len(batch)
        sampled.append(
            {
                name: sample_vectors(maps / scale, masks, count, np.random.default_rng(batch))
                for name, maps in features.items()
            }
        )
        if sum(len(maps["real"]) for maps in shown) < config.grid_samples:
            shown.append(features)
    return (
        {name: np.concatenate([batch[name][0] for batch in sampled]) for name in sampled[0]},
        np.concatenate([batch["real"][1] for batch in sampled]),
        {name: np.concatenate([maps[name] for maps in shown]) for name in shown[0]},
    )


@torch.no_grad()
def _predictions(
    config: ReportConfig,
    compared: CompareConfig,
    store: FeatureStore,
    decoders: Path,
    device: torch.device,
) -> list[tuple[str, list[pictures.Picture]]]:
    """Predict masks by each variant's first seed, on evenly spaced test images.

    Returns
    -------
    list of tuple
        An image's id, and its pictures: image, true mask, a mask a variant.
    """
    positions = np.linspace(0, len(store) - 1, min(config.pictures, len(store))).round().astype(int)
    stored = gather_maps(store, positions, device)
    masks = {"truth": store.gather("masks", positions)}
    for variant in compared.names:
        folder = decoders / f"{variant}-{compared.seeds[0]}"
        features = stored
        if has_trained_backbone(folder):
            images = torch.from_numpy(store.gather("images", positions)).to(device)
            network = load_backbone(folder).to(device)
            features = compute_features(network, store.spec.compute, images.movedim(-1, 1))
        logits = load_decoder(folder).to(device)(features, store.spec.mask_shape)
        masks[variant] = logits.argmax(1).to(torch.uint8).cpu().numpy()
    coloured = {
        name: pictures.colour_masks(values, store.spec.palette) for name, values in masks.items()
    }
    rows = [
        [pictures.as_png(name, pixels[number]) for name, pixels in coloured.items()]
        for number in range(len(positions))
    ]
    if store.spec.has_images:
        for image, row in zip(store.gather("images", positions), rows, strict=True):
            row.insert(0, pictures.as_jpeg("image", image))
    return [(store.ids[position], row) for position, row in zip(positions, rows, strict=True)]
