"""A trace of some steps of the real training stages: top operators, and waits for the device."""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import TypeAdapter
from torch.autograd import DeviceType
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks.gpu.device import PRECISIONS, Size
from benchmarks.gpu.stores import write_store
from benchmarks.gpu.timing import Event, read_trace
from stages import train_decoder, train_gan
from stages.augment.registry import Variant
from stages.common.runtime import Machine, Precision
from stages.gan.monitor import MonitorConfig

OPTIMIZERS = {"gan": 2, "decoder": 1, "joint": 3}  # that take a step in each training step
WAIT, WARM_UP, STEPS = (
    4,
    2,
    4,
)  # steps before the profiler starts, until it counts, and in the trace
OPERATORS = 15
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
WARNING = re.compile("called a synchronizing CUDA operation")
OPERATOR_COLUMNS = ("operator", "calls_a_step", "device_ms_a_step", "host_ms_a_step")
WAIT_COLUMNS = ("wait", "inside", "calls_a_step", "ms_a_step")
LINE_COLUMNS = ("line", "calls_a_step")
TABLES = (("operator", OPERATOR_COLUMNS), ("wait", WAIT_COLUMNS), ("line", LINE_COLUMNS))
Row = dict[str, Any]


class TracedSteps:
    """Count training steps by the optimizers' steps, and profile some of them.

    The stages run as they are, with loader, logging and resumable state. A hook that PyTorch calls
    after each optimizer's step counts.

    Parameters
    ----------
    optimizers
        Optimizers that take a step in each training step.
    device
        Device of the training.
    file
        File of the Chrome trace.

    Attributes
    ----------
    operators
        Rows of :data:`OPERATOR_COLUMNS`, once the steps are over.
    lines
        Calls by the Python line that made the host wait for the device.
    """

    def __init__(self, optimizers: int, device: torch.device, file: Path) -> None:
        self.optimizers, self.file, self.cuda = optimizers, file, device.type == "cuda"
        self.calls, self.operators, self.lines = 0, list[Row](), Counter[str]()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        self.profiler = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=STEPS, repeat=1),
            on_trace_ready=self._finished,
            acc_events=True,
        )

    def __enter__(self) -> TracedSteps:
        self._hook = register_optimizer_step_post_hook(self._stepped)
        self._warnings = warnings.catch_warnings(record=True)
        self._caught = self._warnings.__enter__()
        warnings.simplefilter("always")
        self.profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._report_waits(False)
        self.profiler.__exit__(*error)
        self._warnings.__exit__(*error)
        self._hook.remove()
        for each in self._caught or ():
            if WARNING.search(str(each.message)):
                self.lines[f"{_short(each.filename)}:{each.lineno}"] += 1

    def _stepped(self, *_: object) -> None:
        self.calls += 1
        if self.calls % self.optimizers:
            return
        step = self.calls // self.optimizers
        if step in (WAIT + WARM_UP, WAIT + WARM_UP + STEPS):
            self._report_waits(step == WAIT + WARM_UP)
        self.profiler.step()

    def _report_waits(self, report: bool) -> None:
        """Let PyTorch warn, with the Python line, when the host waits for the device."""
        if self.cuda:
            torch.cuda.set_sync_debug_mode("warn" if report else "default")

    def _finished(self, profiler: profile) -> None:
        profiler.export_chrome_trace(str(self.file))
        key = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        averages = sorted(profiler.key_averages(), key=lambda each: -getattr(each, key))
        self.operators = [
            {
                "operator": each.key,
                "calls_a_step": each.count / STEPS,
                "device_ms_a_step": each.self_device_time_total / 1000 / STEPS,
                "host_ms_a_step": each.self_cpu_time_total / 1000 / STEPS,
            }
            for each in averages
            if each.device_type == DeviceType.CPU  # the others are the kernels of these operators
            and not each.key.startswith("ProfilerStep")
        ][:OPERATORS]


