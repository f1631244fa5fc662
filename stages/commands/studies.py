"""Commands about many runs: make them, and compare them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from stages.commands.options import load_preset, option, scratch_option


def _setting(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, Any]:
    """``KEY=VALUE`` options as a dictionary, each value read as YAML."""
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
            raise click.BadParameter(
                f"the value of {key} is not valid YAML ({' '.join(str(error).split())})"
            ) from error
    return settings


@click.command(short_help="Train all decoders of a study that have no result yet.")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("results"),
    help="Where result files belong.",
)
@option(
    "--set",
    "overrides",
    multiple=True,
    callback=_setting,
    help="KEY=VALUE, such as prepare.root=FOLDER; any other changes results.",
)
@option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    help="Runs at a time; the threads (OMP_NUM_THREADS, or the cores) are divided among them.",
)
@click.option(
    "--experiment",
    "experiments",
    multiple=True,
    help="Only this one of the study's experiments; several may be named.",
)
@click.option("--force", is_flag=True, help="Replace results that were made with other settings.")
@click.option("--dry-run", is_flag=True, help="List what would run and stop.")
@scratch_option
def study(
    file: Path,
    results: Path,
    overrides: dict[str, Any],
    jobs: int,
    experiments: tuple[str, ...],
    force: bool,
    dry_run: bool,
    scratch: Path,
) -> None:
    """Train the decoders that FILE describes, each into a result file results/STUDY/EXPERIMENT/VARIANT-SEED.json.

    Runs that have their result file already are left out: interrupt it, and the same command goes on. A run that fails is
    named at the end; the others go on.
    """
    import torch
    from pydantic import TypeAdapter
    from tqdm import tqdm

    from stages.commands.params import PARAMS
    from stages.common.config import parse, read_params
    from stages.common.errors import DataError
    from stages.studies.plan import StudyConfig, plan
    from stages.studies.runner import Workshop

    config = parse(TypeAdapter(StudyConfig), read_params(file), "study")
    preset = load_preset(config.preset).plain()
    for name in experiments:
        if name not in config.experiments:
            raise click.UsageError(
                f"{file}: there is no experiment {name!r}; choose from {', '.join(config.experiments)}"
            )
    folder = results / file.stem
    runs = plan(config, preset, overrides, partial(parse, PARAMS))
    runs = [run for run in runs if run.experiment in experiments or not experiments]
    done = [run for run in runs if run.is_done(folder)]
    waiting = [run for run in runs if run not in done]
    click.echo(f"{file}: {len(runs)} runs, {len(done)} done")
    if dry_run:
        for run in waiting:
            click.echo(f"  {run.result(folder)}")
    if dry_run or not waiting:
        return
    other = [run.result(folder) for run in waiting if run.result(folder).exists()]
    if other and not force:
        message = f"{other[0]} was made with other settings ({len(other)} such files); add --force to replace it, or name another --results"
        raise click.UsageError(message)
    failed = []
    with (
        Workshop.open(
            scratch.resolve() / "study",
            folder.resolve(),
            max(1, torch.get_num_threads() // jobs),
            done,
        ) as workshop,
        tqdm(total=len(waiting), desc=file.stem, unit="run", disable=None) as bar,
    ):
        for future in workshop.work(waiting, jobs):
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
    help="Mean over this class, and others named so; means over all classes stand beside it.",
)
@option("--baseline", default="baseline", help="The variant that others are compared with.")
@option(
    "--seed",
    "seeds",
    multiple=True,
    type=int,
    help="Only runs of this seed, and of others named so.",
)
@option(
    "--block-length",
    type=click.IntRange(1),
    default=1,
    help="Draw so many test images together, next in name; of a video's frames some 20.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write tables (.md, .csv, .json) and pictures here.",
)
def compare(
    results: tuple[Path, ...],
    classes: tuple[str, ...],
    baseline: str,
    seeds: tuple[int, ...],
    block_length: int,
    out: Path | None,
) -> None:
    """Compare the runs of RESULTS, result files of studies or folders of them, variant by variant.

    Differences are to the baseline of the same seed: their mean, ± their standard deviation over seeds, and the mean's
    95% interval by a paired bootstrap over the test images, for the decoders of these seeds. Where images resemble their
    neighbours, as frames of a video do, --block-length keeps such intervals from being too narrow.
    Means are over the classes that the test images have. Runs on different data, or with decoders trained in other
    ways, are compared apart from each other. Where there are several numbers of training images, and one test
    split, --out also gets curve.png, the gain by their number.
    """
    from stages.studies import compare as comparison

    if twice := [name for name in classes if classes.count(name) > 1]:
        raise click.UsageError(f"--class {twice[0]} stands twice")
    groups = comparison.read_groups(results, seeds)
    tables = comparison.compare(groups, classes, baseline, block_length)
    click.echo(comparison.as_text(tables))
    for line in comparison.left_out(groups, baseline):
        click.echo(f"Left out: {line}", err=True)
    if out is not None:
        click.echo(f"\nwrote {', '.join(comparison.write(tables, out))} into {out}")
