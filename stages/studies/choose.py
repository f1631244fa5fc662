"""Choose a decoder by cross-validation on the labelled images, by successive halving.

All candidates are tested on the first folds, the better half on further ones, the best quarter on
all (Jamieson and Talwalkar 2016). Every image is predicted by decoders that did not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from stages.common.text_table import percent, plain
from stages.reporting.bootstrap import Counts, Interval, paired_intervals
from stages.studies.candidates import Candidate

Images = Mapping[str, Sequence[int]]  # confusion matrix of each image, as in images.json
RUNGS = ((0.4, 1.0), (0.8, 0.5), (1.0, 0.25))  # fractions of the folds, and of the candidates
MEASURABLE = "makes no measurable difference"


@dataclass
class Trial:
    """A candidate, and the predictions of its decoders by fold.

    Attributes
    ----------
    candidate
        The candidate.
    folds
        Confusion matrix of each image, by number of the fold.
    """

    candidate: Candidate
    folds: dict[int, Images] = field(default_factory=dict)


@dataclass(frozen=True)
class Scoring:
    """How predictions are scored.

    Attributes
    ----------
    num_classes
        K.
    classes
        Numbers of the classes of the mean.
    block_length
        Consecutive images that the bootstrap draws together.
    """

    num_classes: int
    classes: Sequence[int]
    block_length: int = 1

    def miou(self, trial: Trial, folds: Sequence[int]) -> float:
        """Compute the mean IoU over all images of some folds, in 0..1."""
        counts = self._counts(trial, folds)
        iou = counts.iou(np.ones((1, len(counts.truth))))[0, list(self.classes)]
        return float(np.nanmean(iou))

    def difference(self, trial: Trial, other: Trial) -> Interval:
        """Compute the difference in mIoU to another trial, on the images of both."""
        folds = sorted(set(trial.folds) & set(other.folds))
        (interval,), _ = paired_intervals(
            [self._counts(trial, folds)],
            [self._counts(other, folds)],
            self.classes,
            block_length=self.block_length,
        )
        return interval

    def _counts(self, trial: Trial, folds: Sequence[int]) -> Counts:
        images = {id: counts for fold in folds for id, counts in trial.folds[fold].items()}
        return Counts.of(images, sorted(images), self.num_classes)


def halve(
    candidates: Sequence[Candidate],
    folds: int,
    run: Callable[[Candidate, int], Images | None],
    scoring: Scoring,
) -> list[Trial]:
    """Test candidates on more and more folds, and leave out the worse ones.

    The first candidate, the baseline, is tested on all folds.

    Parameters
    ----------
    candidates
        At least one.
    folds
        Number of folds.
    run
        Trains a candidate without a fold and predicts its images; None: there is no time left.
        Folds that some candidates lack are not compared, but for the first fold.

    Returns
    -------
    list of Trial
        Of all candidates, the best first; those with more folds before those with fewer.
    """
    trials = [Trial(candidate) for candidate in candidates]
    alive, tested = list(trials), 0
    for fraction, kept in RUNGS:
        count = max(1, math.ceil(kept * len(trials)))
        alive = ranked(alive, range(tested), scoring)[:count] if tested else alive
        wanted = max(tested, folds_of_rung(fraction, folds))
        alive += [trials[0]] if trials[0] not in alive else []
        for fold in range(tested, wanted):
            for trial in alive:
                images = run(trial.candidate, fold)
                if images is None:
                    for each in alive if fold else ():  # compare whole folds, if there is one
                        each.folds.pop(fold, None)
                    return ranked(trials, range(folds), scoring)
                trial.folds[fold] = images
        tested = wanted
    return ranked(trials, range(folds), scoring)


def folds_of_rung(fraction: float, folds: int) -> int:
    """Return how many folds the candidates of a rung are tested on."""
    return max(1, math.ceil(fraction * folds))


def ranked(trials: Sequence[Trial], folds: Sequence[int], scoring: Scoring) -> list[Trial]:
    """Sort trials: most of these folds first, then the highest mIoU on the folds they have."""

    def key(trial: Trial) -> tuple[int, float]:
        done = [fold for fold in folds if fold in trial.folds]
        return (-len(done), -scoring.miou(trial, done) if done else 0.0)

    return sorted(trials, key=key)


def table(trials: Sequence[Trial], baseline: Trial, scoring: Scoring) -> str:
    """Tabulate the trials: mIoU in percent, and the difference to the baseline."""
    rows = []
    for trial in trials:
        if not trial.folds:
            rows.append([trial.candidate.name, "0", "—", "—", "—"])
            continue
        difference = None if trial is baseline else scoring.difference(trial, baseline)
        rows.append(
            [
                trial.candidate.name,
                str(len(trial.folds)),
                percent(scoring.miou(trial, sorted(trial.folds))),
                f"{100 * difference.value:+.2f}" if difference else "—",
                f"{100 * difference.low:+.2f} to {100 * difference.high:+.2f}"
                if difference
                else "—",
            ]
        )
    return plain(["candidate", "folds", "mIoU %", "Δ mIoU", "95% interval"], rows)


def reasons(trials: Sequence[Trial], scoring: Scoring) -> list[str]:
    """Say in a sentence what each addition gives over the candidate that it extends."""
    by_name = {trial.candidate.name: trial for trial in trials}
    sentences = []
    for trial in trials:
        base = by_name.get(trial.candidate.extends)
        if base is None or not set(trial.folds) & set(base.folds):
            continue
        difference = scoring.difference(trial, base)
        points, low, high = (
            100 * each for each in (difference.value, difference.low, difference.high)
        )
        if low > 0:
            found = f"improves mIoU by {points:.1f} points ({low:.1f} to {high:.1f})"
        elif high < 0:
            found = f"lowers mIoU by {-points:.1f} points ({-high:.1f} to {-low:.1f})"
        else:
            found = f"{MEASURABLE}: {points:+.1f} points ({low:+.1f} to {high:+.1f})"
        sentences.append(f"{trial.candidate.adds} {found}, over {base.candidate.name}.")
    return sentences
