"""The command that chooses a variant by cross-validation on the labelled images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.commands.options import load_params, option, training_options

if TYPE_CHECKING:
    from featurestore import FeatureStore
    from stages.commands.fold_training import FoldTraining
    from stages.commands.params import Params
    from stages.studies.candidates import Candidate
    from stages.studies.choose import Images, Scoring, Trial

FEATURES = Path("features")
NAME = "chosen"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType):
    """A time such as ``90m``, ``2h`` or ``1.5h``, in seconds."""

    name = "duration"

    def convert(self, value: object, param: Any, ctx: Any) -> float:
        """Read a duration."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", str(value))
        if found is None or not float(found[1]):
            self.fail(f"{value!r} is no time; write a number and s, m, h or d, such as 90m or 2h")
        return float(found[1]) * UNITS[found[2]]


@click.command(short_help="Choose a variant by cross-validation on the labelled images.")
@option("--budget", type=Duration(), default="1h", help="Time for all trainings, such as 90m.")
@option("--folds", type=click.IntRange(2, 20), default=5, help="Parts of the training images.")
@option("--gan/--no-gan", default=True, help="Try FeatureGAN last, if the budget allows.")
@option("--write/--no-write", default=True, help="Write the chosen variant into the parameters.")
@training_options
def choose(path: Path, budget: float, folds: int, gan: bool, write: bool, **machine: Any) -> None:
    """Choose decoder, layers and augmentation for your data; write them into the parameters.

    Trains candidates on all training images but a fold, and scores them on the fold. Everything
    that is fitted, GAN, class statistics and teacher included, is fitted without the fold. The
    test split is not read. A killed command resumes with the same options.
    """
    params = load_params(path, machine["device"])
    import featurestore
    from stages.commands.fold_training import FoldTraining, divide
    from stages.common.runtime import Machine
    from stages.studies import choose as choosing
    from stages.studies.candidates import with_gan, without_gan

    params.check_features(FEATURES, ("train", "val"))
    stores = {split: featurestore.open(FEATURES / split) for split in ("train", "val")}
    if (FEATURES / "unlabelled").is_dir():
        unlabelled = featurestore.open(FEATURES / "unlabelled")
        stores |= {"unlabelled": unlabelled} if len(unlabelled) else {}
    count, block_length = len(stores["train"].positions("identity")), params.report.block_length
    if count < folds:
        raise click.UsageError(f"{count} training images are fewer than --folds {folds}; lower it")
    parts = divide(count, folds, seed=params.prepare.split_seed, block_length=block_length)
    training = FoldTraining(params, Machine(**machine), stores, parts)
    scoring = scoring_of(params, stores["train"], parts)
    spec = stores["train"].spec.select(params.train_decoder.layers)
    candidates = without_gan(params.train_decoder, spec, unlabelled="unlabelled" in stores)
    clock = Clock(training, budget)
    candidates = clock.affordable(candidates)
    click.echo(f"{len(candidates)} candidates, {folds} folds of {count} images")
    trials = choosing.halve(candidates, folds, clock.run, scoring)
    best, baseline = trials[0], next(t for t in trials if t.candidate is candidates[0])
    if gan:
        added = with_gan(best.candidate, spec)
        trials += _with_gan(training, clock, [choosing.Trial(each) for each in added], best)
        trials = choosing.ranked(trials, range(folds), scoring)
    click.echo(choosing.table(trials, baseline, scoring))
    for sentence in choosing.reasons(trials, scoring):
        click.echo(sentence)
    chosen = trials[0].candidate
    if write:
        write_chosen(path, chosen)
        click.echo(f"{path}: variants.{NAME} is {chosen.name}; next: `dvc repro`")


def scoring_of(params: Params, train: FeatureStore, folds: Sequence[Any]) -> Scoring:
    """Choose the classes of the mean: those that a decoder can learn whichever fold is left out.

    Raises
    ------
    click.UsageError
        When there is none.
    """
    import numpy as np

    from stages.studies.choose import Scoring

    names, identity = train.spec.class_names, train.positions("identity")
    shown = np.array(
        [np.bincount(train.mask(int(each)).ravel(), minlength=256) > 0 for each in identity]
    )
    in_folds = sum(shown[fold].any(0).astype(int) for fold in folds)[: len(names)]
    wanted = params.report.headline_classes or names
    classes = [
        number for number, name in enumerate(names) if name in wanted and in_folds[number] > 1
    ]
    if single := [name for name, count in zip(names, in_folds, strict=True) if count == 1]:
        click.echo(f"Left out of the mean, because only one fold shows them: {', '.join(single)}")
    if not classes:
        raise click.UsageError("no class is in two folds; lower --folds, or label more images")
    return Scoring(len(names), classes, params.report.block_length)


