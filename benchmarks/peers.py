"""segmentation_models.pytorch's DeepLabV3+ against a decoder on cached features, in equal time.

    python -m benchmarks.peers STUDY --root FOLDER --run EXPERIMENT/VARIANT-SEED
        [--class NAME] [--minutes 4] [--json FILE]

All methods have the same images, splits, input size, batch size, schedule, device, threads and
pretrained encoder (EfficientNet-Lite0). The run of the study has the settings of ``cached``.

- ``cached``: ``extract`` once, then the decoder of the run on augmented features.
- ``smp frozen``, ``smp trained``: DeepLabV3+ with the library's defaults, a frozen or a trained
  encoder, AdamW, cross-entropy, and images that are flipped, cropped and recoloured in each step.

Each time of ``--minutes`` is a separate training, and its schedule of the learning rate ends with
the time. The time includes ``extract`` of the training images (``cached``), or reading and resizing
them once (``smp``): column ``setup_s``. It excludes ``prepare``, building networks, and evaluation,
``extract`` of the evaluated images included. mIoU is a fraction, over the classes that the
evaluated images show (``miou``) and over those of ``--class`` (``miou_named``).

The second table has, for the mIoU of each method after the longest time, the seconds after which
each method first reached it: those of the shortest training that did. ``pip install -e '.[bench]'``
installs the library.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks import common
from benchmarks.peer_methods import (
    METHODS,
    Cached,
    Machine,
    Peer,
    SegmentationModels,
    Task,
)
from featurestore.errors import OneLineError
from stages import prepare
from stages.backbones import efficientnet_lite0
from stages.commands.params import PARAMS
from stages.common.config import parse
from stages.data.manifest import (
    SUMMARY_NAME,
    read_manifest,
)
from stages.segmentation.metrics import mean_iou
from stages.studies.plan import Run


def measurable_run(study: Path, name: str, root: Path) -> Run:
    """Return a run of a study that this benchmark can measure, with the data set in ``root``.

    Raises
    ------
    click.UsageError
        When the study has no such run, or the benchmark cannot measure it.
    """
    run = common.find_run(study, name, root)
    params = parse(PARAMS, run.params)
    variant = params.variants[run.variant]
    measured = {
        "augmenter": (variant.augmenter, "none"),
        "view": (variant.view, "identity"),
        "backbone": (params.extract.backbone, efficientnet_lite0.NAME),
        "weights": (params.extract.weights, "default"),
        "resize": (params.extract.resize, "stretch"),
    }
    for key, (actual, expected) in measured.items():
        if actual != expected:
            message = f"{key} is {actual}, but only {expected} is measured; choose another run"
            raise click.UsageError(f"{study}: {name}: {message}")
    return run


def prepare_task(run: Run, split: str, folder: Path, workers: int) -> Task:
    """Check the images of a run as ``prepare`` does, and list them; ``split`` is scored."""
    params = parse(PARAMS, run.params)
    dataset = folder / "dataset"
    prepare.run(params.prepare, out=dataset, scratch=folder / "scratch", workers=workers)
    entries, classes = read_manifest(dataset)
    summary = json.loads((dataset / SUMMARY_NAME).read_text(encoding="utf-8"))
    train, scored = ([each for each in entries if each.split == name] for name in ("train", split))
    return Task(run, params, params.variants[run.variant], train, scored, classes, summary)


def measure(
    task: Task, methods: Sequence[Cached | SegmentationModels], minutes: float, named: list[str]
) -> Iterator[dict[str, Any]]:
    """Train each method for a time, and yield its row.

    Parameters
    ----------
    task, methods
        What is learned, and by what.
    minutes
        The time, ``setup_s`` included.
    named
        Classes of the second mean; empty: none.
    """
    tested = task.tested
    for method in methods:
        row = {
            "run": task.run.name,
            "images": len(task.train),
            "minutes": minutes,
            "method": method.name,
            "setup_s": method.setup_s,
        }
        seconds = 60 * minutes - method.setup_s
        if seconds <= 0:  # the time is too short for the first step
            yield {**row, "steps": 0, "seconds": method.setup_s, "miou": None, "miou_named": None}
            continue
        steps, elapsed = method.train(seconds, task.run.seed)
        iou = method.scores().iou
        yield {
            **row,
            "steps": steps,
            "seconds": method.setup_s + elapsed,
            "miou": mean_iou(iou, tested),
            "miou_named": mean_iou(iou, named) if named else None,
            "iou": iou,
        }


def first_times(rows: Sequence[dict[str, Any]], mean: str) -> list[dict[str, Any]]:
    """Find the first time after which each method reaches the final mIoU of each method.

    Parameters
    ----------
    rows
        What :func:`measure` yielded, in the order of time.
    mean
        Key of the mean: ``miou`` or ``miou_named``.

    Returns
    -------
    list of dict
        A row for each run and each final mIoU: seconds by method; None: never.
    """
    found = []
    for run in dict.fromkeys(row["run"] for row in rows):
        scored = [row for row in rows if row["run"] == run and row[mean] is not None]
        final = {row["method"]: row[mean] for row in scored}  # the last one of each method
        for goal, value in sorted(final.items(), key=lambda item: item[1]):
            reached = [row for row in reversed(scored) if row[mean] >= value]  # the first one last
            first = {row["method"]: row["seconds"] for row in reached}
            found.append({"run": run, "final mIoU of": goal, mean: value, **first})
    return found


@click.command(help=__doc__)
@click.argument("study", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="prepare.root.",
)
@click.option(
    "--run", "names", multiple=True, required=True, help="Run of the study; repeat for several."
)
@click.option(
    "--minutes",
    "times",
    multiple=True,
    type=click.FloatRange(0, min_open=True),
    default=(1, 2, 4, 8, 16),
    show_default=True,
    help="Time of a training; repeat for several.",
)
@click.option(
    "--method",
    "chosen",
    multiple=True,
    type=click.Choice(METHODS),
    default=METHODS,
    show_default=True,
    help="Method to measure; repeat for several.",
)
@click.option(
    "--class", "named", multiple=True, help="Mean over this class, too; repeat for several."
)
@click.option(
    "--split",
    type=click.Choice(["val", "test"]),
    default="test",
    show_default=True,
    help="Images that scores are computed on. val: to choose settings.",
)
@click.option("--smp-lr", type=float, default=1e-3, show_default=True, help="Of its decoder.")
@click.option(
    "--smp-encoder-lr", type=float, default=1e-4, show_default=True, help="Of its trained encoder."
)
@click.option(
    "--smp-width", type=click.IntRange(1), default=256, show_default=True, help="decoder_channels."
)
@click.option(
    "--smp-stride",
    type=click.Choice(["8", "16"]),
    default="16",
    show_default=True,
    help="encoder_output_stride.",
)
@click.option(
    "--smp-precision", type=click.Choice(["no", "bf16"]), default="bf16", show_default=True
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True)
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where features go; default: the system's.",
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(
    study: Path,
    root: Path,
    names: tuple[str, ...],
    times: tuple[float, ...],
    chosen: tuple[str, ...],
    named: tuple[str, ...],
    split: str,
    smp_lr: float,
    smp_encoder_lr: float,
    smp_width: int,
    smp_stride: str,
    smp_precision: str,
    device: str,
    workers: int,
    scratch: Path | None,
    file: Path | None,
) -> None:
    """Measure all methods on each run, and print two tables."""
    try:
        import segmentation_models_pytorch
    except ImportError:
        message = "segmentation_models_pytorch is not installed; run pip install -e '.[bench]'"
        raise click.ClickException(message) from None
    print(f"{common.machine()}, smp {segmentation_models_pytorch.__version__}\n", flush=True)
    machine = Machine(device, workers)
    peer = Peer(smp_lr, smp_encoder_lr, smp_width, int(smp_stride), smp_precision)
    rows: list[dict[str, Any]] = []
    for name in names:
        work = Path(tempfile.mkdtemp(prefix="peers-", dir=scratch))
        try:
            task = prepare_task(measurable_run(study, name, root), split, work, workers)
            unknown = [each for each in named if each not in task.tested]
            if unknown:
                shown = ", ".join(task.tested)
                raise click.UsageError(f"no image of {split} shows {unknown[0]!r}, only {shown}")
            methods = [
                Cached(task, machine, work)
                if method == "cached"
                else SegmentationModels(task, machine, peer, trained=method == "smp trained")
                for method in METHODS
                if method in chosen
            ]
            for minutes in sorted(times):
                for row in measure(task, methods, minutes, list(named)):
                    rows.append(row)
                    print(f"{name}, {row['method']}, {minutes:g} minutes", flush=True)
                    if file is not None:  # hours may follow
                        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        except OneLineError as error:
            raise click.ClickException(str(error)) from error
        finally:
            shutil.rmtree(work)
    print()
    means = ["miou", "miou_named"] if named else ["miou"]
    columns = ["run", "images", "minutes", "method", "setup_s", "seconds", "steps"]
    common.report(rows, [*columns, *means], file)
    print()
    methods_shown = [method for method in METHODS if method in chosen]
    mean = means[-1]
    common.report(first_times(rows, mean), ["run", "final mIoU of", mean, *methods_shown], None)


if __name__ == "__main__":
    main()
