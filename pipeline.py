"""The command line: one command a stage, and a few to look at what the stages made.

``dvc repro`` calls these commands in order and only where something changed.
Nothing heavy is imported before a command runs, so ``--help`` is instant.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from stages.commands.auto import auto
from stages.commands.choose import choose
from stages.commands.doctor import doctor
from stages.commands.estimate import estimate
from stages.commands.export import export
from stages.commands.generate import generate
from stages.commands.options import (
    device_option,
    download_option,
    load_params,
    load_preset,
    params_option,
    presets,
    scratch_option,
    training_options,
    workers_option,
)
from stages.commands.stores import inspect, verify
from stages.commands.studies import compare, study
from stages.commands.use import evaluate, predict

DATASET, FEATURES, GAN, DECODERS = (
    Path("dataset"),
    Path("features"),
    Path("models/gan"),
    Path("models/decoders"),
)
METRICS, REPORTS, LOGS = Path("metrics"), Path("reports"), Path("logs")


class Pipeline(click.Group):
    """Lists commands in the order of the stages, and turns the project's own errors into one line.

    The exit code is 2 for parameters and options, 1 for data.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List commands in the order of definition."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            from featurestore.errors import FeatureStoreError
            from featurestore.files import FULL, not_written
            from stages.common.errors import CollapseError, ConfigError, DataError, DivergenceError

            if isinstance(error, OSError) and error.errno in FULL:
                error = not_written(error.filename or "this disk", error)
            if not isinstance(
                error, (CollapseError, ConfigError, DataError, DivergenceError, FeatureStoreError)
            ):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2 if isinstance(error, ConfigError) else 1)


@click.group(cls=Pipeline, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="featuregan", message="%(package)s %(version)s")
def main() -> None:
    """FeatureGAN: cache a frozen backbone's features, generate more, train a better decoder.

    The stages run in this order; `dvc repro` runs those whose inputs changed:

    \b
      prepare        images and masks             -> dataset/
      extract        frozen backbone, once        -> features/{train,val,test}/
      train-gan      FeatureGAN alone             -> models/gan/
      train-decoder  one variant, one seed        -> models/decoders/VARIANT-SEED/
      report         tables, curves, pictures     -> reports/

    params.yaml says what is computed (`init` writes one); options say how this machine computes it.
    """


@main.command(short_help="Write params.yaml from a preset.")
@click.argument("preset", default="quickstart")
@click.option("--list", "list_them", is_flag=True, help="List the presets and stop.")
@click.option("--force", is_flag=True, help="Replace a params.yaml that is there.")
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False),
    help="Folder of the images: prepare.root. Default: the preset's. Its subfolder unlabelled, if"
    " there is one, is used without labels.",
)
@params_option
def init(preset: str, list_them: bool, force: bool, root: str | None, path: Path) -> None:
    """Write params.yaml from PRESET (default: quickstart), with a comment on every key."""
    titles = {name: file.read_text("utf-8").splitlines()[0] for name, file in presets().items()}
    if list_them:
        for name, title in titles.items():
            click.echo(f"{name:16} {title.removeprefix('# ')}")
        return
    params = load_preset(preset)
    if path.exists() and not force:
        raise click.UsageError(f"{path} is there already; add --force to replace it")
    from stages.commands.params import PARAMS, as_yaml
    from stages.common.config import parse, with_settings

    if root is not None:
        changes: dict[str, object] = {"prepare.root": root}
        if (Path(root) / "unlabelled").is_dir():
            changes["prepare.unlabelled"] = "unlabelled"
            if "self-training" in params.variants:
                changes["compare.unlabelled_variants"] = ["self-training"]
        params = parse(PARAMS, with_settings(params.plain(), changes))
    kept = ""
    written = [as_yaml(load_preset(name), title) for name, title in titles.items()]
    if path.exists() and path.read_text("utf-8") not in written:
        before = path.with_name(path.name + ".bak")
        path.replace(before)
        kept = f" (the old one is {before})"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_yaml(params, titles[preset]), "utf-8")
    found = Path(params.prepare.root).is_dir()
    following = "`dvc repro`" if found else f"set prepare.root in {path}"
    click.echo(f"wrote {path} from preset {preset}{kept}; next: {following}")


