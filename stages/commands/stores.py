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

    opened = featurestore.open(store)
    spec, stats = opened.spec, opened.stats
    size = sum(record.bytes for record in opened.records)
    channels, height, width = spec.feature_shape
    click.echo(
        f"{store}: {len(opened)} samples in {len(opened.records)} shards, {size / 1e6:.1f} MB"
    )
    click.echo(
        f"  features    {channels} x {height} x {width} {spec.feature_dtype}{', >= 0' if spec.nonnegative else ''}"
    )
    click.echo(
        f"  masks       {spec.mask_shape[0]} x {spec.mask_shape[1]} uint8, void {spec.void_index}"
    )
    click.echo(f"  images      {'yes' if spec.has_images else 'no'}")
    click.echo(
        f"  backbone    {spec.backbone}, weights {spec.weights_digest[:12]}, {spec.compute}, output stride {spec.output_stride}"
    )
    if spec.generator:
        click.echo(
            f"  generator   {spec.generator}: these features are generated, like the backbone's above"
        )
    click.echo(f"  resize      {spec.resize}")
    click.echo(f"  compression {spec.compression}")
    click.echo(
        f"  values      {stats.minimum.min():.3g} to {stats.maximum.max():.3g}, mean {stats.mean.mean():.3g}"
    )
    labelled = max(1, int(stats.class_pixels.sum()))
    click.echo(f"\n  {'class':20} {'pixels':>8} {'samples':>8}")
    for name, pixels, samples in zip(
        spec.class_names, stats.class_pixels, stats.class_samples, strict=True
    ):
        click.echo(f"  {name:20} {pixels / labelled:8.2%} {samples:8d}")
    click.echo(f"  {'(void)':20} {stats.void_pixels / (labelled + stats.void_pixels):8.2%}")
    click.echo(f"\n  {'shard':20} {'samples':>8} {'MB':>8}  sha256")
    for record in opened.records:
        click.echo(
            f"  {record.file:20} {record.samples:8d} {record.bytes / 1e6:8.1f}  {record.sha256[:16]}"
        )


@click.command(short_help="Compare a store's every byte with its index.")
@click.argument("store", type=click.Path(path_type=Path))
@workers_option
def verify(store: Path, workers: int) -> None:
    """Compare every byte of STORE with the hashes in its index; exit code 1 if one differs."""
    from tqdm import tqdm

    import featurestore

    opened = featurestore.open(store)
    size = sum(record.bytes for record in opened.records)
    with tqdm(total=size, desc=f"verify: {store}", unit="B", unit_scale=True, disable=None) as bar:
        opened.verify(workers=workers, progress=bar.update)
    click.echo(
        f"{store}: {len(opened.records)} shards, {len(opened)} samples, {size / 1e6:.1f} MB: every byte as written"
    )
