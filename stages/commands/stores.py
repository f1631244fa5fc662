"""Commands that look at a feature store."""

from __future__ import annotations

from pathlib import Path

import click

from stages.commands.options import workers_option


@click.command(short_help="Show what a feature store holds.")
@click.argument("store", type=click.Path(path_type=Path))
def inspect(store: Path) -> None:
    """Show what STORE (a folder such as features/train, or one shard) holds."""
    import featurestore
    from stages.data.views import configured_views

    opened = featurestore.open(store)
    views = ", ".join(configured_views(opened.views))
    spec, stats, records = opened.spec, opened.stats, opened.records
    size = sum(record.bytes for record in records)
    shape, (height, width) = " x ".join(map(str, spec.feature_shape)), spec.mask_shape
    layers = (f"{each.name} ({' x '.join(map(str, each.shape))})" for each in spec.layers)
    smallest, largest, mean = stats.minimum.min(), stats.maximum.max(), stats.mean.mean()
    facts = {
        "features": f"{shape} {spec.feature_dtype}{', >= 0' if spec.nonnegative else ''}",
        "layers": spec.layer_names and ", ".join(layers),
        "masks": f"{height} x {width} uint8, void {spec.void_index}",
        "images": "yes" if spec.has_images else "no",
        "backbone": f"{spec.backbone}, weights {spec.weights_digest[:12]}, {spec.compute}, "
        f"output stride {spec.output_stride}",
        "generator": spec.generator and f"{spec.generator}; these features are generated",
        "views": views if views != "identity" else "",
        "resize": spec.resize,
        "compression": spec.compression,
        "values": f"{smallest:.3g} to {largest:.3g}, mean {mean:.3g}",
    }
    click.echo(f"{store}: {len(opened)} samples in {len(records)} shards, {size / 1e6:.1f} MB")
    for name, fact in facts.items():
        if fact:
            click.echo(f"  {name:11} {fact}")
    labelled = max(1, int(stats.class_pixels.sum()))
    click.echo(f"\n  {'class':20} {'pixels':>8} {'samples':>8}")
    rows = zip(spec.class_names, stats.class_pixels, stats.class_samples, strict=True)
    for name, pixels, samples in rows:
        click.echo(f"  {name:20} {pixels / labelled:8.2%} {samples:8d}")
    click.echo(f"  {'(void)':20} {stats.void_pixels / (labelled + stats.void_pixels):8.2%}")
    click.echo(f"\n  {'shard':20} {'samples':>8} {'MB':>8}  sha256")
    for record in records:
        megabytes, digest = record.bytes / 1e6, record.sha256[:16]
        click.echo(f"  {record.file:20} {record.samples:8d} {megabytes:8.1f}  {digest}")


@click.command(short_help="Compare a store's every byte with its index.")
@click.argument("store", type=click.Path(path_type=Path))
@workers_option
def verify(store: Path, workers: int) -> None:
    """Compare every byte of STORE with the hashes in its index; exit code 1 if one differs."""
    from tqdm import tqdm

    import featurestore

    opened = featurestore.open(store)
    shards, size = len(opened.records), sum(record.bytes for record in opened.records)
    with tqdm(total=size, desc=f"verify: {store}", unit="B", unit_scale=True, disable=None) as bar:
        opened.verify(workers=workers, progress=bar.update)
    counts = f"{shards} shards, {len(opened)} samples, {size / 1e6:.1f} MB"
    click.echo(f"{store}: {counts}: every byte as written")
