"""The shell blocks of the pages run, in their order, on a few small images.

A block is indented, begins with a known program, and is left out where the line before it is
``<!-- download -->`` (it needs a download, or data that is not here) or ``<!-- cluster -->`` (it
needs a GPU or several machines). What takes hours is only checked: the options of benchmarks are
parsed, the missing runs of studies are listed, tests are collected, ``make`` prints its commands.
Budgets of hours are minutes. ``test_results.py`` runs the ``compare`` commands of docs/results/.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from tests.factories import run
from tests.imports import ROOT

PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "_build" not in page.parts
]
MARKS = ("<!-- download -->", "<!-- cluster -->")
PROGRAMS = (
    *("python", "python3", "pip", "dvc", "make", "git", "torchrun", "accelerate", "srun"),
    *("export", "parallel", "xargs", "cat", "mv"),
)
SMALL = {  # in every preset: a few steps on small images
    "extract.input_size": 64,
    "train_gan.frozen_epochs": 1,
    "train_gan.batch_size": 2,
    "train_gan.repeats": 1,
    "train_gan.spade_hidden": 8,
    "train_gan.ngf": 1,
    "train_gan.ndf": 4,
    "train_gan.z_dim": 8,
    "train_decoder.epochs": 1,
    "train_decoder.batch_size": 2,
    "train_decoder.repeats": 1,
    "train_decoder.width": 8,
    "compare.seeds": [0],
    "report.umap_points": 60,
    "report.grid_samples": 2,
    "report.grid_channels": 4,
}
CLASSES = {"background": (0, 0, 0), "bottle": (200, 40, 40), "can": (40, 200, 40)}


def shell_blocks(text: str) -> list[str]:
    """Return the indented blocks of a page that begin with a program, without the marked ones."""
    blocks = []
    for before, paragraph in pairwise(["", *text.split("\n\n")]):
        lines = paragraph.strip("\n").splitlines()
        code = [line[4:] for line in lines if line.startswith("    ")]
        first = next((line for line in code if not line.startswith("#")), "")
        program = re.sub(r"^([A-Z_]+=\S+ )+", "", first).split(" ")[0]
        if len(code) == len(lines) and program in PROGRAMS and before.strip() not in MARKS:
            blocks.append("\n".join(code).replace("\\\n", " "))
    return blocks


def draw(folder: Path, number: int) -> Image.Image:
    """Save an image with a bottle and a can, and return its mask."""
    mask = np.zeros((64, 64), np.uint8)
    mask[8:30, 4 + number : 24 + number] = 1
    mask[34:60, 30 - number : 50 - number] = 2
    noise = np.random.default_rng(number).integers(0, 20, (64, 64, 3))
    pixels = np.array(list(CLASSES.values()), np.uint8)[mask] + noise.astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{number}.png")
    return Image.fromarray(mask)


def write_images(target: Path) -> None:
    """Write the folders that the pages name: labelled, unlabelled and new images, an export."""
    for number in range(10):
        mask = draw(target / "my-photos" / "images", number)
        (target / "my-photos" / "masks").mkdir(exist_ok=True)
        mask.save(target / "my-photos" / "masks" / f"{number}.png")
    (target / "my-photos" / "classes.csv").write_text("\n".join(["name", *CLASSES]) + "\n")
    shapes = []
    for number in range(10):
        draw(target / "my-export" / "images", number)
        left = 4 + number
        box = f'<box label="bottle" xtl="{left}" ytl="8" xbr="{left + 20}" ybr="30" z_order="0"/>'
        shapes.append(
            f'<image id="{number}" name="{number}.png" width="64" height="64">{box}</image>'
        )
    (target / "my-export" / "annotations.xml").write_text(
        "<annotations><version>1.1</version><meta><task><labels><label><name>bottle</name></label>"
        f"</labels></task></meta>{''.join(shapes)}</annotations>"
    )
    for folder in ("my-photos/unlabelled", "my-export/unlabelled", "new-photos"):
        for number in (10, 11):
            draw(target / folder, number)


@pytest.fixture(scope="session")
def workspace(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project after ``dvc repro`` that has the pages' folders, and reduced presets."""
    target = tmp_path_factory.mktemp("pages") / "project"
    shutil.copytree(project, target, symlinks=True)
    for name in ("studies", "results", "benchmarks", "tests", "Makefile", "setup.cfg"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target / name)
    yaml = YAML()
    for preset in (target / "stages" / "presets").glob("*.yaml"):
        settings = yaml.load(preset.read_text(encoding="utf-8"))
        settings.update(SMALL)
        yaml.dump(settings, preset)
    write_images(target)
    for name in ("FOLDER", "VOC/JPEGImages", "VOC2012/JPEGImages"):
        shutil.copytree(target / "new-photos", target / name)
    shutil.copytree(project / "photos" / "images" / "test", target / "dataset" / "images" / "test")
    run("dvc", "remote", "add", "--default", "team", str(target.parent / "remote"), cwd=target)
    run("git", "branch", "--move", "main", cwd=target)
    run("git", "add", "-A", cwd=target)
    run("git", "commit", "-qm", "the pages' folders", cwd=target)
    return target


def parse_options(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the options of ``python -m benchmarks.NAME …`` as it would itself."""
    _, _, module, *arguments = shlex.split(command, comments=True)
    name = "benchmarks.gpu.__main__" if module == "benchmarks.gpu" else module
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        main: click.Command = importlib.import_module(name).main
        if isinstance(main, click.Group):
            module, *arguments = arguments
            main = main.commands[module]
        with contextlib.suppress(click.exceptions.Exit):  # --help
            main.make_context(module, arguments)


def script(page: Path, block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what bash runs of a block, once the options of its benchmarks are parsed."""
    lines = []
    for line in block.splitlines():
        if page.parent.name == "results" and line.startswith("python pipeline.py compare "):
            continue
        if line.startswith("python -m benchmarks."):
            parse_options(line, folder, monkeypatch)
        elif line.startswith("python pipeline.py study "):
            lines.append(line.partition(" #")[0] + " --dry-run")
        elif "python -m pytest " in line:
            lines.append(line.replace("pytest ", "pytest --collect-only --numprocesses 0 ", 1))
        elif line.startswith("make "):
            lines.append(line.replace("make ", "make --dry-run ", 1))
        elif not line.startswith("pip install "):
            line = line.replace("/big/disk", str(folder.parent))
            lines.append(
                line.replace("--budget 2h", "--budget 2m").replace("--budget 1h", "--budget 30s")
            )
    return "\n".join(["exec < <(yes)", *lines])  # some commands of DVC ask


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
@pytest.mark.slow
def test_the_commands_of_a_page_run(
    page: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = shell_blocks(page.read_text(encoding="utf-8"))
    if not blocks:
        pytest.skip("no shell block")
    target = tmp_path / "project"
    shutil.copytree(workspace, target, symlinks=True)
    for block in blocks:
        commands = script(page, block, target, monkeypatch)
        run("bash", "-euxo", "pipefail", "-c", commands, cwd=target, OMP_NUM_THREADS="1")


def test_blocks_are_found_and_marks_leave_them_out() -> None:
    block = "    dvc repro    # again\n    git log \\\n      -1"
    page = f"Text:\n\n{block}\n\n<!-- cluster -->\n\n    srun x\n"
    assert shell_blocks(page) == ["dvc repro    # again\ngit log    -1"]
    assert shell_blocks("A list:\n\n    images/a.jpg\n") == []
    assert len([page for page in PAGES if shell_blocks(page.read_text(encoding="utf-8"))]) > 12
