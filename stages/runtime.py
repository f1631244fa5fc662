"""What belongs to the machine: devices, processes, seeds, progress."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tqdm import tqdm

from stages.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("no", "bf16", "fp16")

Item = TypeVar("Item")


def check_device(device: str) -> None:
    """Refuse a device that this machine lacks.

    Raises
    ------
    ConfigError
        When CUDA is asked for and PyTorch finds none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        message = "PyTorch finds no CUDA device here; use --device cpu or auto, or install a CUDA build of torch and its driver"
        raise ConfigError("--device cuda", message, expected="cuda", found="cpu")


def make_accelerator(device: str, mixed_precision: str, **options: Any) -> Accelerator:
    """An accelerator on the device asked for; the rest (ranks, launchers) is accelerate's own environment.

    Raises
    ------
    ConfigError
        When the device is not there, or cannot compute in this precision.
    """
    check_device(device)
    cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if cpu and mixed_precision == "fp16":
        raise ConfigError("mixed_precision", "fp16 needs CUDA; use bf16 or no on the CPU", expected="no or bf16", found="fp16")
    # accelerate keeps the first accelerator's settings for the whole process; a notebook may run stages with others.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=cpu, mixed_precision=mixed_precision, **options)


def seed_everything(seed: int) -> None:
    """Seed the global generators: initial weights and dropout come from them, all other draws from generators of their own."""
    torch.manual_seed(seed)


def generator(device: torch.device, *seeds: int) -> torch.Generator:
    """A random generator of its own, for a purpose named by several numbers."""
    mixed = int.from_bytes(b"".join(number.to_bytes(8, "little") for number in seeds)[:24], "little")
    return torch.Generator(device).manual_seed(mixed % (2**63 - 25))


def progress(items: Iterable[Item], what: str, total: int, unit: str) -> tqdm[Item]:
    """A progress bar with rate and remaining time on a terminal; silent elsewhere."""
    return tqdm(items, what, total, unit=unit, disable=None, smoothing=0.1)


def write_json(path: Path, values: Any) -> None:
    """Write JSON-ready values, indented."""
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
