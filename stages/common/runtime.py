"""What belongs to the machine: devices, processes, seeds, progress."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm import tqdm

import featurestore
from featurestore import FeatureStore, FeatureStoreError
from featurestore.files import write_atomically, writing
from featurestore.writer import clear_after_publication
from stages.common.distributed import gather, replicate, shard, synchronise_batch_norm
from stages.common.errors import ConfigError

Precision: TypeAlias = Literal["no", "tf32", "bf16", "fp16"]
GPU_PRECISIONS = ("tf32", "fp16")  # what a CPU does not compute in
Item = TypeVar("Item")
Network = TypeVar("Network", bound=nn.Module)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # glibc's malloc.h


@dataclass(frozen=True)
class Machine:
    """How this machine computes; results do not depend on it, up to rounding.

    Attributes
    ----------
    device
        ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
    workers
        Threads that read, decode and check.
    cache
        Where features stay between epochs: ``none`` (in the files), ``host`` or ``device``.
    compile
        Whether ``torch.compile`` compiles the networks.
    shard
        Whether several processes divide the GAN's weights (FSDP) instead of copying them.
    checkpoint_minutes
        Least time between two saved states; 0 saves after every step.
    scratch
        Folder of unfinished work, from which an interrupted stage resumes.
    """

    device: str = "auto"
    workers: int = 2
    cache: str = "none"
    compile: bool = False
    shard: bool = False
    checkpoint_minutes: float = 5.0
    scratch: Path = Path("scratch")


def check_device(device: str) -> None:
    """Refuse a device that this machine lacks.

    Raises
    ------
    ConfigError
        When CUDA is asked for and PyTorch finds none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        message = (
            "PyTorch finds no CUDA device here; use --device cpu or auto, or install a CUDA build"
            " of torch and its driver"
        )
        raise ConfigError("--device cuda", message, expected="cuda", actual="cpu")


def on_cpu(device: str) -> bool:
    """Return whether networks run on the CPU with this ``--device``."""
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def to_channels_last(network: Network, device: torch.device) -> Network:
    """Move a network to a device, with convolution weights in channels-last order."""
    channels_last = torch.channels_last  # torch's stubs lack the argument
    return network.to(device, memory_format=channels_last)  # type: ignore[call-overload]


def check_precision(device: str, mixed_precision: str, key: str) -> None:
    """Refuse a precision that the device cannot compute in.

    Raises
    ------
    ConfigError
        For fp16 and tf32 on the CPU.
    """
    if mixed_precision in GPU_PRECISIONS and on_cpu(device):
        message = f"{mixed_precision} needs a GPU; use bf16 or 'no' on the CPU"
        raise ConfigError(key, message, expected="cuda", actual="cpu")


def make_accelerator(device: str, mixed_precision: str, **options: Any) -> Accelerator:
    """Build an accelerator on a device; accelerate reads ranks and launchers from the environment.

    ``tf32`` is float32 here; :func:`allow_tf32` says how a GPU computes it.

    Raises
    ------
    ConfigError
        When the device is not there, or cannot compute in this precision.
    """
    check_device(device)
    check_precision(device, mixed_precision, "mixed_precision")
    _keep_freed_memory()
    cpu = on_cpu(device)
    # accelerate keeps the first settings for the whole process; a notebook may use others later.
    AcceleratorState._reset_state(reset_partial_state=True)
    mixed = "no" if mixed_precision == "tf32" else mixed_precision
    return Accelerator(cpu=cpu, mixed_precision=mixed, **options)


def allow_tf32(allowed: bool) -> None:
    """Choose how GPUs from Ampere on compute in float32: exactly, or with TF32's ten bits.

    PyTorch's default is TF32 for convolutions and float32 for products of matrices.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation instead of returning it to the system.

    By default every large tensor is mapped again, and its pages are zeroed, in every step: on two
    CPU cores this takes half of EfficientNet-Lite0's forward pass at 256 x 256. Other C libraries
    are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and sys.platform == "linux":
        # Older glibc takes no threshold above 32 MB; the other settings would freeze it at 128 KB.
        if mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 32 << 20):
            # Never: a large network frees more than 2^31 - 1 bytes, the largest threshold, a step.
            mallopt(M_TRIM_THRESHOLD, -1)
            mallopt(M_TOP_PAD, 64 << 20)
            mallopt(M_ARENA_MAX, 1)


def distribute(
    accelerator: Accelerator, network: nn.Module, *, compile: bool, sharded: bool = False
) -> nn.Module:
    """Move a network to the accelerator's device and return what training calls.

    One process calls the network itself. Several processes share batch statistics and average
    gradients: each has a copy (DistributedDataParallel) or, with ``sharded``, a part of the weights
    (FSDP).
    """
    if compile:
        network.compile()
    if sharded:  # FSDP needs weights in PyTorch's default layout
        return shard(synchronise_batch_norm(network).to(accelerator.device), accelerator.device)
    network.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if accelerator.num_processes == 1:
        return network
    return replicate(synchronise_batch_norm(network), accelerator.device)


def scaler_state(accelerator: Accelerator) -> dict[str, Any]:
    """Return the state of fp16's loss scale; empty for other precisions."""
    return {} if accelerator.scaler is None else accelerator.scaler.state_dict()


