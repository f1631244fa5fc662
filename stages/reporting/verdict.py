"""What the comparison says in words: does a variant help, by how much, how sure is that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The first lines of the report.

    Attributes
    ----------
    verdict
        ``helps``, ``hurts``, ``unclear`` (the interval holds 0, seeds disagree, or there is one alone), or ``open`` (nothing to
        compare, or no interval).
    headline
        The answer in one sentence.
    figures
        Name and value of the few numbers behind it.
    certainty
        What the numbers rest on, and what they do not cover.
    """

    verdict: str
    headline: str
    figures: tuple[tuple[str, str], ...]
    certainty: str


def answer(rows: Sequence[Mapping[str, Any]], images: int, block_length: int = 1) -> Answer:
    """The answer that the rows of :func:`stages.reporting.tables.compare` give, tested on so many images, drawn in such blocks.

    It is about one variant: the one that gains most of those whose interval is above 0 and that gain with every seed, two at
    least, or of all where none is. The interval alone would say too much: it knows of test images only, and for two trainings
    that differ in nothing but the seed it misses 0 far more often than one time in twenty.
    """
    others = [row for row in rows if row["delta_miou"] is not None]
    baseline = next((row for row in rows if row["delta_miou"] is None), None)
    if not others or baseline is None:
        scores = tuple(
            (f"{row['variant']}, mIoU", f"{row['miou']['mean']:.2f} %") for row in rows[:4]
        )
        return Answer(
            "open",
            "Nothing to compare with",
            scores,
            "Name the baseline and one more variant in compare.variants.",
        )
    sure = [
        row
        for row in others
        if row["delta_interval"] and row["delta_interval"]["low"] > 0 and _with_every_seed(row)
    ]
    best = max(sure or others, key=lambda row: row["delta_miou"])
    name, interval = best["variant"], best["delta_interval"]
    size, side = (
        f"{abs(best['delta_miou']):.2f} points of mIoU",
        "above" if best["delta_miou"] >= 0 else "below",
    )
    if interval is None:
        verdict, headline = (
            "open",
            f"Not known: {name} is {size} {side} the baseline, without an interval",
        )
    elif sure:
        verdict, headline = "helps", f"Yes: {name} is {size} above the baseline"
    elif interval["high"] < 0 and _with_every_seed(best):
        closest = f"every variant is below the baseline; the closest, {name}, by {size}"
        verdict, headline = (
            "hurts",
            f"No: {closest if len(others) > 1 else f'{name} is {size} below the baseline'}",
        )
    else:
        alone = ", with one seed" if len(best["delta_miou_values"]) == 1 else ""
        verdict, headline = (
            "unclear",
            f"Not clear: {name} is {size} {side} the baseline{alone}, which may be chance",
        )
    figures = (
        ("baseline, mIoU", f"{baseline['miou']['mean']:.2f} %"),
        (f"{name}, mIoU", f"{best['miou']['mean']:.2f} %"),
        ("difference", signed(best["delta_miou"])),
        (
            "95% interval",
            "—" if interval is None else f"{signed(interval['low'])} to {signed(interval['high'])}",
        ),
    )
    picked = len(others) if verdict == "helps" else 1
    return Answer(
        verdict,
        headline,
        figures,
        _certainty(best["delta_miou_values"], picked, images, block_length),
    )


def _with_every_seed(row: Mapping[str, Any]) -> bool:
    """Whether several seeds have a difference of the same sign."""
    by_seed = row["delta_miou_values"]
    return len(by_seed) > 1 and (min(by_seed) > 0 or max(by_seed) < 0)


def _certainty(by_seed: Sequence[float], variants: int, images: int, block_length: int) -> str:
    """What a difference rests on: seeds, test images, and from how many variants it was picked for being above 0."""
    what = f"The interval is over the {images} test images"
    what += f" in blocks of {block_length}" if block_length > 1 else ""
    if len(by_seed) == 1:
        text = f"{what}, for one seed: how far another seed would move the difference is not known."
    else:
        text = f"{what}, for these {len(by_seed)} seeds; by seed the difference is {', '.join(map(signed, by_seed))}."
    if variants > 1:
        text += f" It is picked from {variants} variants: of twenty that change nothing, one interval is expected to miss 0 by chance."
    return text


def signed(value: float) -> str:
    """Two decimals with a sign, typographically."""
    return f"{value:+.2f}".replace("-", "−")
