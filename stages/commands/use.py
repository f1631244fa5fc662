"""Commands that put a trained decoder to use."""

from __future__ import annotations

from pathlib import Path

import click

from stages.commands.options import device_option, option, weights_option, workers_option

decoder_argument = click.argument("decoder", type=click.Path(path_type=Path))


@click.command(short_help="Segment photographs with a trained decoder.")
@decoder_argument
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of the predictions.",
)
@option(
    "--mode",
    type=click.Choice(["resize", "slide"]),
    default="resize",
    help="resize: whole photographs, scaled as in training; slide: windows of the training's size over them at their own resolution.",
)
@option(
    "--overlap",
    type=click.FloatRange(0, 0.9),
    default=0.25,
    help="Share of a window's side that neighbours have in common, at least.",
)
@option(
    "--scale",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    help="Of the photographs before windows slide over them.",
)
@option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    help="Windows that pass the networks at once.",
)
@option(
    "--overlay/--no-overlay",
    "overlays",
    default=True,
    help="Write the classes in colour over the photographs, too.",
)
@option(
    "--probabilities",
    is_flag=True,
    help="Write every class's probability at every pixel, too: large files.",
)
@weights_option
@option(
    "--backbone-weights",
    metavar="[default|FILE]",
    default="default",
    help="What extract.weights was in training.",
)
@device_option
@workers_option
@click.option(
    "--force",
    is_flag=True,
    help="Replace predictions that were made with another decoder or in another way.",
)
def predict(
    decoder: Path,
    inputs: tuple[str, ...],
    out: Path,
    mode: str,
    overlap: float,
    scale: float,
    batch_size: int,
    overlays: bool,
    probabilities: bool,
    weights: str,
    backbone_weights: str,
    device: str,
    workers: int,
    force: bool,
) -> None:
    """Segment photographs with DECODER, a folder such as models/decoders/baseline-0.

    INPUT is a photograph, a folder (with all below it) or a quoted pattern such as 'photos/**/*.jpg'. Of photos/a/1.jpg in
    the folder photos this makes

    \b
      OUT/masks/a/1.png          class indices, 0 the first class, with the classes' colours as palette
      OUT/overlays/a/1.jpg       the classes in colour over the photograph
      OUT/probabilities/a/1.npz  with --probabilities: `probabilities`, float16 (classes, height, width)
      OUT/classes.csv            names and colours by class index; legend.png shows them

    all of the photograph's own size. Interrupt it, and the same command goes on: photographs that are finished and did not
    change are left out. Photographs that cannot be read are named at the end, with exit code 1; the others are done.
    """
    from stages.common.errors import DataError
    from stages.common.runtime import check_device
    from stages.use.predict import Predictions, find_photographs
    from stages.use.predict import predict as run
    from stages.use.segmenter import Segmenter
    from stages.use.windows import View

    view = View(mode, overlap, scale)
    check_device(device)
    jobs = find_photographs(inputs, out)
    predictions = Predictions.open(
        out,
        decoder=decoder,
        weights=weights,
        view=view,
        overlays=overlays,
        probabilities=probabilities,
        force=force,
    )
    waiting = [job for job in jobs if not predictions.is_finished(job)]
    failed: list[DataError] = []
    if waiting:
        segmenter = Segmenter.load(
            decoder, weights=weights, backbone_weights=backbone_weights, device=device
        )
        failed = run(
            waiting, predictions, segmenter, view=view, batch_size=batch_size, workers=workers
        )
    for error in failed:
        click.echo(f"Failed: {error}", err=True)
    before = len(jobs) - len(waiting)
    were = f", {before if waiting else 'all'} of them before" if before else ""
    click.echo(f"{out}: {len(jobs) - len(failed)} of {len(jobs)} photographs segmented{were}")
    if failed:
        raise DataError(
            out, f"{len(failed)} of {len(jobs)} photographs could not be read; the others are done"
        )


@click.command(short_help="Score a trained decoder on a feature store.")
@decoder_argument
@click.argument("store", type=click.Path(path_type=Path))
@option(
    "--class",
    "classes",
    metavar="NAME",
    multiple=True,
    help="Class of the mean IoU; several may be named. Default: all.",
)
@option(
    "--batch-size", type=click.IntRange(1), default=8, help="Samples that pass the decoder at once."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write evaluation.json and confusion.png here.",
)
@weights_option
@device_option
@workers_option
def evaluate(
    decoder: Path,
    store: Path,
    classes: tuple[str, ...],
    batch_size: int,
    out: Path | None,
    weights: str,
    device: str,
    workers: int,
) -> None:
    """Score DECODER, a folder such as models/decoders/baseline-0, on STORE, such as features/test.

    The store's features must come from the backbone, with the weights, that the decoder was trained on; its size, its photographs and
    how they were resized may differ.
    """
    from stages.use import evaluate as scoring

    found = scoring.evaluate_decoder(
        decoder,
        store,
        weights=weights,
        classes=classes,
        device=device,
        batch_size=batch_size,
        workers=workers,
    )
    click.echo(
        f"{found.decoder} on {store}: {found.samples} photographs\n\n{scoring.as_text(found)}"
    )
    if out is not None:
        scoring.write(found, out)
        click.echo(f"\nwrote {out}/evaluation.json and confusion.png")
