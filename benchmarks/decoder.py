"""Time a decoder's training step against torchvision's head and PyTorch's cross-entropy.

    python -m benchmarks.decoder [--precision bf16] [--rounds 5] [--json FILE]

Both use equal weights and features, and take turns in one process; the median step counts.
A step of the baseline is timed: forward pass, backward pass, Adam.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from benchmarks import common
from featurestore import VOID
from stages.common.runtime import make_accelerator
from stages.models.decoder import Decoder
from stages.segmentation.upsampled_loss import upsampled_cross_entropy

CLASSES, STRIDE, RATES = 21, 8, (12, 24, 36)
SHAPES = (  # batch, channels, height, width, channels of the head
    (16, 320, 32, 32, 64),  # voc2012-lite
    (16, 320, 32, 44, 64),  # camvid-lite
    (4, 320, 64, 64, 64),  # images of 512 x 512
    (2, 2048, 32, 32, 256),  # the thesis's
)


def torchvision_head(decoder: Decoder, channels: int, width: int) -> nn.Module:
    """Build torchvision's head with the weights of a decoder."""
    layers = (copy.deepcopy(layer) for layer in list(decoder.head)[1:])
    head = nn.Sequential(ASPP(channels, list(RATES), width), *layers)
    head.load_state_dict(decoder.head.state_dict())
    return head


def plain_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Compute with PyTorch's functions what ``upsampled_cross_entropy`` computes.

    Parameters
    ----------
    logits
        (B, K, h, w), any float type.
    masks
        (B, H, W) uint8; 255 is left out.
    """
    fine = F.interpolate(logits.float(), size=masks.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(fine, masks.long(), ignore_index=VOID)


def time_shape(
    shape: tuple[int, int, int, int, int], precision: str, rounds: int
) -> dict[str, object]:
    """Time one shape; seconds are medians over rounds."""
    batch, channels, height, across, width = shape
    accelerator = make_accelerator("cpu", precision)
    rng = torch.Generator().manual_seed(0)
    features = (
        torch.randn(batch, channels, height, across, generator=rng)
        .relu()
        .to(memory_format=torch.channels_last)
    )
    masks = torch.randint(
        0, CLASSES, (batch, height * STRIDE, across * STRIDE), generator=rng, dtype=torch.uint8
    )
    decoder = Decoder(
        head="deeplab", in_channels=channels, num_classes=CLASSES, width=width, atrous_rates=RATES
    )

    def step(network: nn.Module, loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = torch.optim.Adam(network.parameters(), 5e-4, fused=True)

        def take() -> None:
            with accelerator.autocast():
                logits = network(features)
            optimizer.zero_grad()
            loss(logits).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return take

    steps = {
        "torchvision": step(
            torchvision_head(decoder, channels, width),
            lambda logits: plain_cross_entropy(logits, masks),
        ),
        "decoder": step(decoder, lambda logits: upsampled_cross_entropy(logits, masks)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, take in steps.items():  # taking turns
            start = time.perf_counter()
            take()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    shown = f"{batch} x {channels} x {height} x {across}, {width}"
    return {
        "shape": shown,
        "precision": precision,
        **medians,
        "speedup": medians["torchvision"] / medians["decoder"],
    }


@click.command(help=__doc__)
@click.option("--precision", type=click.Choice(["no", "bf16"]), default="bf16", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(precision: str, rounds: int, file: Path | None) -> None:
    """Time all shapes and print a table."""
    print(f"{common.machine()}\n")
    rows = [time_shape(shape, precision, rounds) for shape in SHAPES]
    common.report(rows, ("shape", "precision", "torchvision", "decoder", "speedup"), file)


if __name__ == "__main__":
    main()
