"""Options that commands share, and the parameters that they read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

MOST_WORKERS = 8  # by default; more threads only hold more batches in memory

if TYPE_CHECKING:
    from stages.commands.params import Params

P = ParamSpec("P")
R = TypeVar("R")


def cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux; a scheduler may assign fewer than there are
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def option(*names: str, **settings: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a click option that shows its default and its environment variable."""
    shown = {"show_default": True, "show_envvar": "envvar" in settings}
    return click.option(*names, **{**shown, **settings})


params_option = option(
    "--params",
    "path",
    type=click.Path(path_type=Path),
    default=Path("params.yaml"),
    envvar="FEATUREGAN_PARAMS",
    help="File of the parameters.",
)
scratch_option = option(
    "--scratch",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("scratch"),
    envvar="FEATUREGAN_SCRATCH",
    help="Folder of unfinished work, from which an interrupted stage resumes.",
)
workers_option = option(
    "--workers",
    type=click.IntRange(0, 256),
    default=lambda: min(cores(), MOST_WORKERS),
    show_default=f"number of cores, at most {MOST_WORKERS}",
    envvar="FEATUREGAN_WORKERS",
    help="Threads of each pool that reads, decodes or checks; no result depends on it. 0: none.",
)
download_option = option(
    "--download/--no-download",
    default=False,
    envvar="FEATUREGAN_DOWNLOAD",
    help="Download the data set into prepare.root if it is missing and may be downloaded (voc).",
)
device_option = option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    envvar="FEATUREGAN_DEVICE",
    help="Device of the networks. auto: CUDA if there is a GPU.",
)
weights_option = option(
    "--weights",
    type=click.Choice(["decoder", "decoder-best"]),
    default="decoder",
    help="decoder: last epoch; decoder-best: epoch with the best mIoU on val.",
)
cache_option = option(
    "--cache",
    type=click.Choice(["none", "host", "device"]),
    default="none",
    envvar="FEATUREGAN_CACHE",
    help="Where features stay between epochs. none: in the files; host: in memory, decoded once; "
    "device: on the GPU.",
)
compile_option = option(
    "--compile/--no-compile",
    "compile",
    default=False,
    envvar="FEATUREGAN_COMPILE",
    help="Compile the networks with torch.compile: minutes at the start, faster steps after it; "
    "results differ by rounding.",
)
shard_option = option(
    "--shard/--no-shard",
    "shard",
    default=False,
    envvar="FEATUREGAN_SHARD",
    help="Divide the GAN's weights over several processes (FSDP), in place of a copy for each.",
)
checkpoint_option = option(
    "--checkpoint-minutes",
    type=click.FloatRange(0),
    default=5.0,
    envvar="FEATUREGAN_CHECKPOINT_MINUTES",
    help="Minutes between two checkpoints of a training. 0: after every step.",
)


def training_options(command: Callable[P, R]) -> Callable[P, R]:
    """Add the options of both training stages, named as the fields of ``Machine``."""
    options = (
        params_option,
        scratch_option,
        workers_option,
        device_option,
        cache_option,
        compile_option,
        shard_option,
        checkpoint_option,
    )
    for add in reversed(options):
        command = add(command)
    return command


def presets() -> dict[str, Path]:
    """Return the presets' files by name."""
    folder = Path(__file__).parent.parent / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_preset(name: str) -> Params:
    """Return the parameters of a preset.

    Raises
    ------
    click.UsageError
        When there is no preset of that name.
    """
    from stages.commands.params import read_preset

    if name not in presets():
        raise click.UsageError(f"unknown preset {name!r}; choose from {', '.join(presets())}")
    return read_preset(presets()[name])


def load_params(path: Path, device: str = "auto") -> Params:
    """Return the parameters; every command checks all of them, and its device, before it starts."""
    from stages.commands.params import PARAMS
    from stages.common.config import parse, read_params
    from stages.common.runtime import check_device

    params = parse(PARAMS, read_params(path))
    check_device(device)
    return params
