"""`choose`: successive halving, folds, sentences, and a whole run on the features of a project."""

from __future__ import annotations

from types import SimpleNamespace

import click
import numpy as np
import pytest

from stages.commands.choose import Clock
from stages.commands.fold_training import divide
from stages.studies.candidates import Candidate, extended
from stages.studies.choose import Images, Scoring, halve, reasons, table

IMAGES = 4  # of each fold


def predictions(fold: int, right: float) -> Images:
    """Two classes of 100 pixels each, of which a fraction is predicted right."""
    hit = round(100 * right)
    return {
        f"{fold}-{number}": [0, 0, hit, 0, 1, 100 - hit, 1, 0, 100 - hit, 1, 1, hit]
        for number in range(IMAGES)
    }


def candidates(count: int) -> list[Candidate]:
    return [
        Candidate(
            str(number), {"augmenter": "none"}, "" if not number else "0", f"Addition {number}"
        )
        for number in range(count)
    ]


SCORING = Scoring(2, [0, 1])


def test_the_worse_half_is_left_out_and_the_baseline_stays() -> None:
    runs: list[tuple[str, int]] = []

    def run(candidate: Candidate, fold: int) -> Images:
        runs.append((candidate.name, fold))
        return predictions(fold, 0.5 + 0.05 * int(candidate.name))

    trials = halve(candidates(8), 5, run, SCORING)
    assert [trial.candidate.name for trial in trials] == ["7", "6", "0", "5", "4", "3", "2", "1"]
    assert [len(trial.folds) for trial in trials] == [5, 5, 5, 4, 4, 2, 2, 2]
    assert len(runs) == len(set(runs)) == 8 * 2 + 5 * 2 + 3
    assert runs[:8] == [(str(number), 0) for number in range(8)]


def test_a_fold_that_the_budget_cuts_short_is_not_compared() -> None:
    left = 8 + 3

    def run(candidate: Candidate, fold: int) -> Images | None:
        nonlocal left
        left -= 1
        return None if left < 0 else predictions(fold, 0.9 if candidate.name == "5" else 0.5)

    trials = halve(candidates(8), 5, run, SCORING)
    assert {len(trial.folds) for trial in trials} == {1}
    assert trials[0].candidate.name == "5"


def test_a_first_fold_that_the_budget_cuts_short_decides_between_those_it_tested() -> None:
    left = 5

    def run(candidate: Candidate, fold: int) -> Images | None:
        nonlocal left
        left -= 1
        return None if left < 0 else predictions(fold, 0.9 if candidate.name == "3" else 0.5)

    trials = halve(candidates(8), 5, run, SCORING)
    assert [len(trial.folds) for trial in trials] == [1] * 5 + [0] * 3
    assert trials[0].candidate.name == "3"


class TimedTraining:
    """Trainings of 10 epochs on 5 folds; an epoch of `linear` takes 1 s, of `deeplab` 2 s."""

    params = SimpleNamespace(train_decoder=SimpleNamespace(epochs=10))
    folds = range(5)

    def test(self, candidate: Candidate, fold: int, *, epochs: int) -> tuple[Images, float]:
        return {}, epochs * {"linear": 1.0, "deeplab": 2.0}[candidate.variant["decoder"]]


def heads() -> list[Candidate]:
    """`deeplab` (20 s a fold) and `linear` (10 s), alone, and with class swaps: twice as long."""
    plain = [Candidate(name, {"augmenter": "none", "decoder": name}) for name in TIMED]
    swaps = [extended(each, "class swaps", [{"augmenter": "class-transfer"}]) for each in plain]
    return [plain[0], swaps[0], plain[1], swaps[1]]


TIMED = ("deeplab", "linear")


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (219, ["deeplab", "linear", "linear + class swaps"]),  # 100 + 2 * 10 + 2 * 20
        (240, ["deeplab", "linear", "linear + class swaps", "deeplab + class swaps"]),  # + 2 * 40
        (100, ["deeplab"]),
    ],
)
def test_candidates_that_the_budget_cannot_pay_are_left_out(
    budget: float, kept: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(TimedTraining(), budget)  # type: ignore[arg-type]
    assert [each.name for each in clock.affordable(heads())] == kept
    told = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert sorted(kept + told) == sorted(each.name for each in heads())


def test_a_budget_below_the_baseline_is_refused() -> None:
    with pytest.raises(click.UsageError, match="takes about 1.7m on 5 folds"):
        Clock(TimedTraining(), 99).affordable(heads())  # type: ignore[arg-type]


def test_sentences_name_additions_that_help_hurt_or_cannot_be_measured() -> None:
    rights = {"0": [0.6] * 5, "1": [0.7] * 5, "2": [0.5] * 5, "3": [0.7, 0.5, 0.6, 0.7, 0.5]}

    def run(candidate: Candidate, fold: int) -> Images:
        return predictions(fold, rights[candidate.name][fold])

    trials = halve(candidates(4), 5, run, SCORING)
    found = {sentence.split(" over ")[0][:23]: sentence for sentence in reasons(trials, SCORING)}
    # IoU of 0.6 right is 0.6 / 1.4, of 0.7 right 0.7 / 1.3.
    assert "Addition 1 improves mIoU by 11.0 points (11.0 to 11.0), over 0." in found.values()
    assert "Addition 2 lowers mIoU by 9.5 points (9.5 to 9.5), over 0." in found.values()
    assert any(text.startswith("Addition 3 makes no measurable") for text in found.values())
    text = table(trials, next(t for t in trials if t.candidate.name == "0"), SCORING)
    assert "42.86" in text  # 0.6 / 1.4
    assert "+10.99" in text


def test_folds_are_random_or_of_neighbours() -> None:
    parts = divide(11, 3, seed=0, block_length=1)
    assert sorted(np.concatenate(parts)) == list(range(11))
    assert [len(part) for part in parts] == [4, 4, 3]
    assert parts[0].tolist() != [0, 1, 2, 3]
    assert [part.tolist() for part in divide(5, 2, seed=0, block_length=20)] == [[0, 1, 2], [3, 4]]


def test_an_addition_combines_with_the_augmenters_that_are_there() -> None:
    base = Candidate("a", {"augmenter": "none", "decoder": "linear", "augment": ["flip"]})
    student = extended(base, "self-training", [{"augmenter": "self-training"}])
    assert student.variant == {
        "augmenter": "self-training",
        "decoder": "linear",
        "augment": ["flip"],
    }
    swaps = extended(student, "class swaps", [{"augmenter": "class-transfer"}])
    assert swaps.variant == {
        "augmenter": "combined",
        "of": [{"augmenter": "self-training"}, {"augmenter": "class-transfer"}],
        "decoder": "linear",
        "augment": ["flip"],
        "statistics": "real",
    }
    assert (swaps.extends, swaps.adds) == (student.name, "Adding class swaps")


@pytest.mark.parametrize("budget", ["1", "0h", "ten"])
def test_a_budget_has_a_unit(budget: str) -> None:
    from tests.factories import call, one_line

    message = one_line(call("choose", "--budget", budget))
    assert "is no time; write a number and s, m, h or d, such as 90m or 2h" in message
