"""One command from a folder of labelled images to a chosen, trained, tested and exported model."""

from __future__ import annotations

from pathlib import Path

import click

from stages.commands.choose import Duration, as_time
from stages.commands.options import device_option, option, workers_option

CHOOSING = 0.6  # fraction of the time left for `choose`; the rest trains and tests


@click.command(short_help="From a folder of labelled images to a model, in one command.")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@option("--budget", type=Duration(), default="2h", help="Time for everything, such as 90m or 2h.")
@option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("model"),
    help="Folder of the project and its results; a killed command resumes there.",
)
@option("--preset", default="few-images", help="Parameters to start from; `init --list`.")
@workers_option
@device_option
@click.pass_context
def auto(
    ctx: click.Context,
    folder: Path,
    budget: float,
    out: Path,
    preset: str,
    workers: int,
    device: str,
) -> None:
    """Check FOLDER, extract features, choose a variant, train, test, predict and export it.

    Each step is a command of this program, which is printed. Images in FOLDER/unlabelled are used
    without labels and predicted in the end. After a failure or a kill the same command resumes.
    """
    from stages.commands.steps import Steps

    steps = Steps(ctx, out.resolve(), budget)
    machine = ("--workers", str(workers), "--device", device)
    root = folder.resolve()
    steps.run("doctor", str(root))
    steps.write_params(preset, root)
    steps.run("prepare", "--workers", str(workers))
    steps.fit_to_images()
    steps.run("extract", *machine)
    time_to_choose = f"{max(1.0, CHOOSING * steps.left()):.0f}s"
    steps.run("choose", "--budget", time_to_choose, *machine, once=True)
    variants = steps.variants()
    if variants["gan_variants"]:
        steps.run("train-gan", *machine, once=True)
    for variant in (name for names in variants.values() for name in names):
        steps.run("train-decoder", "--variant", variant, *machine, once=True)
    steps.run("report", "--device", device, once=True)
    decoder = "models/decoders/chosen-0"
    device_of = ("--device", device)
    steps.run("evaluate", decoder, "features/test", "--out", "evaluation", *device_of, once=True)
    if (root / "unlabelled").is_dir():
        images = str(root / "unlabelled")
        steps.run(
            "predict", decoder, images, "--out", "predictions", "--force", *device_of, once=True
        )
    steps.run(
        "export", decoder, "--format", "torch-export", "--out", "chosen.pt2", "--force", once=True
    )
    results = "reports/index.html, chosen.pt2 and its model card chosen.md"
    click.echo(f"{steps.out}: done in {as_time(steps.seconds)}; {results}")
