"""Options that commands share, and the parameters that all of them read."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

PRESETS = Path(__file__).parent.parent / "presets"

# Where each section of params.yaml is described: module, and the name of its type there.
SECTIONS = {
    "prepare": ("stages.prepare", "PrepareConfig"),
    "extract": ("stages.extract", "ExtractConfig"),
    "train_gan": ("stages.train_gan", "TrainGanConfig"),
    "train_decoder": ("stages.train_decoder", "TrainDecoderConfig"),
    "monitor": ("stages.gan.monitor", "MonitorConfig"),
    "variants": ("stages.augment.registry", "Variant"),
    "compare": ("stages.report", "CompareConfig"),
    "report": ("stages.report", "ReportConfig"),
}


def option(*names: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A click option that shows its default and its environment variable."""
    return click.option(*names, show_default=True, show_envvar="envvar" in settings, **settings)


params_option = option(
    "--params",
    type=click.Path(path_type=Path),
    default=Path("params.yaml"),
    envvar="FEATUREGAN_PARAMS",
    help="The parameters' file.",
)
scratch_option = option(
    "--scratch",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("scratch"),
    envvar="FEATUREGAN_SCRATCH",
    help="Folder for unfinished work, from which an interrupted stage goes on.",
)
workers_option = option(
    "--workers",
    type=click.IntRange(0, 256),
    default=2,
    envvar="FEATUREGAN_WORKERS",
    help="Threads that read, decode and check; results do not depend on it. 0: none beside the main one.",
)
download_option = option(
    "--download/--no-download",
    default=False,
    envvar="FEATUREGAN_DOWNLOAD",
    help="Get the data set into prepare.root first, if it is not there and its licence allows it (voc).",
)
device_option = option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    envvar="FEATUREGAN_DEVICE",
    help="Where networks run. auto: CUDA where there is one.",
)
weights_option = option(
    "--weights",
    type=click.Choice(["decoder", "decoder-best"]),
    default="decoder",
    help="decoder: of the last epoch; decoder-best: of the epoch with the best mIoU on val.",
)
cache_option = option(
    "--cache",
    type=click.Choice(["none", "host", "device"]),
    default="none",
    envvar="FEATUREGAN_CACHE",
    help="Where the features stay between epochs. none: in the files; host: in memory, decoded once; device: on the GPU.",
)
compile_option = option(
    "--compile/--no-compile",
    "compile",
    default=False,
    envvar="FEATUREGAN_COMPILE",
    help="Let torch.compile compile the networks: minutes at the start, faster steps after; results differ by rounding.",
)
shard_option = option(
    "--shard/--no-shard",
    "shard",
    default=False,
    envvar="FEATUREGAN_SHARD",
    help="Where several processes train: divide the GAN's weights over them (FSDP) in place of a copy for each.",
)
checkpoint_option = option(
    "--checkpoint-minutes",
    type=click.FloatRange(0),
    default=5.0,
    envvar="FEATUREGAN_CHECKPOINT_MINUTES",
    help="Keep the state of the training no more often than this. 0: after every step.",
)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of both training stages, under the names of ``Machine``'s fields."""
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


def load_params(path: Path, device: str = "auto") -> dict[str, Any]:
    """All sections of the parameters, each of its own type: every stage checks all of them, and its device, before it starts."""
    from stages.common.config import read_params
    from stages.common.runtime import check_device

    sections = check_params(read_params(path), str(path))
    check_device(device)
    return sections


def _draws(variant: Any) -> int:
    """How many generated samples of one mask a variant adds."""
    return max(
        (
            getattr(member, "ratio", 1)
            for member in getattr(variant, "of", (variant,))
            if member.needs_gan
        ),
        default=1,
    )


