"""The command that exports a trained decoder to other programs."""

from __future__ import annotations

from pathlib import Path

import click

from stages.commands.options import weights_option

FORMATS = ("torchvision", "torch-export", "onnx")


@click.command(short_help="Write a decoder with its backbone as one file for other programs.")
@click.argument("decoder", type=click.Path(path_type=Path))
@click.option("--format", type=click.Choice(FORMATS), required=True, help="What reads the file.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The file: .pth or .safetensors, .pt2, .onnx.",
)
@click.option(
    "--backbone-weights",
    default="default",
    show_default=True,
    help="Value of extract.weights: `default`, or the file of a state dict.",
)
@click.option(
    "--size",
    type=click.IntRange(1),
    nargs=2,
    metavar="H W",
    help="Only images of this size. Default: any size; for transformers and several layers, the "
    "size of training.",
)
@click.option(
    "--scores",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of test.json (train-decoder) or evaluation.json (evaluate) for the model card. "
    "Default: the project's metrics/NAME.",
)
@weights_option
@click.option("--force", is_flag=True, help="Replace existing files.")
def export(
    decoder: Path,
    format: str,
    out: Path,
    backbone_weights: str,
    size: tuple[int, int] | None,
    scores: Path | None,
    weights: str,
    force: bool,
) -> None:
    """Write DECODER, a folder that train-decoder wrote, with its backbone as one file.

    The file takes images and returns logits of every pixel. Its logits are compared with PyTorch's
    before the file gets its name. Beside the file, a model card with suffix .md states classes,
    sizes, backbone, training and scores.
    """
    for path in (out, out.with_suffix(".md")):
        if path.exists() and not force:
            raise click.UsageError(f"{path} is there already; add --force to replace it")
    from stages.use.export import run

    done = run(
        decoder,
        format=format,
        out=out,
        backbone_weights=backbone_weights,
        weights=weights,
        size=size,
        scores=scores,
    )
    sizes = " and ".join(f"{height} x {width}" for height, width in done.sizes)
    click.echo(f"{out}: {done.bytes / 1e6:.1f} MB, checked at {sizes}")
    difference = f"differ from PyTorch's by {done.difference:.1e} at most"
    click.echo(f"its logits, up to {done.largest:.3g}, {difference}")
    click.echo(f"{done.card}: its model card")
