"""Commands about many runs: make them, and compare them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from stages.commands.options import load_preset, option, scratch_option


def _settings(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, object]:
    """Parse ``KEY=VALUE`` options; each value is YAML."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    settings = {}
    for text in values:
        key, separator, value = text.partition("=")
        if not separator:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE")
        try:
            settings[key] = YAML(typ="safe", pure=True).load(value)
        except YAMLError as error:
            problem = " ".join(str(error).split())
            raise click.BadParameter(f"the value of {key} is not valid YAML ({problem})") from error
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
    "overrides",
    multiple=True,
    callback=_settings,
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
@click.option("--force", is_flag=True, help="Replace results that were made with other settings.")
@click.option("--dry-run", is_flag=True, help="List what would run and stop.")
@scratch_option
def study(
    file: Path,
    results: Path,
    overrides: dict[str, object],
    jobs: int,
    experiments: tuple[str, ...],
    force: bool,
    dry_run: bool,
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
    from stages.studies.runner import Runner

    config = parse(TypeAdapter(StudyConfig), read_params(file), "study")
    preset = load_preset(config.preset).plain()
    unknown = [name for name in experiments if name not in config.experiments]
    if unknown:
        raise click.UsageError(
            f"{file}: there is no experiment {unknown[0]!r};"
            f" choose from {', '.join(config.experiments)}"
        )
    folder = results / file.stem
    runs = plan(config, preset, overrides, partial(parse, PARAMS))
    runs = [run for run in runs if run.experiment in experiments or not experiments]
    done = [run for run in runs if run.is_done(folder)]
    waiting = [run for run in runs if run not in done]
    other = [run.result(folder) for run in waiting if run.result(folder).exists()]
    click.echo(f"{file}: {len(runs)} runs, {len(done)} done")
    if dry_run:
        click.echo("".join(f"  {run.result(folder)}\n" for run in waiting), nl=False)
    if dry_run or not waiting:
        return
    if other and not force:
        raise click.UsageError(
            f"{other[0]} was made with other settings ({len(other)} such files);"
            " add --force to replace it, or name another --results"
        )
    threads, failed = max(1, torch.get_num_threads() // jobs), []
    with (
        Runner.open(scratch.resolve() / "study", folder.resolve(), threads, done) as runner,
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