def check_features(sections: Mapping[str, Any], features: Path, splits: Sequence[str]) -> None:
    """Refuse stores that do not go with the parameters, before anything is trained on them.

    Raises
    ------
    ConfigError
        As :func:`check_classes` says.
    FeatureStoreError
        When a store is missing or damaged, or was extracted with other parameters.
    """
    from stages.extract import check_spec

    for split in splits:
        check_classes(sections, check_spec(sections["extract"], features / split).class_names)


def check_classes(sections: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Refuse parameters that do not go with a data set's classes.

    Raises
    ------
    ConfigError
        When the report is to be of others, or a variant of the comparison needs more of them.
    """
    from stages.common.errors import ConfigError

    for name in sections["report"].headline_classes:
        if name not in classes:
            raise ConfigError(
                "report.headline_classes",
                f"{name!r} is no class of this data set ({', '.join(classes)})",
            )
    for name in sections["compare"].names:
        needed = sections["variants"][name].needs_classes
        if len(classes) < needed:
            message = f"variant {name!r} needs {needed} classes, the background among them, found {len(classes)}; leave it out"
            raise ConfigError("compare.variants", message, expected=needed, actual=len(classes))


def check_params(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The parameters' plain values as objects, one a section.

    Raises
    ------
    ConfigError
        For the first key that is wrong.
    """
    from stages.common.config import parse_section
    from stages.common.errors import ConfigError

    for name in values:
        if name not in SECTIONS:
            raise ConfigError(
                str(name), f"unknown section in {where}; known are {', '.join(SECTIONS)}"
            )
    sections = {}
    for name, (module, kind) in SECTIONS.items():
        section: Any = getattr(importlib.import_module(module), kind)
        sections[name] = parse_section(
            values, name, dict[str, section] if name == "variants" else section
        )
    unknown = [name for name in sections["compare"].names if name not in sections["variants"]]
    if unknown:
        raise ConfigError(
            "compare.variants",
            f"{unknown[0]!r} is not described in variants ({', '.join(sections['variants'])})",
        )
    gan = sections["train_gan"]
    for name in sections["compare"].names:
        family = sections["variants"][name].needs_family
        if family not in (None, gan.family):
            raise ConfigError(
                "train_gan.family",
                f"variant {name!r} works with a {family} alone; set it to {family}",
            )
        if gan.family == "gan" and not gan.z_dim and _draws(sections["variants"][name]) > 1:
            message = "without noise all draws of a mask are equal; set it to 1, or train_gan.z_dim above 0"
            raise ConfigError(f"variants.{name}.ratio", message)
    joint = [
        name
        for name in sections["compare"].names
        if getattr(sections["variants"][name], "generator", None) == "joint"
    ]
    penalised = gan.r1_gamma or gan.adversarial_loss == "wasserstein-gp"
    if joint and penalised and sections["train_decoder"].mixed_precision == "fp16":
        message = f"fp16 does not go together with r1_gamma or adversarial_loss wasserstein-gp, and {joint[0]!r} trains the GAN on"
        raise ConfigError("train_decoder.mixed_precision", f"{message}; use bf16 or 'no'")
    if gan.image_encoder and not sections["extract"].store_images:
        raise ConfigError(
            "extract.store_images", "train_gan.image_encoder reads the images; set it to true"
        )
    mirrored = [
        name for name in sections["compare"].names if sections["variants"][name].needs_mirrored
    ]
    if mirrored and "hflip" not in sections["extract"].views:
        raise ConfigError(
            "extract.views",
            f"variant {mirrored[0]!r} reads mirrored images; set it to [identity, hflip]",
        )
    from stages.backbones.backbone import OUTPUT_STRIDE
    from stages.common.runtime import check_batch_divides
    from stages.train_gan import check_input_size

    for name in ("train_gan", "train_decoder"):
        check_batch_divides(
            sections[name].batch_size, 1, sections[name].gradient_accumulation, f"{name}.batch_size"
        )
    check_input_size(sections["extract"].input_size, OUTPUT_STRIDE)
    return sections
