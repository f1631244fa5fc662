"""Commands of ``python -m benchmarks.gpu``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

import benchmarks.gpu
from benchmarks import common
from benchmarks.gpu import ceilings, extract, loader, loss, monitor, steps, trace
from benchmarks.gpu.device import PRECISIONS, SIZES, require

ORDER = ("ceilings", "loss", "loader", "extract", "monitor", "trace", "steps")
SPARE = 1.5  # minutes between the last row of ``steps`` and the end of ``all``
OPTIONS = (
    click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True),
    click.option(
        "--size",
        type=click.Choice(list(SIZES)),
        default="thesis",
        show_default=True,
        help="Widths and batches: of the thesis (24 GB), of the preset voc2012-lite, or tiny.",
    ),
)
JSON = click.option(
    "--json", "file", type=click.Path(path_type=Path), help="Write the rows here too."
)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all commands have."""
    for option in OPTIONS:
        command = option(command)
    return command


DOC = (benchmarks.gpu.__doc__ or "").replace("\n\n    ", "\n\n\b\n    ")  # click keeps these lines


@click.group(help=DOC)
def main() -> None:
    """Run one of the benchmarks."""


def _report(rows: Sequence[dict[str, Any]], columns: Sequence[str], file: Path | None) -> None:
    print(f"{common.machine()}\n", flush=True)
    common.report(rows, columns, file)


def _write(rows: Sequence[dict[str, Any]], file: Path) -> None:
    file.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")


@main.command("ceilings")
@options
@JSON
def ceilings_command(device: str, size: str, file: Path | None) -> None:
    """Measure the device's limits: arithmetic, memory, transfers, launches."""
    _report(ceilings.rows(require(device), SIZES[size]), ceilings.COLUMNS, file)


@main.command("extract")
@options
@JSON
def extract_command(device: str, size: str, file: Path | None) -> None:
    """Measure extraction by stage, in images a second."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = extract.rows(require(device), SIZES[size], Path(scratch))
    _report(rows, extract.COLUMNS, file)


@main.command("steps")
@options
@JSON
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=7.0,
    show_default=True,
    help="Begin no row after this time.",
)
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=True,
    help="Measure compiled steps.",
    show_default=True,
)
def steps_command(
    device: str, size: str, file: Path | None, minutes: float, compiled: bool
) -> None:
    """Measure steps of GAN, decoder and both: time, memory, idle fraction."""
    rows = []
    for row in steps.rows(require(device), SIZES[size], minutes=minutes, compiled=compiled):
        rows.append(row)
        if file is not None:  # after each row, so that a stopped run leaves what it has
            _write(rows, file)
    _report(rows, steps.COLUMNS, None)


@main.command("loader")
@options
@JSON
def loader_command(device: str, size: str, file: Path | None) -> None:
    """Measure the training loader with each cache, in samples a second."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = loader.rows(require(device), SIZES[size], Path(scratch))
    _report(rows, loader.COLUMNS, file)


@main.command("monitor")
@options
@JSON
def monitor_command(device: str, size: str, file: Path | None) -> None:
    """Measure the monitor of a GAN against the training between two measurements."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = monitor.rows(require(device), SIZES[size], Path(scratch))
    _report(rows, monitor.COLUMNS, file)


@main.command("loss")
@options
@JSON
def loss_command(device: str, size: str, file: Path | None) -> None:
    """Measure the cross-entropy of upsampled logits against PyTorch's functions."""
    _report(loss.rows(require(device), SIZES[size], size), loss.COLUMNS, file)


@main.command("trace")
@options
@JSON
@click.option(
    "--kind",
    type=click.Choice(steps.KINDS),
    default="joint",
    show_default=True,
    help="Training to trace.",
)
@click.option("--precision", type=click.Choice(list(PRECISIONS)), default="bf16", show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("trace.json"),
    show_default=True,
    help="File of the Chrome trace; ui.perfetto.dev shows it.",
)
def trace_command(
    device: str, size: str, file: Path | None, kind: str, precision: str, out: Path
) -> None:
    """Trace steps of a training stage; list top operators and waits for the device."""
    if device == "cpu" and precision in ("tf32", "fp16"):
        raise click.UsageError(f"--precision {precision} needs a GPU; use fp32 or bf16 on a CPU")
    where = require(device)
    with tempfile.TemporaryDirectory() as scratch:
        tables = trace.run(where, SIZES[size], kind, precision, out, Path(scratch))
    print(common.machine(), flush=True)
    for (_, columns), rows in zip(trace.TABLES, tables, strict=True):
        print()
        common.report(rows, columns, None)
    if file is not None:
        named = zip(trace.TABLES, tables, strict=True)
        rows = [{"table": name, **row} for (name, _), table in named for row in table]
        _write(rows, file)


@main.command("all")
@options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("gpu-benchmarks"),
    show_default=True,
    help="Folder of a table and a JSON file for each command, and the trace.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=8.0,
    show_default=True,
    help="Stop after this time; compiled steps, which come last, are left out first.",
)
def all_command(device: str, size: str, out: Path, minutes: float) -> None:
    """Run all commands, each in its own process, and write their tables and rows."""
    require(device)
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    failed = []
    for name in ORDER:
        left = deadline - time.monotonic()
        arguments = [name, "--device", device, "--size", size, "--json", f"{out / name}.json"]
        if name == "trace":
            arguments += ["--out", str(out / "trace-events.json")]
            if device == "cpu":
                arguments += ["--precision", "fp32"]
        if name == "steps":
            arguments += ["--minutes", str(max(left / 60 - SPARE, 0.1))]
        print(f"{name}\n", flush=True)
        try:
            table = _output_of(arguments, timeout=max(left, 0.0))
        except subprocess.TimeoutExpired:
            kept = f"; {out / 'steps.json'} has its finished rows" if name == "steps" else ""
            failed.append(f"{name} (out of time{kept})")
            continue
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr)
            failed.append(f"{name} (exit status {error.returncode})")
            continue
        print(table, flush=True)
        (out / f"{name}.txt").write_text(table, encoding="utf-8")
    if failed:
        raise SystemExit(f"these did not finish: {', '.join(failed)}; {out} has the others")


def _output_of(arguments: Sequence[str], timeout: float) -> str:
    """Run a command of this module in a process and return what it printed."""
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout)
    return run.stdout


if __name__ == "__main__":
    main()
