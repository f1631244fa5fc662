"""What the benchmarks share: real images, a line about the machine, tables."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image

from stages.backbones.backbone import Backbone
from stages.backbones.build import build_backbone

SUFFIXES = (".jpg", ".jpeg", ".png")


def read_images(folder: Path, count: int, size: int) -> Iterator[np.ndarray]:
    """``count`` images of a folder as (size, size, 3) uint8, over again from the first where there are fewer."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"{folder}: no images here; name a folder that holds some with --folder")
    for number in range(count):
        with Image.open(files[number % len(files)]) as image:
            yield np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def backbone_for(name: str, scratch: Path) -> Backbone:
    """The named backbone; a ResNet gets random weights (no download), which do not change what it costs."""
    weights = "default"
    if name.startswith("resnet"):
        import torchvision

        torch.manual_seed(0)
        weights = str(scratch / f"{name}.pth")
        state = torchvision.models.get_model(name, weights=None).state_dict()
        for key in state:
            if key.endswith("bn3.weight"):
                state[key].fill_(
                    0.25
                )  # else the sum of so many random blocks leaves float16's range
        torch.save(state, weights)
    return build_backbone(name=name, weights=weights).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def read_back(files: list[Path]) -> None:
    """Drop files from the page cache and read them back: the kernel keeps them in the same way then, however they were written."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(1 << 20):
                pass


def machine() -> str:
    """One line: processor, threads, versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (
                line.split(":", 1)[1].strip()
                for line in cpuinfo.read_text().splitlines()
                if line.startswith("model name")
            ),
            model,
        )
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, numpy {np.__version__}, h5py {h5py.__version__}"
    return f"{model}, {torch.get_num_threads()} threads{device}; Python {platform.python_version()}, {versions}"


def report(rows: Sequence[dict[str, Any]], columns: Sequence[str], file: Path | None) -> None:
    """Print rows as a Markdown table, and write them as JSON where a file is named."""
    cells = [[_shown(row.get(column)) for column in columns] for row in rows]
    widths = [
        max(len(line[number]) for line in [list(columns), *cells]) for number in range(len(columns))
    ]
    for line in [list(columns), ["-" * width for width in widths], *cells]:
        print(
            "| "
            + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            + " |"
        )
    if file is not None:
        file.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 10 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