@main.command(short_help="Find or draw images and masks; check them all.")
@params_option
@scratch_option
@workers_option
@download_option
def prepare(path: Path, scratch: Path, workers: int, download: bool) -> None:
    """Find or draw the images and masks, check every one, write dataset/manifest.csv."""
    params = load_params(path)
    from stages.commands.params import fitting_repeats
    from stages.prepare import run

    summary = run(params.prepare, out=DATASET, scratch=scratch, workers=workers, download=download)
    sizes = ", ".join(f"{split} {part['images']}" for split, part in summary["splits"].items())
    classes = len(summary["classes"])
    click.echo(f"{DATASET}: {summary['images']} images ({sizes}), {classes} classes, all checked")
    images, repeats = summary["splits"]["train"]["images"], params.train_decoder.repeats
    fitting = fitting_repeats(images)
    if repeats > 1 and not fitting / 1.5 < repeats < fitting * 1.5:
        click.echo(
            f"{path}: {images} training images: set repeats in train_gan and train_decoder to"
            f" {fitting}, which makes epochs of {fitting * images} samples (now {repeats * images})"
        )
    params.check_classes(summary["classes"])  # before features and a GAN are made in vain


@main.command(short_help="Cache the frozen backbone's features.")
@params_option
@scratch_option
@workers_option
@device_option
def extract(path: Path, scratch: Path, workers: int, device: str) -> None:
    """Run the frozen backbone once over every image; write features and masks to features/."""
    # Before PyTorch is loaded: its threads must not spin for work while others decode and write.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    params = load_params(path, device)
    from stages.common.runtime import first_process
    from stages.extract import run

    stores = run(
        params.extract,
        dataset=DATASET,
        out=FEATURES,
        scratch=scratch,
        device=device,
        workers=workers,
    )
    for store in stores.values() if first_process() else ():
        size = sum(record.bytes for record in store.records)
        shape = " x ".join(map(str, store.spec.feature_shape))
        click.echo(f"{store.path}: {len(store)} samples of {shape}, {size / 1e6:.1f} MB")


@main.command("train-gan", short_help="Train FeatureGAN on cached features.")
@training_options
def train_gan(path: Path, **machine: Any) -> None:
    """Train FeatureGAN on cached features (Algorithm 1, the first frozen_epochs epochs)."""
    params = load_params(path, machine["device"])
    from stages.common.runtime import Machine, check_precision, first_process
    from stages.train_gan import run

    check_precision(
        machine["device"],
        params.train_decoder.mixed_precision,
        "train_decoder.mixed_precision",
    )
    params.check_features(FEATURES, ("train", "val"))
    losses = run(
        params.train_gan,
        params.monitor,
        features=FEATURES,
        out=GAN,
        metrics=METRICS / "train-gan",
        logs=LOGS,
        machine=Machine(**machine),
        backbone_weights=params.extract.weights,
    )
    if not first_process():
        return
    shown = ", ".join(
        f"{name} {value:.3f}" for name, value in losses.items() if "/class_consistency/" not in name
    )
    click.echo(f"{GAN}: {shown}")


@main.command("train-decoder", short_help="Train one variant's decoder.")
@click.option("--variant", required=True, help="Name of an entry of `variants` in the parameters.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Seed of initial weights, order and noise.",
)
@training_options
def train_decoder(variant: str, seed: int, path: Path, **machine: Any) -> None:
    """Train the decoder of one entry of section `variants`, with one seed."""
    params = load_params(path, machine["device"])
    if variant not in params.variants:
        raise click.UsageError(
            f"unknown variant {variant!r}; {path} describes {', '.join(params.variants)}"
        )
    from stages.common.runtime import Machine, first_process
    from stages.train_decoder import run

    params.check_views(variant)
    params.check_features(FEATURES, ("train", "val", "test"))
    name = f"{variant}-{seed}"
    scores = run(
        params.train_decoder,
        params.variants[variant],
        params.monitor,
        name=variant,
        seed=seed,
        features=FEATURES,
        gan=GAN,
        out=DECODERS / name,
        metrics=METRICS / name,
        logs=LOGS,
        machine=Machine(**machine),
        backbone_weights=params.extract.weights,
    )
    if not first_process():
        return
    absent = f" (absent from test: {', '.join(scores.absent)})" if scores.absent else ""
    accuracy, miou = 100 * scores.pixel_accuracy, 100 * scores.miou
    click.echo(f"{DECODERS / name}: test PA {accuracy:.2f}, mIoU {miou:.2f}{absent}")


@main.command(short_help="Compare the decoders: table, curves, pictures.")
@params_option
@device_option
def report(path: Path, device: str) -> None:
    """Compare the decoders: reports/index.html, comparison.json and .csv, and a table here."""
    params = load_params(path, device)
    from stages.report import run

    table = run(
        params.report,
        params.compare,
        features=FEATURES,
        gan=GAN,
        decoders=DECODERS,
        metrics=METRICS,
        out=REPORTS,
        device=device,
    )
    click.echo(table)
    click.echo(f"\nThe whole report: {(REPORTS / 'index.html').resolve()}")


for command in (
    *(auto, doctor, choose, predict, evaluate, generate, export),
    *(estimate, compare, study, inspect, verify),
):
    main.add_command(command)


if __name__ == "__main__":
    main(prog_name=f"python {Path(sys.argv[0]).name}")
