"""doctor: check a folder of images and masks before anything is made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.commands.options import load_params, workers_option

if TYPE_CHECKING:
    from stages.datasets.config import PrepareConfig
    from stages.datasets.inspection import Inspection
    from stages.datasets.layout import DatasetLayout
    from stages.datasets.pair_check import Checked

MOST_SIZES = 3  # sizes that are printed


@click.command(short_help="Check a folder of images and masks; change nothing.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--params",
    "path",
    type=click.Path(path_type=Path),
    help="File whose section `prepare` says how FOLDER is read; its `root` is replaced by FOLDER. "
    "Default: data set `auto`, with the splits that are there.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for overlays of the three most doubtful masks. Default: nothing is written.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 for findings, too.")
@workers_option
@click.pass_context
def doctor(
    ctx: click.Context,
    folder: Path,
    path: Path | None,
    out: Path | None,
    strict: bool,
    workers: int,
) -> None:
    """Check all images and masks of FOLDER, and print what is wrong and what to change.

    Problems stop `prepare`; findings are doubts, which `prepare` prints in short. The exit code is
    0 without problems, 1 with problems (--strict: or findings), and 2 for wrong parameters.
    """
    config = default_config(folder)
    if path is not None:
        config = load_params(path).prepare.model_copy(update={"root": str(folder)})
    from stages.datasets.catalogue import find
    from stages.datasets.inspection import inspect

    config, layout = find(config)
    result = inspect(layout, config, workers=workers, title="doctor: checking")
    click.echo("\n".join(_report(result, layout, config)))
    for each in result.most_doubtful:
        shown = "" if out is None else f": {_write_overlay(out, each, layout, config)}"
        click.echo(f"  doubtful: {each.doubtful:.1%} of {each.pair.mask}{shown}")
    ctx.exit(1 if result.problems or (strict and result.findings) else 0)


def default_config(folder: Path) -> PrepareConfig:
    """Return the settings for a folder of which nothing else is known."""
    from stages.datasets.config import PrepareConfig

    divided = any((folder / train).is_dir() for train in ("train", "images/train"))
    return PrepareConfig(
        dataset="auto", root=str(folder), split="official" if divided else "random"
    )


def _report(result: Inspection, layout: DatasetLayout, config: PrepareConfig) -> Iterator[str]:
    """List the lines of the report."""
    from stages.common.text_table import percent, plain

    splits = result.summary["splits"]
    counts = Counter(pair.split for pair in layout.pairs)
    shown = ", ".join(f"{split} {counts[split]}" for split in splits)
    yield f"{config.root}: dataset {config.dataset}, {len(layout.pairs)} images ({shown})"
    sizes = Counter((each.entry.width, each.entry.height) for each in result.checked)
    common = [f"{n} of {width} x {height}" for (width, height), n in sizes.most_common(MOST_SIZES)]
    if len(sizes) > MOST_SIZES:
        common.append(f"{len(sizes) - MOST_SIZES} more sizes")
    yield f"sizes: {', '.join(common) or 'no pair is without a problem'}"
    if result.summary["turned_images"]:
        yield f"turned by their EXIF orientation: {result.summary['turned_images']} images"
    names = result.summary["classes"]
    head = ["class", *(f"{split} {what}" for split in splits for what in ("pixels %", "images"))]
    rows = [
        [name]
        + [
            cell
            for each in splits.values()
            for cell in (percent(each["pixel_share"][name]), str(each["images_with_class"][name]))
        ]
        for name in names
    ]
    void = [cell for each in splits.values() for cell in (percent(each["void_share"]), "")]
    yield f"\n{plain(head, [*rows, ['(void)', *void]])}\n"
    yield f"problems: {len(result.problems)}{', which stop prepare' if result.problems else ''}"
    yield from (f"  {problem}" for problem in result.problems)
    yield f"findings: {sum(result.summary['findings'].values())}"
    for kind, count in result.summary["findings"].items():
        yield f"  {kind}: {count}"
        yield from (
            f"    {each.path}: {each.message}" for each in result.findings if each.kind == kind
        )


def _write_overlay(
    out: Path, checked: Checked, layout: DatasetLayout, config: PrepareConfig
) -> Path:
    """Write the classes of a pair's mask in colour over its image, and return the file."""
    import numpy as np
    from PIL import Image

    from stages.datasets.pair_check import read_pair
    from stages.reporting.overlay import overlay

    read, path = read_pair(checked.pair, layout, config), out / f"{checked.pair.id}.jpg"
    coloured = overlay(np.asarray(read.image), read.mask, layout.classes.palette)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coloured).save(path, quality=92)
    return path
