"""Real images, a backbone, a line about the machine and tables, for all benchmarks."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import click
import h5py
import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter

from stages.backbones.backbone import Backbone
from stages.backbones.build import build_backbone
from stages.commands.options import load_preset
from stages.commands.params import PARAMS
from stages.common.config import parse, read_params
from stages.studies.plan import Run, StudyConfig, plan

SUFFIXES = (".jpg", ".jpeg", ".png")


def read_images(folder: Path, count: int, size: int) -> Iterator[np.ndarray]:
    """Yield ``count`` images of a folder as (size, size, 3) uint8; repeats them if need be."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"{folder}: no images here; name a folder that holds some with --folder")
    for number in range(count):
        with Image.open(files[number % len(files)]) as image:
            yield np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def backbone_for(name: str, scratch: Path) -> Backbone:
    """Build a backbone; a ResNet gets random weights, which need no download and cost as much."""
    weights = "default"
    if name.startswith("resnet"):
        import torchvision

        torch.manual_seed(0)
        weights = str(scratch / f"{name}.pth")
        state = torchvision.models.get_model(name, weights=None).state_dict()
        for key in state:
            if key.endswith("bn3.weight"):
                state[key].fill_(0.25)  # else the sum of the random blocks leaves float16's range
        torch.save(state, weights)
    backbone = build_backbone(name=name, weights=weights)
    return backbone.to(memory_format=torch.channels_last)


def find_run(study: Path, name: str, root: Path) -> Run:
    """Return a run of a study, with the data set in ``root``.

    Raises
    ------
    click.UsageError
        When the study has no such run.
    """
    config = parse(TypeAdapter(StudyConfig), read_params(study), "study")
    preset = load_preset(config.preset).plain()
    runs = plan(config, preset, {"prepare.root": str(root)}, partial(parse, PARAMS))
    for run in runs:
        if run.name == name:
            return run
    names = ", ".join(run.name for run in runs)
    raise click.UsageError(f"{study}: there is no run {name!r}; choose from {names}")


def read_back(files: list[Path]) -> None:
    """Drop files from the page cache and read them back, so that the kernel keeps all alike."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(1 << 20):
                pass


def machine() -> str:
    """Describe processor, threads and versions in one line."""
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
    python = f"Python {platform.python_version()}"
    return f"{model}, {torch.get_num_threads()} threads{device}; {python}, {versions}"


def report(rows: Sequence[Mapping[str, object]], columns: Sequence[str], file: Path | None) -> None:
    """Print rows as a Markdown table; with a file, also write them as JSON."""
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


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 10 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
