"""The command line: one command a stage, and a few to look at what the stages made.

``dvc repro`` calls these commands in order and only where something changed.
Nothing heavy is imported before a command runs, so ``--help`` is instant.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

DATASET, FEATURES, GAN, DECODERS = Path("dataset"), Path("features"), Path("models/gan"), Path("models/decoders")
METRICS, REPORTS, LOGS = Path("metrics"), Path("reports"), Path("logs")
PRESETS = Path(__file__).parent / "presets"

# Where each section of params.yaml is described: module, and the name of its type there.
SECTIONS = {
    "prepare": ("stages.prepare", "PrepareConfig"),
    "extract": ("stages.extract", "ExtractConfig"),
    "train_gan": ("stages.train_gan", "TrainGanConfig"),
    "train_decoder": ("stages.train_decoder", "TrainDecoderConfig"),
    "monitor": ("stages.monitor", "MonitorConfig"),
    "variants": ("stages.train_decoder", "VariantConfig"),
    "compare": ("stages.report", "CompareConfig"),
    "report": ("stages.report", "ReportConfig"),
}


class Pipeline(click.Group):
    """Lists commands in the order of the stages, and turns the project's own errors into one line.

    The exit code is 2 for parameters and options, 1 for data.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order in which they are defined."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            from featurestore.errors import FeatureStoreError
            from stages.errors import CollapseError, ConfigError, DataError

            if not isinstance(error, (CollapseError, ConfigError, DataError, FeatureStoreError)):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2 if isinstance(error, ConfigError) else 1)


