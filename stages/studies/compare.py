"""Comparison of studies' results: a table for each data set and protocol."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.common.errors import ConfigError, DataError
from stages.reporting import tables
from stages.reporting.tables import Result, Row

REQUIRED = {"protocol", "variant", "seed", "images", "iou"}  # keys of a study's result file


@dataclass
class Group:
    """Runs that may be compared: they have the same data, features and decoder training.

    Attributes
    ----------
    name
        Experiments of the runs; with the study's name where two groups would be called the same.
    train_images
        Number of training images.
    runs
        By variant, in the order of the seeds.
    """

    name: str
    train_images: int
    runs: dict[str, list[Result]]

    def seeds(self, variant: str) -> set[int]:
        """List the seeds of which the variant has a run."""
        return {run["seed"] for run in self.runs.get(variant, [])}


@dataclass(frozen=True)
class Comparison:
    """The comparison of one group.

    Attributes
    ----------
    group
        The runs.
    classes
        Classes of the mean; empty: all.
    title
        Group, number of training images, classes, and block length.
    rows
        From :func:`stages.reporting.tables.compare`: the baseline, then by number of seeds, then
        by gain.
    """

    group: Group
    classes: Sequence[str]
    title: str
    rows: list[Row]


def read_groups(paths: Iterable[Path], seeds: Sequence[int] = ()) -> list[Group]:
    """Read result files, and group those that may be compared.

    Parameters
    ----------
    paths
        Files, and folders of files.
    seeds
        Only runs of these seeds; empty: all.

    Returns
    -------
    list of Group
        The most training images first.

    Raises
    ------
    DataError
        For a file that is no result, two results of one run, or no result at all.
    ConfigError
        When no run has one of the seeds.
    """
    paths = list(paths)
    results = [
        _read(file)
        for path in paths
        for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])
    ]
    if not results:
        raise DataError(
            ", ".join(map(str, paths)),
            "there is no result file; `python pipeline.py study FILE` makes them",
        )
    known = sorted({int(result["seed"]) for result in results})
    if missing := set(seeds) - set(known):
        there = ", ".join(map(str, known))
        raise ConfigError(
            "--seed", f"there is no run of seed {min(missing)}; the results have {there}"
        )
    by_protocol = defaultdict(list)
    for result in results:
        if not seeds or result["seed"] in seeds:
            by_protocol[result["protocol"]].append(result)
    groups = [_group(members) for members in by_protocol.values()]
    names = Counter(group.name for group in groups)
    for group in groups:
        if names[group.name] > 1:
            first = next(iter(group.runs.values()))[0]
            group.name = f"{Path(first['file']).resolve().parent.parent.name}/{group.name}"
    return sorted(groups, key=lambda group: -group.train_images)


def _read(file: Path) -> Result:
    result = tables.read_json(file, "remove it and run its study again")
    if not isinstance(result, dict) or not set(result) >= REQUIRED:
        raise DataError(file, "is no result of a study")
    return {**result, "file": str(file)}


def _group(results: Sequence[Result]) -> Group:
    runs: dict[str, dict[int, Result]] = defaultdict(dict)
    for result in sorted(results, key=lambda result: int(result["seed"])):
        other = runs[result["variant"]].setdefault(result["seed"], result)
        if other is not result:
            raise DataError(
                result["file"],
                f"{other['file']} is a result of the same variant and seed; compare them apart,"
                " or rename a row of the study",
            )
    name = " + ".join(dict.fromkeys(result["experiment"] for result in results))
    by_variant = {variant: list(by_seed.values()) for variant, by_seed in runs.items()}
    return Group(name, results[0]["train_images"], by_variant)


def compare(
    groups: Sequence[Group], classes: Sequence[str], baseline: str, block_length: int = 1
) -> list[Comparison]:
    """Compare the variants of each group that has the baseline.

    Parameters
    ----------
    groups
        From :func:`read_groups`.
    classes
        Classes of the mean; empty: all.
    baseline
        Variant that the others are compared with.
    block_length
        Consecutive test images that the bootstrap draws together.

    Raises
    ------
    ConfigError
        When no group has the baseline, a class is unknown, or the test images are too few for
        such blocks.
    """
    having = [group for group in groups if baseline in group.runs]
    if not having:
        labels = ", ".join(sorted({name for group in groups for name in group.runs}))
        raise ConfigError("--baseline", f"there is no {baseline!r} among {labels}")
    compared = []
    for group in having:
        rows = tables.compare(
            group.runs,
            classes,
            block_length=block_length,
            baseline_name=baseline,
            keys=("--class", "--block-length"),
        )
        # Gains of fewer seeds are over another baseline, so they follow those of more.
        rows.sort(
            key=lambda row: (
                row["variant"] != baseline,
                -len(row["delta_miou_values"]),
                -(row["delta_miou"] or 0.0),
            )
        )
        title = _title(group, classes, rows[0]["absent_classes"], block_length)
        compared.append(Comparison(group, classes, title, rows))
    return compared


def _title(group: Group, classes: Sequence[str], absent: Sequence[str], block_length: int) -> str:
    runs = [run for of_variant in group.runs.values() for run in of_variant]
    versions = len({run.get("made_with", {}).get("sources") for run in runs})
    tested = ", ".join(name for name in classes if name not in absent)
    missing = ", ".join(name for name in classes if name in absent)
    return "".join(
        [
            f"{group.name}: {group.train_images} training images",
            f", runs of {versions} versions of the sources" if versions > 1 else "",
            f"; mIoU over {tested}" if classes else "",
            f" (the test images have no {missing})" if missing else "",
            f"; intervals over blocks of {block_length} test images" if block_length > 1 else "",
        ]
    )


def left_out(groups: Sequence[Group], baseline: str) -> list[str]:
    """Name each result that :func:`compare` cannot pair, and say why."""
    return [
        f"{run['file']}: there is no {baseline!r} of seed {run['seed']} with the same data"
        " and settings"
        for group in groups
        for runs in group.runs.values()
        for run in runs
        if run["seed"] not in group.seeds(baseline)
    ]
