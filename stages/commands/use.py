"""Commands that use a trained decoder: predict and evaluate."""

from __future__ import annotations

from pathlib import Path

import click

from stages.commands.options import device_option, option, weights_option, workers_option
from stages.common.windows import OVERLAP

decoder_argument = click.argument("decoder", type=click.Path(path_type=Path))


@click.command(short_help="Segment images with a trained decoder.")
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
    help="resize: whole images, resized as in training; "
    "slide: windows of the training's size over images at their resolution.",
)
@option(
    "--overlap",
    type=click.FloatRange(0, 0.9),
    default=OVERLAP,
    help="Least fraction of a window's side that neighbouring windows share.",
)
@option(
    "--scale",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    help="Factor by which images are resized before windows slide over them.",
)
@option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    help="Windows a batch.",
)
@option(
    "--overlay/--no-overlay",
    "overlays",
    default=True,
    help="Also write the classes in colour over the images.",
)
@option(
    "--probabilities",
    is_flag=True,
    help="Also write every class's probability at every pixel: large files.",
)
@weights_option
@option(
    "--backbone-weights",
    metavar="[default|FILE]",
    default="default",
    help="Value of extract.weights in training.",
)
@device_option
@workers_option
@click.option(
    "--force",
    is_flag=True,
    help="Replace predictions of another decoder, or with other options.",
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
    """Segment images with DECODER, a folder such as models/decoders/baseline-0.

    INPUT is an image, a folder (searched recursively) or a quoted pattern such as
    'photos/**/*.jpg'. For photos/a/1.jpg in the folder photos this writes

    \b
      OUT/masks/a/1.png          class indices, 0 the first class; the palette has their colours
      OUT/overlays/a/1.jpg       the classes in colour over the image
      OUT/probabilities/a/1.npz  with --probabilities: `probabilities`, float16
                                 (classes, height, width)
      OUT/classes.csv            names and colours by class index; legend.png shows them

    at the size of the image. After an interruption the same command resumes: finished images that
    did not change are skipped. Images that cannot be read are named at the end, with exit code 1;
    the others are done.
    """
    from stages.common.errors import DataError
    from stages.use.predict import run
    from stages.use.windows import View

    images, finished, failed = run(
        decoder,
        inputs,
        out=out,
        view=View(mode, overlap, scale),
        overlays=overlays,
        probabilities=probabilities,
        weights=weights,
        backbone_weights=backbone_weights,
        batch_size=batch_size,
        device=device,
        workers=workers,
        force=force,
    )
    for error in failed:
        click.echo(f"Failed: {error}", err=True)
    before = "all" if finished == images else finished
    were = f", {before} of them before" if finished else ""
    click.echo(f"{out}: {images - len(failed)} of {images} images segmented{were}")
    if failed:
        raise DataError(
            out, f"{len(failed)} of {images} images could not be read; the others are done"
        )


@click.command(short_help="Score a trained decoder on a feature store.")
@decoder_argument
@click.argument("store", type=click.Path(path_type=Path))
@option(
    "--class",
    "classes",
    metavar="NAME",
    multiple=True,
    help="Class of the mean IoU; repeat for several. Default: all.",
)
@option("--batch-size", type=click.IntRange(1), default=8, help="Samples a batch.")
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

    The store's features must come from the backbone, with the weights, that the decoder was trained
    on; its images, their size and their resize rule may differ.
    """
    from stages.use.evaluate import as_text, run, write

    evaluation = run(
        decoder,
        store,
        weights=weights,
        classes=classes,
        device=device,
        batch_size=batch_size,
        workers=workers,
    )
    click.echo(
        f"{evaluation.decoder} on {store}: {evaluation.samples} images\n\n{as_text(evaluation)}"
    )
    if out is not None:
        write(evaluation, out)
        click.echo(f"\nwrote {out}/evaluation.json and confusion.png")
