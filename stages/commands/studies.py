"""Commands about many runs: make them, and compare them."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path

import click

from stages.commands.options import load_preset, option, scratch_option


def _settings(values: tuple[str, ...]) -> dict[str, object]:
    """Parse the values KEY=VALUE of ``--set``; each VALUE is YAML."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    settings = {}
    for text in values:
        key, separator, value = text.partition("=")
        if not separator:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="'--set'")
        try:
            settings[key] = YAML(typ="safe", pure=True).load(value)
        except YAMLError as error:
            problem = " ".join(str(error).split())
            message = f"the value of {key} is not valid YAML ({problem})"
            raise click.BadParameter(message, param_hint="'--set'") from error
    return settings


@click.command(short_help="Train all decoders of a study that have no result yet.")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("results"),
    help="Folder of the result files.",
)
@option(
    "--set",
    "settings",
    multiple=True,
    help="KEY=VALUE, such as prepare.root=FOLDER; other keys change the results.",
)
@option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    help="Runs at a time; they divide the threads (OMP_NUM_THREADS, or the cores).",
)
@click.option(
    "--experiment",
    "experiments",
    multiple=True,
    help="Only this experiment of the study; repeat for several.",
)
@click.option(
    "--run",
    "names",
    multiple=True,
    help="Only this run, EXPERIMENT/VARIANT-SEED; repeat for several. Calls with other runs may"
    " work at the same time, in the same --scratch.",
)
@click.option("--force", is_flag=True, help="Replace results that were made with other settings.")
@click.option("--dry-run", is_flag=True, help="List the result files that are missing and stop.")
@click.option(
    "--list",
    "list_them",
    is_flag=True,
    help="List a command for each run without a result and stop. The commands may run in any"
    " order, or at the same time.",
)
@scratch_option
def study(
    file: Path,
    results: Path,
    settings: tuple[str, ...],
    jobs: int,
    experiments: tuple[str, ...],
    names: tuple[str, ...],
    force: bool,
    dry_run: bool,
    list_them: bool,
    scratch: Path,
) -> None:
    """Train the decoders that FILE describes.

    Each run writes one result file, results/STUDY/EXPERIMENT/VARIANT-SEED.json. Runs that have a
    result file are skipped: interrupt the command, and the next call resumes. A run that fails is
    named at the end, and does not stop the others.
    """
    import torch
    from pydantic import TypeAdapter
    from tqdm import tqdm

    from stages.commands.params import PARAMS
    from stages.common.config import parse, read_params
    from stages.common.errors import DataError
    from stages.studies.plan import StudyConfig, plan
    from stages.studies.runner import CODE, Runner

    overrides = _settings(settings)
    config = parse(TypeAdapter(StudyConfig), read_params(file), "study")
    preset = load_preset(config.preset).plain()
    unknown = [name for name in experiments if name not in config.experiments]
    if unknown:
        raise click.UsageError(
            f"{file}: there is no experiment {unknown[0]!r};"
            f" choose from {', '.join(config.experiments)}"
        )
    folder = results / file.stem
    planned = plan(config, preset, overrides, partial(parse, PARAMS))
    if unknown := sorted(set(names) - {run.name for run in planned}):
        raise click.UsageError(
            f"{file}: there is no run {unknown[0]!r}; choose from"
            f" {', '.join(run.name for run in planned)}"
        )
    runs = [run for run in planned if run.experiment in experiments or not experiments]
    runs = [run for run in runs if run.name in names or not names]
    done = [run for run in runs if run.is_done(folder)]
    waiting = [run for run in runs if run not in done]
    other = [run.result(folder) for run in waiting if run.result(folder).exists()]
    click.echo(f"{file}: {len(runs)} runs, {len(done)} done", err=list_them)
    if dry_run:
        click.echo("".join(f"  {run.result(folder)}\n" for run in waiting), nl=False)
    if dry_run or not waiting:
        return
    if other and not force:
        raise click.UsageError(
            f"{other[0]} was made with other settings ({len(other)} such files);"
            " add --force to replace it, or name another --results"
        )
    if list_them:
        options = [f"--results={results}", f"--scratch={scratch}", f"--jobs={jobs}"]
        options += [f"--set={text}" for text in settings] + ["--force"] * force
        for run in waiting:
            command = [sys.executable, str(CODE / "pipeline.py"), "study", str(file)]
            click.echo(shlex.join([*command, f"--run={run.name}", *options]))
        return
    threads, failed = max(1, torch.get_num_threads() // jobs), []
    root = scratch.resolve() / "study"
    with (
        Runner.open(root, folder.resolve(), threads, planned, shared=bool(names)) as runner,
        tqdm(total=len(waiting), desc=file.stem, unit="run", disable=None) as bar,
    ):
        for future in runner.run_all(waiting, jobs):
            try:
                click.echo(f"{future.result()}")
            except DataError as error:
                failed.append(error)
                click.echo(f"Failed: {error}", err=True)
            bar.update()
    if failed:
        raise DataError(
            folder, f"{len(failed)} of {len(waiting)} runs failed, the first because of {failed[0]}"
        )


@click.command(short_help="Compare the results of many runs, with intervals.")
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@option(
    "--class",
    "classes",
    multiple=True,
    help="Mean over this class; repeat for several. Means over all classes are shown, too.",
)
@option("--baseline", default="baseline", help="Variant that the others are compared with.")
@option(
    "--seed",
    "seeds",
    multiple=True,
    type=int,
    help="Only runs of this seed; repeat for several.",
)
@option(
    "--block-length",
    type=click.IntRange(1),
    default=1,
    help="Bootstrap block length in consecutive images; use about 20 for video.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for tables (.md, .csv, .json) and figures.",
)
def compare(
    results: tuple[Path, ...],
    classes: tuple[str, ...],
    baseline: str,
    seeds: tuple[int, ...],
    block_length: int,
    out: Path | None,
) -> None:
    """Compare the runs of RESULTS, result files of studies or folders of them, by variant.

    Differences are to the baseline of the same seed: mean, ± standard deviation over seeds, and
    the mean's 95% interval by a paired bootstrap over the test images, for the decoders of these
    seeds. Intervals are too narrow where images resemble their neighbours, as frames of a video
    do; --block-length corrects for this.

    Means are over the classes that the test images have. Runs on different data, or of decoders
    trained in other ways, are in separate tables. Where groups of runs differ in the number of
    training images only, --out also gets curve.png: the gain by number of training images.
    """
    from stages.studies import compare as comparison
    from stages.studies import tables

    if twice := [name for name in classes if classes.count(name) > 1]:
        raise click.UsageError(f"--class {twice[0]} is given twice")
    groups = comparison.read_groups(results, seeds)
    compared = comparison.compare(groups, classes, baseline, block_length)
    click.echo(tables.as_text(compared))
    for line in comparison.left_out(groups, baseline):
        click.echo(f"Left out: {line}", err=True)
    if out is not None:
        click.echo(f"\nwrote {', '.join(tables.write(compared, out))} into {out}")
