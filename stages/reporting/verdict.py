"""The comparison in words: whether a variant helps, by how much, and how certain that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.reporting.tables import Row


@dataclass(frozen=True)
class Verdict:
    """The first lines of the report.

    Attributes
    ----------
    outcome
        ``helps``, ``hurts``, ``unclear`` (the interval contains 0, seeds disagree, or there is
        only one seed), or ``open`` (nothing to compare, or no interval).
    headline
        The verdict in one sentence.
    figures
        Name and value of the few numbers behind the verdict.
    certainty
        What the numbers depend on, and what they do not cover.
    """

    outcome: str
    headline: str
    figures: tuple[tuple[str, str], ...]
    certainty: str


def verdict(rows: Sequence[Row], images: int, block_length: int = 1) -> Verdict:
    """Judge the variants of a comparison by the one that gains most.

    Variants whose interval is above 0 and that gain with every one of at least two seeds come
    first. The interval alone would claim too much: it covers the choice of test images only. For
    two trainings that differ in nothing but the seed, it misses 0 far more often than one time in
    twenty.

    Parameters
    ----------
    rows
        From :func:`stages.reporting.tables.compare`.
    images
        Number of test images.
    block_length
        Consecutive test images that the bootstrap drew together.
    """
    others = [row for row in rows if row["delta_miou"] is not None]
    baseline = next((row for row in rows if row["delta_miou"] is None), None)
    if not others or baseline is None:
        return Verdict(
            "open",
            "Nothing to compare with",
            tuple(map(_miou, rows[:4])),
            "Name the baseline and one more variant in compare.variants.",
        )
    certain = [
        row
        for row in others
        if row["delta_interval"] and row["delta_interval"]["low"] > 0 and _seeds_agree(row)
    ]
    best = max(certain or others, key=lambda row: row["delta_miou"])
    interval = best["delta_interval"]
    bounds = f"{signed(interval['low'])} to {signed(interval['high'])}" if interval else "—"
    difference = ("difference", signed(best["delta_miou"]))
    return Verdict(
        *_outcome(best, bool(certain), len(others)),
        (_miou(baseline), _miou(best), difference, ("95% interval", bounds)),
        _certainty(best, len(others) if certain else 1, images, block_length),
    )


def _miou(row: Row) -> tuple[str, str]:
    return f"{row['variant']}, mIoU", f"{row['miou']['mean']:.2f} %"


def _outcome(best: Row, certain: bool, variants: int) -> tuple[str, str]:
    name, interval, by_seed = best["variant"], best["delta_interval"], best["delta_miou_values"]
    size = f"{abs(best['delta_miou']):.2f} points of mIoU"
    against = f"{size} {'above' if best['delta_miou'] >= 0 else 'below'} the baseline"
    if interval is None:
        return "open", f"Not known: {name} is {against}, without an interval"
    if certain:
        return "helps", f"Yes: {name} is {against}"
    if interval["high"] < 0 and _seeds_agree(best):
        closest = f"every variant is below the baseline; the closest, {name}, by {size}"
        return "hurts", f"No: {closest if variants > 1 else f'{name} is {against}'}"
    seeds = ", with one seed" if len(by_seed) == 1 else ""
    return "unclear", f"Not clear: {name} is {against}{seeds}, which may be chance"


def _seeds_agree(row: Row) -> bool:
    """Tell whether two seeds or more all have a difference of the same sign."""
    by_seed = row["delta_miou_values"]
    return len(by_seed) > 1 and (min(by_seed) > 0 or max(by_seed) < 0)


def _certainty(best: Row, variants: int, images: int, block_length: int) -> str:
    """Say what a difference depends on.

    ``variants`` is the number of variants from which this one was picked for its gain.
    """
    by_seed = best["delta_miou_values"]
    blocks = f" in blocks of {block_length}" if block_length > 1 else ""
    seeds = f"for these {len(by_seed)} seeds; by seed the difference is "
    seeds += f"{', '.join(map(signed, by_seed))}."
    if len(by_seed) == 1:
        seeds = "for one seed; the variation between seeds is unknown."
    if variants > 1:
        seeds += (
            f" It was selected from {variants} variants; of 20 without effect,"
            " one interval is expected to exclude 0."
        )
    return f"The interval is over the {images} test images{blocks}, {seeds}"


def signed(value: float) -> str:
    """Format two decimals with a sign; the minus sign is typographic."""
    return f"{value:+.2f}".replace("-", "−")
