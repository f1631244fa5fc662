"""prepare: find or draw the images and masks, check each of them, write the manifest."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from featurestore.files import move_into_place
from stages.common.errors import ConfigError, DataError
from stages.data.manifest import Pair, write_manifest
from stages.datasets import inspection, wastesim
from stages.datasets.catalogue import DATASETS, find
from stages.datasets.config import PrepareConfig
from stages.datasets.download import download_data
from stages.datasets.findings import Finding
from stages.datasets.inspection import Summary


def run(
    config: PrepareConfig, *, out: Path, scratch: Path, workers: int, download: bool = False
) -> Summary:
    """Write ``out/manifest.csv`` and ``out/summary.json``, wastesim's images and converted masks.

    Parameters
    ----------
    config
        Which data set.
    out
        Folder of the result; it appears whole or not at all.
    scratch
        Folder in which the result is put together, and a list of all problems is left.
    workers
        Number of threads that read, convert and check files.
    download
        Download the data set first, where ``config.root`` does not hold it yet and its owners
        allow it.

    Returns
    -------
    dict
        The summary.

    Raises
    ------
    ConfigError
        When the data set cannot be downloaded; the error says where to get it.
    DataError
        When any image or mask is missing, damaged or does not fit; nothing is written then.
    """
    root, building = Path(config.root), scratch / "prepare"
    if download:
        _download(config, root, scratch / "downloads")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)

    def store(pair: Pair, content: bytes) -> Path:
        path = building / "masks" / f"{pair.id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def published(path: str) -> str:
        return path.replace(building.as_posix(), out.as_posix(), 1)

    config, layout = find(config, lambda: _draw(config, building, workers))
    title = "prepare: checking"
    result = inspection.inspect(layout, config, workers=workers, store=store, title=title)
    if result.problems:
        raise _all_problems(result.problems, scratch / "problems.txt")
    _print_findings(result.findings, result.summary, root)
    entries = [
        replace(each.entry, image=published(each.entry.image), mask=published(each.entry.mask))
        for each in result.checked
    ]
    write_manifest(building, [*entries, *result.unlabelled], result.summary)
    move_into_place(building, out)
    return result.summary


def _download(config: PrepareConfig, root: Path, downloads: Path) -> None:
    """Download the data set; refuse where its owners do not allow it and it is absent."""
    dataset = DATASETS.get(config.dataset)
    archives = getattr(dataset, "archives", None)
    if archives is not None:
        for archive in archives(root, config):
            download_data(archive, downloads)
    elif not root.is_dir():
        remedy = (
            f"get it yourself ({dataset.WHERE})"
            if dataset is not None
            else "name the data set"
            if config.dataset == "auto"
            else "it is drawn; prepare.root holds its objects.csv"
        )
        raise ConfigError(
            "prepare.dataset",
            f"{config.dataset} cannot be downloaded: {remedy}",
            actual=config.dataset,
        )


def _draw(config: PrepareConfig, building: Path, workers: int) -> list[Pair]:
    """Draw the pairs of wastesim."""
    scenes = config.wastesim
    return wastesim.write_pairs(
        building,
        root=Path(config.root),
        images={"train": scenes.train, "val": scenes.val, "test": scenes.test},
        size=scenes.size,
        objects=(scenes.min_objects, scenes.max_objects),
        seed=scenes.seed,
        workers=workers,
    )


def _print_findings(findings: list[Finding], summary: Summary, root: Path) -> None:
    """Print a line for each kind of finding: number, first file, and what is wrong with it."""
    first: dict[str, Finding] = {}
    for finding in findings:
        first.setdefault(finding.kind, finding)
    for kind, finding in first.items():
        count = summary["findings"][kind]
        tqdm.write(f"prepare: {kind}: {count}, the first is {finding.path}: {finding.message}")
    if len(findings) > len(first):
        tqdm.write(f"prepare: `python pipeline.py doctor {root} --params params.yaml` lists all")


def _all_problems(problems: list[DataError], report: Path) -> DataError:
    """Return the first problem; where there are more, it names a file that lists all of them."""
    first = problems[0]
    if len(problems) == 1:
        return first
    report.write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8")
    return DataError(
        first.path,
        f"{str(first).removeprefix(f'{first.path}: ')} "
        f"[and {len(problems) - 1} more problems, all listed in {report}]",
        expected=first.expected,
        actual=first.actual,
    )
