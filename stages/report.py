"""report: the comparison table, the curves and the pictures, in one self-contained HTML file and as CSV and JSON."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
import torch
from pydantic import Field

import featurestore
from featurestore import FeatureStore
from stages.common.config import Config, Once, Seed
from stages.common.runtime import generator as random_generator
from stages.common.runtime import make_accelerator, write_json
from stages.gan.fidelity import DIMENSIONS
from stages.reporting import charts, pictures, tables
from stages.reporting.curves import read_curves
from stages.reporting.feature_grid import normalised_pair, subsample_channels
from stages.reporting.projection import project, sample_vectors
from stages.reporting.verdict import answer
from stages.training.models import load_decoder, load_generator

VECTORS_A_SAMPLE = (
    10  # in the projection; vectors of one photograph resemble each other, so few of many
)
WEIGHTS = {"before": "generator-initial", "after": "generator"}  # of the GAN's own training


class CompareConfig(Config):
    """Section ``compare`` of params.yaml: which variants are trained, each with which seeds."""

    variants: Annotated[tuple[str, ...], Field(strict=False), Once]
    gan_variants: Annotated[tuple[str, ...], Field(strict=False), Once]
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1), Once]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all variants: those that read features only first."""
        return self.variants + self.gan_variants


class ReportConfig(Config):
    """Section ``report`` of params.yaml."""

    headline_classes: Annotated[tuple[str, ...], Field(strict=False), Once]
    block_length: int = Field(ge=1)
    pictures: int = Field(ge=1, le=50)
    umap_points: int = Field(ge=50)
    umap_neighbors: int = Field(ge=2)
    umap_min_dist: float = Field(ge=0, le=1)
    grid_samples: int = Field(ge=1, le=32)
    grid_channels: int = Field(ge=1)
    seed: Seed


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
        What the other stages left.
    out
        Folder of ``index.html``, ``comparison.json``, ``comparison.csv``, ``comparison.txt``, ``metrics.json``,
        ``per_class.csv``, ``val_miou.csv`` and ``val_miou_gan.csv``.
    device
        Where features are generated and masks predicted.

    Returns
    -------
    str
        The comparison as a table for a terminal.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        A class that does not exist; a missing or damaged result.
    """
    # The tables.
    results = tables.read_results(metrics, compared.names, compared.seeds)
    rows = tables.compare(results, config.headline_classes, block_length=config.block_length)
    by_class = tables.per_class(results)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "comparison.json", rows)
    write_json(out / "metrics.json", {row["variant"]: tables.headline(row) for row in rows})
    tables.flat(rows).to_csv(out / "comparison.csv", index=False, float_format="%.4f")
    by_class.to_csv(out / "per_class.csv", float_format="%.4f")
    text = tables.as_text(rows)
    (out / "comparison.txt").write_text(text + "\n", encoding="utf-8")

    # The charts and pictures.
    accelerator = make_accelerator(device, "no")
    train, test = featurestore.open(features / "train"), featurestore.open(features / "test")
    gan_run = read_curves(metrics / "train-gan")
    runs = {
        name: [read_curves(metrics / f"{name}-{seed}") for seed in compared.seeds]
        for name in compared.names
    }
    curves = charts.mean_over_seeds(runs, "val/miou")
    for file, names in (
        ("val_miou.csv", compared.variants),
        ("val_miou_gan.csv", compared.gan_variants),
    ):
        curves[list(names)].to_csv(out / file, float_format="%.4f")
    palette = list(
        zip(test.spec.class_names, map(charts.css_colour, test.spec.palette), strict=True)
    )
    shown = {
        "answer": answer(rows, len(test), config.block_length),
        "differences": charts.differences(rows),
        "predictions": _predictions(config, compared, test, decoders, accelerator.device),
        "decoder_curves": charts.decoder_curves(runs),
        "gan_curves": charts.gan_curves(gan_run),
        "monitor": charts.monitor_curves(
            {"train-gan": gan_run, **{name: seeds[0] for name, seeds in runs.items()}}
        ),
        **_generated(config, train, gan, accelerator.device),
    }

    # One file.
    template = jinja2.Template(
        resources.files("stages.reporting").joinpath("report.html").read_text(encoding="utf-8"),
        autoescape=True,
    )
    page = template.render(
        **shown,
        series=list(zip(charts.SERIES, charts.DARK, strict=True)),
        headings=tables.HEADINGS,
        rows=[list(zip(tables.cells(row), tables.sort_keys(row), strict=True)) for row in rows],
        headline_classes=config.headline_classes,
        block_length=config.block_length,
        absent=sorted({name for row in rows for name in row["absent_classes"]}),
        all_classes=[(row["variant"], f"{row['miou_all']['mean']:.2f}") for row in rows],
        by_class=by_class,
        class_intervals={row["variant"]: row["iou_intervals_by_class"] for row in rows},
        isnan=np.isnan,
        palette=palette,
        legend=[charts.Key(name, colour, "mark") for name, colour in palette],
        train=train,
        test=test,
        mixtures=min(DIMENSIONS, train.spec.feature_shape[0]),
        seeds=compared.seeds,
    )
    (out / "index.html").unlink(missing_ok=True)  # it may be a hard link into DVC's cache
    (out / "index.html").write_text(page, encoding="utf-8")
    return text


def _generated(
    config: ReportConfig, store: FeatureStore, gan: Path, device: torch.device
) -> dict[str, Any]:
    """UMAP before and after the GAN's training, by class too, and the feature grids; all of training masks."""
    generators = {
        name: load_generator(gan, weights=weights).to(device) for name, weights in WEIGHTS.items()
    }
    draws = {name: random_generator(device, config.seed) for name in generators}
    scale = generators["after"].feature_scale.cpu().numpy()
    wanted = max(config.grid_samples, -(-config.umap_points // VECTORS_A_SAMPLE))
    chosen = np.random.default_rng(config.seed).choice(
        len(store), size=min(wanted, len(store)), replace=False
    )

    # A few samples at a time: vectors at the same random positions of each group, scaled as the GAN sees them.
    groups: dict[str, list[np.ndarray]] = {"real": [], "before": [], "after": []}
    vectors: dict[str, list[np.ndarray]] = {name: [] for name in groups}
    classes: list[np.ndarray] = []
    for part in np.array_split(chosen, -(-len(chosen) // 8)):
        masks = np.stack([store.mask(position) for position in part])
        features = {
            "real": np.stack([store.features(position) for position in part]).astype(np.float32)
        }
        for name, network in generators.items():
            features[name] = (
                network.generate(torch.from_numpy(masks).to(device), generator=draws[name])
                .float()
                .cpu()
                .numpy()
            )
        for name, group in features.items():
            sampled, found = sample_vectors(
                group / scale, masks, VECTORS_A_SAMPLE * len(part), np.random.default_rng(part)
            )
            vectors[name].append(sampled)
            if sum(map(len, groups[name])) < config.grid_samples:
                groups[name].append(group)
        classes.append(found)
    points = dict(
        zip(
            vectors,
            project(
                [np.concatenate(parts) for parts in vectors.values()],
                neighbors=config.umap_neighbors,
                min_dist=config.umap_min_dist,
                seed=config.seed,
            ),
            strict=True,
        )
    )

    # Grids of the first samples.
    few = chosen[: config.grid_samples]
    channels = subsample_channels(store.spec.feature_shape[0], config.grid_channels)
    real, generated = normalised_pair(
        *(np.concatenate(groups[name])[: len(few), channels] for name in ("real", "after"))
    )
    images = (
        np.stack([store.image(position) for position in few]) if store.spec.has_images else None
    )
    names, palette = store.spec.class_names, store.spec.palette
    labels = np.concatenate(classes)
    masks = pictures.colour_masks(np.stack([store.mask(position) for position in few]), palette)
    return {
        "umap": charts.projections(points["real"], points["before"], points["after"]),
        "umap_classes": charts.projections_by_class(
            (points["real"], labels), (points["after"], labels), names, palette
        ),
        "strips": [
            pictures.feature_strip(name, some, masks, images)
            for name, some in (("Real", real), ("Generated", generated))
        ],
    }


@torch.no_grad()
def _predictions(
    config: ReportConfig,
    compared: CompareConfig,
    store: FeatureStore,
    decoders: Path,
    device: torch.device,
) -> list[tuple[str, list[pictures.Picture]]]:
    """Masks predicted by each variant's first seed on evenly spaced test images (not chosen by their looks): id, and pictures in a row."""
    positions = np.linspace(0, len(store) - 1, min(config.pictures, len(store))).round().astype(int)
    palette = store.spec.palette
    rows: list[list[pictures.Picture]] = []
    for position in positions:
        known = (
            [pictures.photograph("photograph", store.image(position))]
            if store.spec.has_images
            else []
        )
        rows.append(
            [
                *known,
                pictures.drawing("truth", pictures.colour_masks(store.mask(position), palette)),
            ]
        )
    features = torch.from_numpy(
        np.stack([store.features(position) for position in positions]).astype(np.float32)
    ).to(device)
    for variant in compared.names:
        decoder = load_decoder(decoders / f"{variant}-{compared.seeds[0]}").to(device)
        predicted = decoder(features, store.spec.mask_shape).argmax(1).to(torch.uint8).cpu().numpy()
        for row, mask in zip(rows, pictures.colour_masks(predicted, palette), strict=True):
            row.append(pictures.drawing(variant, mask))
    ids = store.ids
    return [(ids[position], row) for position, row in zip(positions, rows, strict=True)]
