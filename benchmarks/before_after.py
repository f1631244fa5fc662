"""Draw images of a store, their masks, and the predictions of two decoders, in four rows."""

from __future__ import annotations

from pathlib import Path

import click
from PIL import Image

import featurestore
from stages.reporting.pictures import colour_masks
from stages.use import Segmenter

GAP = 8  # white pixels between pictures


@click.command(help=__doc__)
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--sample", "samples", type=int, multiple=True, default=range(6), show_default="0..5")
@click.option("--size", default=192, show_default=True, help="Side of a picture in pixels.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    before: Path, after: Path, store: Path, samples: tuple[int, ...], size: int, out: Path
) -> None:
    opened = featurestore.open(store)
    images = [opened.image(sample) for sample in samples]
    masks = [opened[sample].mask for sample in samples]
    predictions = [Segmenter.load(decoder).segment(images) for decoder in (before, after)]
    coloured = [
        [colour_masks(mask, opened.spec.palette) for mask in row] for row in (masks, *predictions)
    ]
    rows = [images, *coloured]
    figure = Image.new(
        "RGB", (len(samples) * (size + GAP) - GAP, len(rows) * (size + GAP) - GAP), "white"
    )
    for row, pictures in enumerate(rows):
        for column, pixels in enumerate(pictures):
            picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS)
            figure.paste(picture, (column * (size + GAP), row * (size + GAP)))
    figure.save(out, optimize=True)


if __name__ == "__main__":
    main()