def load_scaler_state(accelerator: Accelerator, state: dict[str, Any]) -> None:
    """Restore what :func:`scaler_state` returned."""
    if accelerator.scaler is not None and state:
        accelerator.scaler.load_state_dict(state)


def check_batch_divides(batch_size: int, processes: int, micro_batches: int, key: str) -> None:
    """Refuse a batch that does not divide evenly over processes and micro-batches.

    Raises
    ------
    ConfigError
        When a micro-batch would not have the same number of samples, at least two, everywhere.
    """
    pieces = processes * micro_batches
    if batch_size % pieces or batch_size // pieces < 2:
        message = (
            f"{batch_size} samples do not divide into {processes} processes times {micro_batches}"
            " micro-batches of two or more samples;"
            f" choose a multiple of {pieces} from {2 * pieces} on"
        )
        raise ConfigError(key, message, expected=2 * pieces, actual=batch_size)


def source_digest(*modules: ModuleType) -> str:
    """Compute the sha256 of the source files of modules and packages."""
    sha = hashlib.sha256()
    for module in modules:
        file = Path(module.__file__ or "")
        for path in sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]:
            sha.update(path.read_bytes())
    return sha.hexdigest()


def seed_everything(*seeds: int) -> None:
    """Seed the global generators: of initial weights, dropout and image transforms."""
    torch.manual_seed(_mixed(seeds))


def generator(device: torch.device, *seeds: int) -> torch.Generator:
    """Build a random generator for a purpose that several numbers name."""
    return torch.Generator(device).manual_seed(_mixed(seeds))


def _mixed(seeds: tuple[int, ...]) -> int:
    """Mix several seeds into one; NumPy pads with zeros, so (7,) and (7, 0) give the same."""
    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device; the CPU does not wait for a GPU."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def progress(items: Iterable[Item], what: str, total: int, unit: str) -> tqdm[Item]:
    """Show a progress bar on a terminal, in the first process; silent elsewhere."""
    return tqdm(
        items, what, total, unit=unit, disable=None if first_process() else True, smoothing=0.1
    )


def verify_stores(*stores: FeatureStore, workers: int) -> None:
    """Compare every byte of stores with their indices before hours of training on them.

    Processes of one machine share the work; an error in one of them ends all.

    Raises
    ------
    FeatureStoreError
        When a byte differs, or cannot be read.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    rank = int(os.environ.get("LOCAL_RANK", "0")) % processes
    problem: FeatureStoreError | None = None
    try:
        for store in stores:
            verify_store(store, workers=workers, rank=rank, ranks=processes)
    except FeatureStoreError as error:
        problem = error
    if problems := [error for error in gather(problem) if error is not None]:
        raise problems[0]


def has_sound_store(path: Path, identity: str, scratch: Path, workers: int) -> bool:
    """Return whether ``path`` has a sound store of these inputs; clear leftovers in ``scratch``.

    Raises
    ------
    featurestore.StoreReadError, StoreBusyError
        When the store cannot be read here, which is no reason to replace it; when it is being
        written.
    """
    try:
        store = featurestore.open(path)
        if store.fingerprint != identity:
            return False
        verify_store(store, workers=workers)
    except featurestore.StoreReadError:
        raise
    except FeatureStoreError as problem:
        if path.exists():
            tqdm.write(f"{problem}: extracting it again")
        return False
    clear_after_publication(path, scratch)
    return True


def verify_store(store: FeatureStore, *, workers: int, rank: int = 0, ranks: int = 1) -> None:
    """Verify a store with a progress bar, if it takes longer than a second."""
    size = sum(record.bytes for record in store.records[rank::ranks])
    quiet = None if first_process() else True
    with tqdm(
        total=size,
        desc=f"verify: {store.path}",
        unit="B",
        unit_scale=True,
        disable=quiet,
        delay=1,
        leave=False,
    ) as bar:
        store.verify(workers=workers, progress=bar.update, rank=rank, ranks=ranks)


def first_process() -> bool:
    """Return whether this is the process that prints; launchers number them."""
    return int(os.environ.get("RANK", "0")) == 0


def write_json(path: Path, values: Any, indent: int | None = 1) -> None:
    """Write JSON-ready values, whole or not at all."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(values, indent=indent) + "\n").encode())