class Clock:
    """Runs candidates while the budget lasts."""

    def __init__(self, training: FoldTraining, budget: float) -> None:
        self.training, self.budget = training, budget
        self._seconds: dict[str, float] = {}  # by candidate, of its last fold
        self._plain: dict[str, float] = {}  # by decoder, without an addition

    def affordable(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Leave out the most expensive candidates where the budget does not last for all.

        The budget must last for all folds of the first candidate, the baseline, and for the first
        folds of the others. Trainings of one and of two epochs of each decoder are timed.

        Returns
        -------
        list of Candidate
            The baseline, then the others, the fastest first.

        Raises
        ------
        click.UsageError
            When the budget is too small for the baseline.
        """
        from stages.studies.choose import RUNGS, folds_of_rung

        epochs, folds = self.training.params.train_decoder.epochs, len(self.training.folds)
        self.training.test(candidates[0], 0, epochs=1)  # compiles and loads what later ones find
        for candidate in (each for each in candidates if not each.extends):
            one, two = (self.training.test(candidate, 1, epochs=count)[1] for count in (1, 2))
            self._plain[candidate.variant["decoder"]] = one + (epochs - 1) * max(0.0, two - one)
        baseline, *others = candidates
        if (needed := folds * self.expected(baseline)) > self.budget:
            raise click.UsageError(
                f"--budget {as_time(self.budget)} is too small for one candidate, which takes about"
                f" {as_time(needed)} on {folds} folds"
            )
        kept, count = [baseline], folds_of_rung(RUNGS[0][0], folds)
        for candidate in sorted(others, key=self.expected):
            needed += count * self.expected(candidate)
            if needed <= self.budget:
                kept.append(candidate)
            else:
                more = as_time(count * self.expected(candidate))
                click.echo(f"Left out, because it takes about {more} more: {candidate.name}")
        return kept

    def expected(self, candidate: Candidate) -> float:
        """Return the seconds that a fold of a candidate takes."""
        from stages.augment.registry import VARIANTS
        from stages.common.config import parse
        from stages.estimate.sizes import decoder_passes

        variant = parse(VARIANTS, {"v": candidate.variant}, "variants")["v"]
        plain = self._plain[candidate.variant["decoder"]]
        return self._seconds.get(candidate.name, decoder_passes(variant) * plain)

    def run(self, candidate: Candidate, fold: int) -> Images | None:
        """Train a candidate without a fold; None where the budget does not last for it."""
        if self.training.seconds + self.expected(candidate) > self.budget:
            return None
        images, self._seconds[candidate.name] = self.training.test(candidate, fold)
        return images


def _with_gan(
    training: FoldTraining, clock: Clock, trials: list[Trial], best: Trial
) -> list[Trial]:
    """Test FeatureGAN on top of the best candidate, once its cost is printed."""
    folds, epochs = len(training.folds), training.params.train_gan.frozen_epochs
    each = training.fit_gan(0, epochs=1) * epochs
    needed = folds * (each + 2 * len(trials) * clock.expected(best.candidate))
    left = clock.budget - training.seconds
    click.echo(
        f"FeatureGAN takes about {as_time(needed)} ({folds} GANs of {as_time(each)}, and their"
        f" decoders); {as_time(left)} of the budget are left"
    )
    if needed > left or not best.folds:
        click.echo("FeatureGAN is left out: raise --budget to try it")
        return []
    for fold in range(folds):
        training.fit_gan(fold)
        for trial in trials:
            trial.folds[fold] = training.test(trial.candidate, fold)[0]
    return trials


def as_time(seconds: float) -> str:
    """Format a duration with two digits and its unit."""
    for unit in ("d", "h", "m"):
        if seconds >= UNITS[unit]:
            return f"{seconds / UNITS[unit]:.2g}{unit}"
    return f"{seconds:.2g}s"


def write_chosen(path: Path, chosen: Candidate) -> None:
    """Describe the chosen variant in a params.yaml, and compare it with the baseline.

    Comments, and all other lines, are kept.
    """
    from ruamel.yaml import YAML

    from featurestore.files import write_atomically
    from stages.augment.registry import VARIANTS
    from stages.commands.params import PARAMS, READ
    from stages.common.config import parse

    yaml = YAML()  # keeps comments
    yaml.width, yaml.preserve_quotes = 4096, True
    document = yaml.load(path.read_text(encoding="utf-8"))
    variant = parse(VARIANTS, {NAME: chosen.variant}, "variants")[NAME]
    document["variants"][NAME] = variant.model_dump(mode="json", exclude_defaults=True)
    compare = document["compare"]
    lists: dict[str, list[str]] = {key: [] for key in READ}
    lists["variants"] = ["baseline"] if "baseline" in document["variants"] else []
    lists[variant.listed].append(NAME)
    compare.update(lists, generators=["gan"] if lists["gan_variants"] else [])
    text = StringIO()
    yaml.dump(document, text)
    parse(PARAMS, YAML(typ="safe", pure=True).load(text.getvalue()))
    write_atomically(path, text.getvalue().encode())
