"""How often ``compare``'s 95% intervals hold the true difference, were the test images of a study all the images that there are.

    python -m benchmarks.coverage RESULTS... --variant NAME [--class NAME] [--baseline NAME] [--splits 300] [--json FILE]

From a study's test images as many are drawn with replacement, again and again; on each such split the bootstrap gives an
interval, and the difference on the images they were drawn from is the truth (a nested bootstrap, Efron and Tibshirani 1993,
section 18.2). RESULTS are those of ``compare``, and so are its options. ``below`` and ``above`` are the percentages of splits
where the truth lies below or above the interval, ``width`` is the intervals' mean width in points of mIoU.
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
    """Those of which both have a run."""
    ours, theirs = (
        {run["seed"] for run in group.runs.get(name, [])} for name in (variant, baseline)
    )
    return sorted(ours & theirs)


def coverage(
    group: Group, variant: str, baseline: str, means: dict[str, list[str]], splits: int
) -> list[dict[str, Any]]:
    """A row for each of ``means``, names of classes by what their mean is called."""
    by_seed = [{run["seed"]: run for run in group.runs[name]} for name in (variant, baseline)]
    paired = [
        tuple(runs[seed] for runs in by_seed) for seed in shared_seeds(group, variant, baseline)
    ]
    names, ids = list(paired[0][0]["iou"]), sorted(paired[0][0]["images"])
    ours, theirs = (
        [Counts.of(run["images"], ids, len(names)) for run in side]
        for side in zip(*paired, strict=True)
    )
    classes = [[names.index(name) for name in mean] for mean in means.values()]
    truths = [
        interval.value for interval in paired_intervals(ours, theirs, *classes, resamples=1)[0]
    ]

    rng = np.random.default_rng(0)
    below, above, wide = np.zeros((3, len(means)))
    for _ in range(splits):
        chosen = rng.integers(0, len(ids), len(ids))
        parts = (
            [Counts(*(counts[chosen] for counts in vars(one).values())) for one in side]
            for side in (ours, theirs)
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
@click.option("--variant", required=True, help="The variant whose difference is looked at.")
@click.option(
    "--class",
    "classes",
    multiple=True,
    help="Mean over this class, and others named so, beside that over all.",
)
@click.option(
    "--baseline",
    default="baseline",
    show_default=True,
    help="The variant that it is compared with.",
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
    groups = [group for group in read_groups(results) if shared_seeds(group, variant, baseline)]
    if not groups:
        raise click.UsageError(
            f"nowhere do the results have both {variant!r} and {baseline!r} with the same seed"
        )
    rows = []
    for group in groups:
        tested = tables.tested_classes(group.runs[variant][0])
        means = {"named": [name for name in classes if name in tested]} if classes else {}
        rows += coverage(group, variant, baseline, {**means, "all": tested}, splits)
    common.report(rows, ("images", "variant", "mean", "covered", "below", "above", "width"), file)


if __name__ == "__main__":
    main()