def run(
    device: torch.device, size: Size, kind: str, precision: str, file: Path, scratch: Path
) -> tuple[list[Row], list[Row], list[Row]]:
    """Trace some steps of ``train-gan`` or ``train-decoder`` on drawn features.

    Returns
    -------
    operators, waits, lines
        Rows of the operators that take longest, of the calls that wait for the device, and of the
        Python lines that made them. The last two are empty without a GPU.
    """
    samples = 2 * size.training.batch
    for split, count in (("train", samples), ("val", 2), ("test", 2)):
        write_store(scratch / "features" / split, size, count)
    repeats = -(-(WAIT + WARM_UP + STEPS + 1) // 2)  # an epoch is as long as the trace
    machine = Machine(device=device.type, checkpoint_minutes=60, scratch=scratch / "scratch")
    if kind == "joint":
        _train_gan(size, machine, scratch, precision, repeats=1)  # what the joint training resumes
    with TracedSteps(OPTIMIZERS[kind], device, file) as traced:
        if kind == "gan":
            _train_gan(size, machine, scratch, precision, repeats=repeats)
        else:
            _train_decoder(size, machine, scratch, precision, repeats, joint=kind == "joint")
    waits = list(waiting_calls(read_trace(file)))
    lines = [{"line": line, "calls_a_step": n / STEPS} for line, n in traced.lines.most_common()]
    return traced.operators, waits, lines


def _train_gan(
    size: Size, machine: Machine, scratch: Path, precision: str, *, repeats: int
) -> None:
    """Run the stage ``train-gan`` for one epoch, without monitor."""
    widths = size.training
    config = train_gan.TrainGanConfig(
        frozen_epochs=1,
        repeats=repeats,
        batch_size=widths.batch,
        z_dim=widths.z_dim,
        ngf=widths.ngf,
        spade_hidden=widths.hidden,
        ndf=widths.ndf,
        mixed_precision=cast(Precision, PRECISIONS[precision]),
    )
    train_gan.run(
        config,
        MonitorConfig(every=0),
        features=scratch / "features",
        out=scratch / "gan",
        metrics=scratch / "metrics" / "gan",
        logs=scratch / "logs",
        machine=machine,
    )


def _train_decoder(
    size: Size, machine: Machine, scratch: Path, precision: str, repeats: int, *, joint: bool
) -> None:
    """Run the stage ``train-decoder`` for one epoch: the baseline, or with the GAN."""
    config = train_decoder.TrainDecoderConfig(
        epochs=1,
        repeats=repeats,
        batch_size=size.training.batch,
        width=size.training.width,
        mixed_precision=cast(Precision, PRECISIONS[precision]),
    )
    variant = {"augmenter": "featuregan" if joint else "none"}
    train_decoder.run(
        config,
        TypeAdapter(Variant).validate_python(variant),
        MonitorConfig(every=0),
        name="traced",
        seed=0,
        features=scratch / "features",
        gan=scratch / "gan",
        out=scratch / "decoder",
        metrics=scratch / "metrics" / "decoder",
        logs=scratch / "logs",
        machine=machine,
    )


def waiting_calls(events: list[Event]) -> Iterator[Row]:
    """Summarise the calls of a trace that make the host wait for the device.

    Parameters
    ----------
    events
        Events of a Chrome trace. Only those within the profiled steps count: the profiler itself
        waits at its end.
    """
    steps = [
        event
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith("ProfilerStep")
    ]
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event["name"] in WAITING and any(_within(event, step) for step in steps):
            around = [each for each in operators if _encloses(each, event)]
            inner = max(around, key=lambda each: each["ts"], default={"name": ""})
            found[str(event["name"]), str(inner["name"])].append(float(event["dur"]))
    for (name, inside), durations in sorted(found.items(), key=lambda item: -sum(item[1])):
        yield {
            "wait": name,
            "inside": inside,
            "calls_a_step": len(durations) / STEPS,
            "ms_a_step": sum(durations) / 1000 / STEPS,
        }


def _within(event: Event, outer: Event) -> bool:
    return outer["ts"] <= event["ts"] and event["ts"] + event["dur"] <= outer["ts"] + outer["dur"]


def _encloses(operator: Event, event: Event) -> bool:
    return operator.get("tid") == event.get("tid") and _within(event, operator)


def _short(filename: str) -> str:
    """Return the end of a path, from the last folder of sources that it names."""
    for folder in ("stages", "featurestore", "benchmarks", "site-packages"):
        _, found, tail = filename.rpartition(f"/{folder}/")
        if found:
            return tail if folder == "site-packages" else f"{folder}/{tail}"
    return filename
