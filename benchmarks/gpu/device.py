"""The device that is measured, its precisions, and the sizes of the measurements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from benchmarks import train
from stages.common.runtime import allow_tf32

PRECISIONS = {"fp32": "no", "tf32": "tf32", "bf16": "bf16", "fp16": "fp16"}  # -> mixed_precision
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
DTYPES["fp16"] = torch.float16


@dataclass(frozen=True)
class Size:
    """How large everything is that the benchmarks compute.

    Attributes
    ----------
    training
        Widths and batch of the training steps; its backbone and feature maps apply everywhere.
    images
        Images of an extraction.
    samples
        Samples of the store that the loader reads.
    matrix
        Side of the matrices whose product is timed.
    megabytes
        Megabytes of a copy, 10^6 bytes each.
    seconds
        Seconds that a measurement takes, if three calls do not take longer.
    """

    training: train.Size
    images: int
    samples: int
    matrix: int
    megabytes: int
    seconds: float


SIZES = {
    "thesis": Size(replace(train.SIZES["thesis"], batch=32), 256, 128, 8192, 1024, 1.5),
    "lite": Size(train.SIZES["voc2012-lite"], 512, 256, 8192, 1024, 1.0),
    "small": Size(train.SIZES["small"], 4, 6, 64, 1, 0.01),
}


def require(name: str) -> torch.device:
    """Return the device; stop with one line where there is no such device.

    Raises
    ------
    SystemExit
        For ``cuda`` without a CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "PyTorch finds no CUDA device here, and these measurements need one; install a CUDA"
            " build of torch and the GPU's driver, or use --device cpu --size small"
        )
    return torch.device(name)


def precisions(device: torch.device) -> tuple[str, ...]:
    """Name the precisions that the device computes in; a CPU has no TF32 and no fp16."""
    return tuple(PRECISIONS) if device.type == "cuda" else ("fp32", "bf16")


@contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """Set the flags of cuDNN and cuBLAS as the training stages do, and restore them."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    allow_tf32(precision == "tf32")
    cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":  # ``make gpu-tests`` asks before it starts pytest
    require("cuda")
