"""Time, memory and idle fraction of calls on a device."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.device import synchronize

FEWEST, MOST, WARM_UP = 3, 50, 2  # calls
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the profiler's trace
MIB = 1 << 20
Event = dict[str, Any]  # one event of a Chrome trace: name, cat, ts and dur in microseconds


@dataclass(frozen=True)
class Timing:
    """What :func:`measure` found.

    Attributes
    ----------
    ms
        Median milliseconds of a call.
    peak_mib
        Largest allocated memory of the device in MiB; None on a CPU.
    added_mib
        The part of it that was not allocated before the calls; None on a CPU.
    """

    ms: float
    peak_mib: float | None
    added_mib: float | None


def measure(call: Callable[[], object], device: torch.device, seconds: float) -> Timing:
    """Time a call on a device, after two calls to warm up.

    CUDA events mark begin and end of each call on the device, so that nothing waits between calls,
    as in training.

    Parameters
    ----------
    call
        The call.
    device
        Where it computes.
    seconds
        Time to spend; at least 3 and at most 50 calls are made.
    """
    for _ in range(WARM_UP):
        call()
    synchronize(device)
    start = time.perf_counter()
    before = _reset_memory(device)
    call()
    synchronize(device)
    once = time.perf_counter() - start
    calls = min(max(int(seconds / max(once, 1e-9)), FEWEST), MOST)
    times = _event_times(call, calls) if device.type == "cuda" else _wall_times(call, calls)
    if device.type != "cuda":
        return Timing(statistics.median(times), None, None)
    peak = torch.cuda.max_memory_allocated(device)
    return Timing(statistics.median(times), peak / MIB, (peak - before) / MIB)


def _event_times(call: Callable[[], object], calls: int) -> list[float]:
    """Time calls by CUDA events, in milliseconds."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _wall_times(call: Callable[[], object], calls: int) -> list[float]:
    """Time calls by the clock, in milliseconds."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times


def _reset_memory(device: torch.device) -> int:
    """Reset the peak of the device's memory and return the bytes allocated now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def free_memory(device: torch.device) -> None:
    """Free what deleted networks and compiled code hold, so that the next peak excludes it."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and the import takes a second
        torch.compiler.reset()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def idle_fraction(
    call: Callable[[], object], device: torch.device, ms: float, calls: int = 3
) -> float | None:
    """Measure the fraction of a call in which the device computes and copies nothing.

    The profiler slows the host, not the kernels. The kernels' time is therefore compared with
    the time of a call without the profiler.

    Parameters
    ----------
    call, device
        As in :func:`measure`, and already warm.
    ms
        Milliseconds of a call without the profiler.
    calls
        Calls to profile.

    Returns
    -------
    float or None
        0..1; None on a CPU, and where the profiler saw no kernel.
    """
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        synchronize(device)
    busy = union_ms(device_intervals(trace_events(profiler))) / calls
    return max(0.0, 1 - busy / ms) if busy else None


def trace_events(profiler: profile) -> list[Event]:
    """Return a profiler's events as its Chrome trace has them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(path)


def read_trace(path: Path) -> list[Event]:
    """Read the events of a Chrome trace that have a duration."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def device_intervals(events: Iterable[Event]) -> list[tuple[float, float]]:
    """List begin and end of what ran on the device, in microseconds."""
    return [
        (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in events
        if event.get("cat") in ON_DEVICE
    ]


def union_ms(intervals: Iterable[tuple[float, float]]) -> float:
    """Sum intervals of microseconds to milliseconds; what overlaps counts once."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total / 1000
