"""The regret of ``choose``: its choice against every candidate, trained on all images and tested.

    python -m benchmarks.choice STUDY --root FOLDER --run EXPERIMENT/VARIANT-SEED --scratch FOLDER
        [--budget 30m] [--folds 5] [--class NAME] [--json FILE]

A run of the study names images, splits, layers and number of steps; each run is a case. ``choose``
sees the training images and the budget; FeatureGAN is not tried. Then every candidate is trained on
all training images and scored on the test images. A killed command resumes in ``--scratch``.

Columns, in points: mIoU in cross-validation (of ``folds`` folds) and on test; the difference on
test to the baseline, with its 95% interval; whether ``choose`` chose the candidate. The best fixed
candidate has the highest mean test mIoU over all cases. The regret of a case is its test mIoU
less the choice's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

import featurestore
from benchmarks import common
from stages import extract, prepare
from stages.commands.choose import Clock, Duration, scoring_of
from stages.commands.fold_training import FoldTraining, divide
from stages.commands.params import PARAMS, Params
from stages.common.config import parse, with_settings
from stages.common.runtime import Machine
from stages.studies import choose as choosing
from stages.studies.candidates import without_gan
from stages.studies.plan import Run

COLUMNS = ("case", "candidate", "folds", "cv", "test", "difference", "low", "high", "chosen")


def extract_once(params: Params, folder: Path, machine: Machine) -> dict[str, Any]:
    """Prepare and extract the images of a case, unless that is done; open its stores."""
    dataset, features = folder / "dataset", folder / "features"
    if not features.is_dir():
        scratch = folder / "scratch"
        prepare.run(params.prepare, out=dataset, scratch=scratch, workers=machine.workers)
        extract.run(
            params.extract,
            dataset=dataset,
            out=features,
            scratch=scratch,
            device=machine.device,
            workers=machine.workers,
        )
    stores = {split: featurestore.open(features / split) for split in ("train", "val", "test")}
    unlabelled = featurestore.open(features / "unlabelled")
    return stores | ({"unlabelled": unlabelled} if len(unlabelled) else {})


def rows_of_case(
    run: Run, params: Params, folder: Path, budget: float, folds: int, workers: int, device: str
) -> list[dict[str, Any]]:
    """Choose among the candidates, train and test them all; a row for each."""
    machine = Machine(device=device, workers=workers, scratch=folder / "scratch")
    stores = extract_once(params, folder, machine)
    train, block_length = stores["train"], params.report.block_length
    count = len(train.positions("identity"))
    parts = divide(count, folds, seed=params.prepare.split_seed, block_length=block_length)
    training = FoldTraining(params, machine, stores, parts)
    scoring = scoring_of(params, train, parts)
    spec = train.spec.select(params.train_decoder.layers)
    candidates = without_gan(params.train_decoder, spec, unlabelled="unlabelled" in stores)
    clock = Clock(training, budget)
    affordable = clock.affordable(candidates)
    trials = choosing.halve(affordable, folds, clock.run, scoring)
    trials += [choosing.Trial(each) for each in candidates if each not in affordable]
    seconds = training.seconds
    click.echo(f"{run.name}: chosen in {seconds / 60:.1f} minutes of {budget / 60:g}")
    tested = {
        trial.candidate.name: choosing.Trial(
            trial.candidate, {0: training.test(trial.candidate, None)[0]}
        )
        for trial in trials
    }
    baseline, rows = tested[candidates[0].name], []
    for trial in trials:
        name, done = trial.candidate.name, sorted(trial.folds)
        test = tested[name]
        difference = None if test is baseline else scoring.difference(test, baseline)
        interval = (difference.value, difference.low, difference.high) if difference else ()
        rows.append(
            {
                "case": run.name,
                "candidate": name,
                "folds": len(done),
                "cv": 100 * scoring.miou(trial, done) if done else None,
                "test": 100 * scoring.miou(test, [0]),
                **dict(
                    zip(("difference", "low", "high"), (100 * x for x in interval), strict=False)
                ),
                "chosen": "yes" if trial is trials[0] else "",
                "seconds": seconds,
            }
        )
    return rows


def regrets(rows: list[dict[str, Any]]) -> tuple[str, dict[str, float]]:
    """Name the best fixed candidate, and compute the regret of each case against it."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    scores = {(row["case"], row["candidate"]): row["test"] for row in rows}
    everywhere = [
        name
        for name in dict.fromkeys(row["candidate"] for row in rows)
        if all((case, name) in scores for case in cases)
    ]
    best = max(everywhere, key=lambda name: float(np.mean([scores[c, name] for c in cases])))
    chosen = {row["case"]: row["test"] for row in rows if row["chosen"]}
    return best, {case: scores[case, best] - chosen[case] for case in cases}


@click.command(help=__doc__)
@click.argument("study", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="prepare.root.",
)
@click.option("--run", "names", multiple=True, required=True, help="Case; repeat for several.")
@click.option("--budget", type=Duration(), default="30m", show_default=True)
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True)
@click.option("--class", "named", multiple=True, help="Class of the mean; repeat for several.")
@click.option("--device", default="auto", show_default=True)
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True)
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(
    study: Path,
    root: Path,
    names: tuple[str, ...],
    budget: float,
    folds: int,
    named: tuple[str, ...],
    device: str,
    workers: int,
    scratch: Path,
    file: Path | None,
) -> None:
    """Measure each case, and print its rows and regrets."""
    print(f"{common.machine()}\n", flush=True)
    rows: list[dict[str, Any]] = []
    for name in names:
        run = common.find_run(study, name, root)
        settings = {"report.headline_classes": list(named)}
        params = parse(PARAMS, with_settings(run.params, settings))
        folder = scratch.resolve() / name
        rows += rows_of_case(run, params, folder, budget, folds, workers, device)
        if file is not None:
            file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    common.report(rows, COLUMNS, file)
    best, by_case = regrets(rows)
    print(f"\nbest fixed candidate: {best}")
    for case, regret in by_case.items():
        print(f"regret in {case}: {regret:.2f} points")
    print(f"mean regret: {np.mean(list(by_case.values())):.2f} points")


if __name__ == "__main__":
    main()
