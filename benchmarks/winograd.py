"""Time Winograd's filtering against PyTorch's convolution, forward and backward, on the CPU.

    python -m benchmarks.winograd [--rounds 5] [--json FILE]

The shapes are those of the generator, at the widths of the thesis and of ``voc2012-lite``, in
float32. The last columns: whether the generator uses Winograd's filtering, and its largest error
against float64, as a fraction of the largest value.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from stages.common.runtime import make_accelerator
from stages.models.winograd import is_faster, winograd_conv2d

SHAPES = (  # batch, input channels, output channels, side
    (2, 1024, 2048, 32),
    (2, 1024, 1024, 32),
    (2, 1024, 1024, 16),
    (2, 1024, 1024, 8),
    (2, 128, 2048, 32),
    (16, 128, 320, 32),
    (16, 128, 128, 32),
    (16, 64, 256, 32),
)


def direct(x: Tensor, weight: Tensor) -> Tensor:
    """Compute PyTorch's convolution."""
    return F.conv2d(x, weight, padding=1)


def time_shape(shape: tuple[int, int, int, int], rounds: int) -> dict[str, object]:
    """Time one shape; seconds are medians over rounds."""
    batch, inputs, outputs, side = shape
    rng = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(size, generator=rng).to(memory_format=torch.channels_last)
        for size in (
            (batch, inputs, side, side),
            (outputs, inputs, 3, 3),
            (batch, outputs, side, side),
        )
    )
    x.requires_grad_()
    weight.requires_grad_()
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for convolve in (direct, winograd_conv2d):  # taking turns
            start = time.perf_counter()
            torch.autograd.grad(convolve(x, weight), (x, weight), gradient)
            if number:  # the first round warms up
                seconds.setdefault(convolve.__name__, []).append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    with torch.no_grad():
        exact = direct(x.double(), weight.double())
        error = (winograd_conv2d(x, weight) - exact).abs().max() / exact.abs().max()
    return {
        "shape": " x ".join(map(str, shape)),
        "direct": medians["direct"],
        "winograd": medians["winograd_conv2d"],
        "speedup": medians["direct"] / medians["winograd_conv2d"],
        "used": str(is_faster(x, weight, (1, 1), (1, 1))),
        "error": f"{error.item():.0e}",
    }


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(rounds: int, file: Path | None) -> None:
    """Time all shapes and print a table."""
    make_accelerator("cpu", "no")  # keeps freed memory, as in every stage
    print(f"{common.machine()}\n")
    common.report(
        [time_shape(shape, rounds) for shape in SHAPES],
        ("shape", "direct", "winograd", "speedup", "used", "error"),
        file,
    )


if __name__ == "__main__":
    main()
