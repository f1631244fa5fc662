"""The benchmarks run and say what they promise; what they measure is not asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import run
from tests.imports import ROOT


@pytest.mark.slow
def test_store_benchmark_writes_a_row_a_method_and_read(photos: Path, tmp_path: Path) -> None:
    names = ["featurestore", "np.memmap", "featurestore zeros"]
    only = [word for name in names for word in ("--only", name)]
    options = [
        "--folder",
        str(photos),
        "--size",
        "64",
        "--samples",
        "9",
        "--passes",
        "1",
        "--rounds",
        "1",
        *only,
    ]
    run(
        sys.executable,
        "-m",
        "benchmarks.store",
        *options,
        "--json",
        str(tmp_path / "rows.json"),
        cwd=ROOT,
    )
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["method"], row["read"]) for row in rows] == [
        (name, read) for name in names for read in ("sample", "batch")
    ]
    raw = 320 * 8 * 8 * 2
    for row in rows:
        assert row["samples_per_s"] > 0
        assert row["peak_rss_mb"] > 10
        if "zeros" not in row["method"]:
            assert raw <= row["bytes_per_sample"] < 2 * raw
    assert rows[2]["to_memmap"] == rows[3]["to_memmap"] == 1


def test_coverage_benchmark_counts_the_splits_whose_interval_holds_the_truth(
    tmp_path: Path,
) -> None:
    study = ROOT / "results" / "voc2012-few-labels" / "sixteenth"
    options = [
        "--variant",
        "perturbed",
        "--class",
        "person",
        "--splits",
        "20",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    run(sys.executable, "-m", "benchmarks.coverage", str(study), *options, cwd=ROOT)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["images"], row["mean"]) for row in rows] == [(41, "named"), (41, "all")]
    for row in rows:
        assert row["covered"] + row["below"] + row["above"] == pytest.approx(100)
        assert row["covered"] >= 50
        assert row["width"] > 0


@pytest.mark.slow
def test_loader_benchmark_compares_with_a_plain_script(project: Path, tmp_path: Path) -> None:
    store = str(project / "features" / "train")
    command = [
        "-m",
        "benchmarks.loader",
        store,
        "--batch-size",
        "2",
        "--epochs",
        "1",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    run(sys.executable, *command, cwd=ROOT)
    rows = {row["method"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["np.memmap, one thread"]["to_memmap"] == 1
    assert rows["FeatureLoader, 2 threads"]["samples_per_s"] > 0
    assert not list((project / "features").glob(".*"))  # the plain script's files are gone


@pytest.mark.slow
def test_training_benchmark_compares_with_a_literal_implementation(
    photos: Path, tmp_path: Path
) -> None:
    options = [
        "--size",
        "small",
        "--precision",
        "no",
        "--steps",
        "1",
        "--folder",
        str(photos),
        "--images",
        "16",
    ]
    run(
        sys.executable,
        "-m",
        "benchmarks.train",
        *options,
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "rows.json"),
        cwd=ROOT,
    )
    rows = json.loads((tmp_path / "rows.json").read_text())
    steps = {(row["what"], row["implementation"]): row["seconds"] for row in rows}
    for what in ("gan step", "joint step 1:1", "joint step 2:1"):
        assert steps[what, "ours"] > 0
        assert steps[what, "literal"] > 0
    for what in ("decoder epoch, 16 images", "gan epoch, 16 images"):
        assert (
            steps[what, "cached"] < steps[what, "online"]
        )  # the backbone alone takes longer than the rest


@pytest.mark.slow
def test_int8_benchmark_scores_every_pair(project: Path, tmp_path: Path) -> None:
    options = [
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    run(sys.executable, "-m", "benchmarks.int8", str(project / "features"), *options, cwd=ROOT)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["trained_on"], row["scored_on"]) for row in rows] == [
        (a, b) for a in ("float16", "int8") for b in ("float16", "int8")
    ]
    assert rows[0]["difference"] == "+0.00"
