"""What belongs to the machine: devices, processes, seeds, progress."""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tqdm import tqdm

from stages.errors import ConfigError

Item = TypeVar("Item")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # of glibc's malloc.h


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
    _keep_freed_memory()
    cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    # accelerate keeps the first accelerator's settings for the whole process; a notebook may run stages with others.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=cpu, mixed_precision=mixed_precision, **options)


def _keep_freed_memory() -> None:
    """Let glibc keep memory that is freed, for the next allocation, instead of giving it back to the system.

    By default every large tensor is mapped anew, and each of its pages zeroed, in every step: on two CPU cores that
    is half of EfficientNet-Lite0's forward pass at 256 x 256. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and sys.platform == "linux":
        # Older glibc takes no threshold above 32 MB; setting the others alone would freeze it at 128 KB.
        if mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 32 << 20):
            mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
            mallopt(M_TOP_PAD, 64 << 20)
            mallopt(M_ARENA_MAX, 1)


def refuse_several_processes(accelerator: Accelerator) -> None:
    """Stop a launcher's second process before it disturbs the first.

    Raises
    ------
    ConfigError
        When there is more than one process.
    """
    if accelerator.num_processes > 1:
        message = "this stage runs in one process; start it without a launcher (extract takes several)"
        raise ConfigError("torchrun", message, expected=1, found=accelerator.num_processes)


def source_digest(*modules: ModuleType) -> str:
    """sha256 of the source files of modules, and of all files below packages: unfinished work of other code is never taken over."""
    sha = hashlib.sha256()
    for module in modules:
        file = Path(module.__file__ or "")
        for path in sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]:
            sha.update(path.read_bytes())
    return sha.hexdigest()


def seed_everything(seed: int) -> None:
    """Seed the global generators: initial weights and dropout come from them, all other draws from generators of their own."""
    torch.manual_seed(seed)


def generator(device: torch.device, *seeds: int) -> torch.Generator:
    """A random generator of its own, for a purpose named by several numbers."""
    mixed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(mixed)


def progress(items: Iterable[Item], what: str, total: int, unit: str) -> tqdm[Item]:
    """A progress bar with rate and remaining time on a terminal; silent elsewhere."""
    return tqdm(items, what, total, unit=unit, disable=None, smoothing=0.1)


def write_json(path: Path, values: Any) -> None:
    """Write JSON-ready values, indented."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
