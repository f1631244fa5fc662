"""The training loader: samples a second to the device, with each cache."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ceilings
from benchmarks.gpu.device import Size, synchronize
from benchmarks.gpu.stores import write_store
from featurestore.dataset import CACHES, FeatureLoader

COLUMNS = ("cache", "threads", "samples_per_s", "gb_per_s", "limit_gb_per_s", "to_limit")
EPOCHS = 5


def rows(device: torch.device, size: Size, scratch: Path) -> list[dict[str, Any]]:
    """Measure epochs of every cache, without the first.

    The limit is a transfer of pinned memory. For ``cache: device`` it is half of a copy's rate in
    the device's memory, because a copy counts each byte twice.
    """
    store = write_store(scratch / "store", size, size.samples)
    transfer = ceilings.pinned_rate(device, size, to_device=True)
    copy = ceilings.copy_rate(device, size) / 2
    sample_bytes = sum(store.gather(name, [0]).nbytes for name in ("features", "masks"))
    found = []
    for cache in CACHES:
        for workers in (1, 2, 4) if cache != "device" else (2,):
            loader = FeatureLoader(
                store,
                min(size.training.batch, size.samples),
                seed=0,
                drop_last=True,
                workers=workers,
                device=device,
                cache=cache,
            )
            rate = samples_per_second(loader, device)
            limit = copy if cache == "device" else transfer
            row = {
                "cache": cache,
                "threads": workers,
                "samples_per_s": rate,
                "gb_per_s": rate * sample_bytes / 1e9,
                "limit_gb_per_s": limit,
                "to_limit": rate * sample_bytes / 1e9 / limit,
            }
            found.append(row)
            del loader
    return found


def samples_per_second(loader: FeatureLoader, device: torch.device) -> float:
    """Measure the median epoch of a loader in samples a second; nothing computes with them."""
    seconds = []
    for epoch in range(EPOCHS + 1):
        start = time.perf_counter()
        samples = sum(len(batch) for batch in loader.epoch(epoch))
        synchronize(device)
        if epoch:  # the first reads the files and allocates pinned memory
            seconds.append(time.perf_counter() - start)
    return samples / statistics.median(seconds)
