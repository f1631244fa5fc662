"""Limits of the device: products of matrices, convolutions, copies and transfers."""

from __future__ import annotations

from typing import Any

import psutil
import torch
import torch.nn.functional as F

from benchmarks.gpu.device import DTYPES, Size, computing_in, precisions
from benchmarks.gpu.timing import measure

COLUMNS = ("what", "precision", "value", "unit")


def rows(device: torch.device, size: Size) -> list[dict[str, Any]]:
    """Measure all limits."""
    found: list[dict[str, Any]] = []

    def add(what: str, precision: str | None, value: float, unit: str) -> None:
        found.append({"what": what, "precision": precision, "value": value, "unit": unit})

    name, capacity = describe(device)
    add(f"memory of {name}", None, capacity / (1 << 30), "GiB")
    for precision in precisions(device):
        what = f"matrix product, {size.matrix} x {size.matrix}"
        add(what, precision, matmul_tflops(device, size, precision), "TFLOP/s")
    for precision in precisions(device):
        channels, side = convolution_shape(size)
        what = f"3 x 3 convolution, {channels} channels, {side} x {side}"
        add(what, precision, convolution_tflops(device, size, precision), "TFLOP/s")
    add("copy in the device's memory", None, copy_rate(device, size), "GB/s read and written")
    for to_device in (True, False):
        what = "host to device" if to_device else "device to host"
        for pinned in (True, False) if device.type == "cuda" else (False,):
            memory = "pinned" if pinned else "pageable"
            value = transfer_rate(device, size, to_device=to_device, pinned=pinned)
            add(f"{what}, {memory}", None, value, "GB/s")
    add("launch of an addition", None, launch_microseconds(device, size), "microseconds")
    return found


def describe(device: torch.device) -> tuple[str, int]:
    """Return name and bytes of memory of the device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    return "the CPU", psutil.virtual_memory().total


def matmul_tflops(device: torch.device, size: Size, precision: str) -> float:
    """Measure the rate of a product of square matrices in TFLOP/s."""
    side, dtype = size.matrix, DTYPES[precision]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    with computing_in(precision):
        timing = measure(lambda: torch.mm(left, right, out=out), device, size.seconds)
    return 2 * side**3 / (1e9 * timing.ms)


def convolution_shape(size: Size) -> tuple[int, int]:
    """Return channels and side of the widest convolution of the generator."""
    return 16 * size.training.ngf, size.training.side


def convolution_tflops(device: torch.device, size: Size, precision: str) -> float:
    """Measure the rate of a 3 x 3 convolution's forward pass, channels last, in TFLOP/s."""
    channels, side = convolution_shape(size)
    dtype, batch = DTYPES[precision], size.training.batch
    maps = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    maps, weight = (each.to(memory_format=torch.channels_last) for each in (maps, weight))
    with computing_in(precision), torch.no_grad():
        timing = measure(lambda: F.conv2d(maps, weight, padding=1), device, size.seconds)
    return 2 * batch * side**2 * channels**2 * 9 / (1e9 * timing.ms)


def copy_rate(device: torch.device, size: Size) -> float:
    """Measure a copy within the device's memory in GB/s; each byte is read and written."""
    source = torch.ones(size.megabytes * 10**6, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device, size.seconds)
    return 2 * len(source) / (1e6 * timing.ms)


def transfer_rate(device: torch.device, size: Size, *, to_device: bool, pinned: bool) -> float:
    """Measure a copy between the host's and the device's memory in GB/s."""
    host = torch.ones(size.megabytes * 10**6, dtype=torch.uint8, pin_memory=pinned)
    there = torch.ones(len(host), dtype=torch.uint8, device=device)
    source, target = (host, there) if to_device else (there, host)
    timing = measure(lambda: target.copy_(source, non_blocking=pinned), device, size.seconds)
    return len(host) / (1e6 * timing.ms)


def pinned_rate(device: torch.device, size: Size, *, to_device: bool) -> float:
    """Measure the fastest transfer: of pinned memory where there is a GPU."""
    pinned = device.type == "cuda"
    return transfer_rate(device, size, to_device=to_device, pinned=pinned)


def launch_microseconds(device: torch.device, size: Size, launches: int = 1000) -> float:
    """Measure the time that PyTorch needs for a tiny operation, in microseconds."""
    value = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(launches):
            value.add_(1)

    return 1000 * measure(launch, device, size.seconds).ms / launches