def option(*names: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A click option that shows its default and its environment variable."""
    return click.option(*names, show_default=True, show_envvar="envvar" in settings, **settings)


params_option = option(
    "--params", type=click.Path(path_type=Path), default=Path("params.yaml"), envvar="FEATUREGAN_PARAMS", help="The parameters' file."
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
device_option = option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    envvar="FEATUREGAN_DEVICE",
    help="Where networks run. auto: CUDA where there is one.",
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
    "compile_networks",
    default=False,
    envvar="FEATUREGAN_COMPILE",
    help="Let torch.compile compile the networks: minutes at the start, faster steps after; results differ by rounding.",
)
shard_option = option(
    "--shard/--no-shard",
    "sharded",
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
    """The options of both training stages, under the names of what their ``run`` takes."""
    options = (params_option, scratch_option, workers_option, device_option, cache_option, compile_option, shard_option, checkpoint_option)
    for add in reversed(options):
        command = add(command)
    return command


def load_params(path: Path, device: str = "auto") -> dict[str, Any]:
    """All sections of the parameters, each of its own type: every stage checks all of them, and its device, before it starts."""
    from stages.config import parse_section, read_params
    from stages.errors import ConfigError

    values = read_params(path)
    for name in values:
        if name not in SECTIONS:
            raise ConfigError(str(name), f"unknown section in {path}; known are {', '.join(SECTIONS)}")
    sections = {}
    for name, (module, kind) in SECTIONS.items():
        section: Any = getattr(importlib.import_module(module), kind)
        sections[name] = parse_section(values, name, dict[str, section] if name == "variants" else section)
    unknown = [name for name in sections["compare"].variants if name not in sections["variants"]]
    if unknown:
        raise ConfigError("compare.variants", f"{unknown[0]!r} is not described in variants ({', '.join(sections['variants'])})")
    from stages.models.backbone import OUTPUT_STRIDE
    from stages.runtime import check_device
    from stages.train_gan import check_input_size

    check_input_size(sections["extract"].input_size, OUTPUT_STRIDE)
    check_device(device)
    return sections


@click.group(cls=Pipeline, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="featuregan", message="%(package)s %(version)s")
def main() -> None:
    """FeatureGAN: cache a frozen backbone's features, learn to generate more of them, train a better decoder.

    The stages run in this order; `dvc repro` runs those whose inputs changed:

    \b
      prepare        photographs and masks        -> dataset/
      extract        frozen backbone, once        -> features/{train,val,test}/
      train-gan      FeatureGAN alone             -> models/gan/
      train-decoder  one variant, one seed        -> models/decoders/VARIANT-SEED/
      report         tables, curves, pictures     -> reports/

    What is computed is in params.yaml (`init` writes one); options say how this machine computes it.
    """


@main.command(short_help="Write params.yaml from a preset.")
@click.argument("preset", required=False)
@click.option("--list", "list_them", is_flag=True, help="List the presets and stop.")
@click.option("--force", is_flag=True, help="Replace a params.yaml that is there.")
@params_option
def init(preset: str | None, list_them: bool, force: bool, params: Path) -> None:
    """Write params.yaml from PRESET (quickstart, if none is named)."""
    presets = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if list_them:
        for name, path in presets.items():
            first = path.read_text(encoding="utf-8").splitlines()[0]
            click.echo(f"{name:16} {first.removeprefix('# ')}")
        return
    name = preset or "quickstart"
    if name not in presets:
        raise click.UsageError(f"unknown preset {name!r}; choose from {', '.join(presets)}")
    if params.exists() and not force:
        raise click.UsageError(f"{params} is there already; add --force to replace it")
    shutil.copyfile(presets[name], params)
    click.echo(f"wrote {params} from preset {name}; next: `dvc repro`, or `python pipeline.py prepare`")


@main.command(short_help="Find or draw photographs and masks; check them all.")
@params_option
@scratch_option
@workers_option
def prepare(params: Path, scratch: Path, workers: int) -> None:
    """Find or draw the photographs and masks, check every one, write dataset/manifest.csv."""
    sections = load_params(params)
    from stages.prepare import run

    summary = run(sections["prepare"], out=DATASET, scratch=scratch, workers=workers)
    sizes = ", ".join(f"{split} {part['images']}" for split, part in summary["splits"].items())
    click.echo(f"{DATASET}: {summary['images']} photographs ({sizes}), {len(summary['classes'])} classes, all checked")


@main.command(short_help="Cache the frozen backbone's features.")
@params_option
@scratch_option
@workers_option
@device_option
def extract(params: Path, scratch: Path, workers: int, device: str) -> None:
    """Run the frozen backbone once over every photograph; write features and masks to features/."""
    # Before PyTorch is loaded: its threads must not spin for work while others decode and write.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sections = load_params(params, device)
    from stages.extract import run

    stores = run(sections["extract"], dataset=DATASET, out=FEATURES, scratch=scratch, device=device, workers=workers)
    for store in stores.values():
        size = sum(record.bytes for record in store.records)
        click.echo(f"{store.path}: {len(store)} samples of {' x '.join(map(str, store.spec.feature_shape))}, {size / 1e6:.1f} MB")


@main.command("train-gan", short_help="Train FeatureGAN on cached features.")
@training_options
def train_gan(params: Path, **machine: Any) -> None:
    """Train FeatureGAN alone on the cached features (Algorithm 1, the first frozen_epochs epochs)."""
    sections = load_params(params, machine["device"])
    from stages.extract import check_spec
    from stages.runtime import first_process
    from stages.train_gan import run

    for split in ("train", "val"):
        check_spec(sections["extract"], FEATURES / split)
    losses = run(
        sections["train_gan"],
        sections["monitor"],
        features=FEATURES,
        out=GAN,
        metrics=METRICS / "train-gan",
        logs=LOGS,
        **machine,
    )
    if not first_process():
        return
    shown = ", ".join(f"{name} {value:.3f}" for name, value in losses.items() if "/class_consistency/" not in name)
    click.echo(f"{GAN}: {shown}")


@main.command("train-decoder", short_help="Train one decoder, alone or with the GAN.")
@click.option("--variant", required=True, help="Name of an entry of `variants` in the parameters.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of initial weights, order and noise.")
@training_options
def train_decoder(variant: str, seed: int, params: Path, **machine: Any) -> None:
    """Train one decoder: VARIANT baseline on real features alone, the others on generated ones too."""
    sections = load_params(params, machine["device"])
    if variant not in sections["variants"]:
        raise click.UsageError(f"unknown variant {variant!r}; {params} describes {', '.join(sections['variants'])}")
    from stages.extract import check_spec
    from stages.runtime import first_process
    from stages.train_decoder import run

    for split in ("train", "val", "test"):
        check_spec(sections["extract"], FEATURES / split)
    name = f"{variant}-{seed}"
    scores = run(
        sections["train_decoder"],
        sections["variants"][variant],
        sections["monitor"],
        name=variant,
        seed=seed,
        features=FEATURES,
        gan=GAN,
        out=DECODERS / name,
        metrics=METRICS / name,
        logs=LOGS,
        **machine,
    )
    if not first_process():
        return
    absent = f" (absent from test: {', '.join(scores.absent)})" if scores.absent else ""
    click.echo(f"{DECODERS / name}: test PA {100 * scores.pixel_accuracy:.2f}, mIoU {100 * scores.miou:.2f}{absent}")


@main.command(short_help="Compare the decoders: table, curves, pictures.")
@params_option
@device_option
def report(params: Path, device: str) -> None:
    """Compare the decoders: reports/index.html, comparison.json and .csv, and the table on this terminal."""
    sections = load_params(params, device)
    from stages.report import run

    table = run(
        sections["report"], sections["compare"], features=FEATURES, gan=GAN, decoders=DECODERS, metrics=METRICS, out=REPORTS, device=device
    )
    click.echo(table)
    click.echo(f"\nThe whole report: {(REPORTS / 'index.html').resolve()}")


@main.command(short_help="Show what a feature store holds.")
@click.argument("store", type=click.Path(path_type=Path))
def inspect(store: Path) -> None:
    """Show what STORE (a folder such as features/train, or one shard) holds."""
    import featurestore

    opened = featurestore.open(store)
    spec, stats = opened.spec, opened.stats
    size = sum(record.bytes for record in opened.records)
    channels, height, width = spec.feature_shape
    click.echo(f"{store}: {len(opened)} samples in {len(opened.records)} shards, {size / 1e6:.1f} MB")
    click.echo(f"  features    {channels} x {height} x {width} {spec.feature_dtype}{', >= 0' if spec.nonnegative else ''}")
    click.echo(f"  masks       {spec.mask_shape[0]} x {spec.mask_shape[1]} uint8, void {spec.void_index}")
    click.echo(f"  images      {'yes' if spec.has_images else 'no'}")
    click.echo(f"  backbone    {spec.backbone}, weights {spec.weights_digest[:12]}, {spec.compute}, output stride {spec.output_stride}")
    click.echo(f"  resize      {spec.resize}")
    click.echo(f"  compression {spec.compression}")
    click.echo(f"  values      {stats.minimum.min():.3g} to {stats.maximum.max():.3g}, mean {stats.mean.mean():.3g}")
    labelled = max(1, int(stats.class_pixels.sum()))
    click.echo(f"\n  {'class':20} {'pixels':>8} {'samples':>8}")
    for name, pixels, samples in zip(spec.class_names, stats.class_pixels, stats.class_samples, strict=True):
        click.echo(f"  {name:20} {pixels / labelled:8.2%} {samples:8d}")
    click.echo(f"  {'(void)':20} {stats.void_pixels / (labelled + stats.void_pixels):8.2%}")
    click.echo(f"\n  {'shard':20} {'samples':>8} {'MB':>8}  sha256")
    for record in opened.records:
        click.echo(f"  {record.file:20} {record.samples:8d} {record.bytes / 1e6:8.1f}  {record.sha256[:16]}")


@main.command(short_help="Compare a store's every byte with its index.")
@click.argument("store", type=click.Path(path_type=Path))
@workers_option
def verify(store: Path, workers: int) -> None:
    """Compare every byte of STORE with the hashes in its index; exit code 1 if one differs."""
    from tqdm import tqdm

    import featurestore

    opened = featurestore.open(store)
    size = sum(record.bytes for record in opened.records)
    with tqdm(total=size, desc=f"verify: {store}", unit="B", unit_scale=True, disable=None) as bar:
        opened.verify(workers=workers, progress=bar.update)
    click.echo(f"{store}: {len(opened.records)} shards, {len(opened)} samples, {size / 1e6:.1f} MB: every byte as written")


if __name__ == "__main__":
    main(prog_name=f"python {Path(sys.argv[0]).name}")
