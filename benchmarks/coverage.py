"""Measure how often the 95% intervals of ``compare`` contain the true difference.

    python -m benchmarks.coverage RESULTS... --variant NAME [--class NAME] [--baseline NAME]
        [--splits 300] [--json FILE]

The test images of a study are taken as the population: the difference on all of them is the truth.
Test splits of the same size are drawn from them with replacement, and the bootstrap gives an
interval for each split (a nested bootstrap, Efron and Tibshirani 1993, section 18.2). RESULTS and
options are those of ``compare``. ``below`` and ``above`` are the percentages of splits where the
truth is below or above the interval. ``width`` is the mean width of the intervals in points of
mIoU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import common
from stages.reporting import tables
from stages.reporting.bootstrap import Counts, paired_intervals
from stages.studies.compare import Group, read_groups

RESAMPLES = 500  # of each split


def shared_seeds(group: Group, variant: str, baseline: str) -> list[int]:
    """List the seeds of which both variants have a run."""
    return sorted(group.seeds(variant) & group.seeds(baseline))


def coverage(
    group: Group, variant: str, baseline: str, means: dict[str, list[str]], splits: int
) -> list[dict[str, Any]]:
    """Measure one row for each of ``means``: names of classes, by the name of their mean."""
    seeds = shared_seeds(group, variant, baseline)
    sides = [
        tables.counts_of([run for run in group.runs[name] if run["seed"] in seeds])
        for name in (variant, baseline)
    ]
    first = group.runs[variant][0]
    names, images = list(first["iou"]), len(first["images"])
    classes = [[names.index(name) for name in mean] for mean in means.values()]
    truths = [interval.value for interval in paired_intervals(*sides, *classes, resamples=1)[0]]

    rng = np.random.default_rng(0)
    below, above, wide = np.zeros((3, len(means)))
    for _ in range(splits):
        chosen = rng.integers(0, images, images)
        parts = (
            [Counts(*(counts[chosen] for counts in vars(one).values())) for one in side]
            for side in sides
        )
        for number, interval in enumerate(
            paired_intervals(*parts, *classes, resamples=RESAMPLES)[0]
        ):
            below[number] += truths[number] < interval.low
            above[number] += truths[number] > interval.high
            wide[number] += 100 * (interval.high - interval.low)
    return [
        {
            "images": group.train_images,
            "variant": variant,
            "mean": name,
            "covered": 100 * (1 - (below[number] + above[number]) / splits),
            "below": 100 * below[number] / splits,
            "above": 100 * above[number] / splits,
            "width": wide[number] / splits,
        }
        for number, name in enumerate(means)
    ]


@click.command(help=__doc__)
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--variant", required=True, help="Variant whose difference is measured.")
@click.option(
    "--class",
    "classes",
    multiple=True,
    help="Mean over this class; repeat for several. Means over all classes are measured, too.",
)
@click.option(
    "--baseline",
    default="baseline",
    show_default=True,
    help="Variant that it is compared with.",
)
@click.option("--splits", type=click.IntRange(1), default=300, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(
    results: tuple[Path, ...],
    variant: str,
    classes: tuple[str, ...],
    baseline: str,
    splits: int,
    file: Path | None,
) -> None:
    """Measure each group of runs that has both variants."""
    groups = [group for group in read_groups(results) if shared_seeds(group, variant, baseline)]
    if not groups:
        raise click.UsageError(
            f"no group of results has {variant!r} and {baseline!r} with the same seed"
        )
    rows = []
    for group in groups:
        tested = tables.tested_classes(group.runs[variant][0])
        means = {"named": [name for name in classes if name in tested]} if classes else {}
        rows += coverage(group, variant, baseline, {**means, "all": tested}, splits)
    common.report(rows, ("images", "variant", "mean", "covered", "below", "above", "width"), file)


if __name__ == "__main__":
    main()
