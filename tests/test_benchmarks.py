"""The benchmarks run and report what they promise; no measured time is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import common, train
from tests.factories import run
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
    plain = {row["read"]: row["samples_per_s"] for row in rows if row["method"] == "np.memmap"}
    for row in rows:
        assert row["to_memmap"] == pytest.approx(row["samples_per_s"] / plain[row["read"]])
        assert row["peak_rss_mb"] > 10
        if "zeros" not in row["method"]:
            assert raw <= row["bytes_per_sample"] < 2 * raw
    assert rows[2]["to_memmap"] == rows[3]["to_memmap"] == 1


@pytest.mark.medium
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
        assert 0.1 < row["width"] < 20  # percentage points


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
    ours = rows["FeatureLoader, 2 threads"]
    plain = rows["np.memmap, one thread"]
    assert ours["to_memmap"] == pytest.approx(ours["samples_per_s"] / plain["samples_per_s"])
    assert not list((project / "features").glob(".*"))  # the plain script's files are gone


@pytest.mark.slow
def test_extract_benchmark_has_rows_dilated_and_native(trained: Path, tmp_path: Path) -> None:
    layers = [word for name in ("blocks.1", "blocks.6") for word in ("--layer", name)]
    sizes = ["--size", "64", "--images", "2", "--batch-size", "2", "--device", "cpu"]
    run(
        sys.executable,
        "-m",
        "benchmarks.extract",
        *("--dataset", str(trained / "dataset"), *layers, *sizes),
        *("--json", str(tmp_path / "rows.json")),
        cwd=trained,  # the manifest's paths are relative
        PYTHONPATH=str(ROOT),
    )
    rows = json.loads((tmp_path / "rows.json").read_text())
    expected = ["backbone alone", "extract", "extract of 2", "extract of 20"]
    for strides, last in (("dilated", 320 * 8 * 8), ("native", 320 * 2 * 2)):
        alone, rate, *memory = (row for row in rows if row["backbone"].endswith(strides))
        assert [row["what"] for row in (alone, rate, *memory)] == expected
        assert alone["bytes_a_sample"] == 2 * (24 * 16 * 16 + last)
        assert rate["to_backbone"] == pytest.approx(rate["images_per_s"] / alone["images_per_s"])
        assert all(row["peak_rss_mb"] > 10 for row in memory)


@pytest.mark.slow
def test_training_benchmark_compares_with_a_literal_implementation(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    backbone_for = common.backbone_for

    def counted(name: str, folder: Path) -> torch.nn.Module:
        backbone = backbone_for(name, folder)
        backbone.register_forward_hook(lambda *_: calls.append(1))
        return backbone

    monkeypatch.setattr(common, "backbone_for", counted)
    options = {
        "--size": "small",
        "--steps": "1",
        "--folder": str(photos),
        "--images": "16",
        "--device": "cpu",
        "--json": str(tmp_path / "rows.json"),
    }
    arguments = [word for option in options.items() for word in option]
    result = CliRunner().invoke(train.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = {
        (row["what"], row["implementation"]): row
        for row in json.loads((tmp_path / "rows.json").read_text())
    }
    pairs = {
        "literal": ("ours", ["gan step", "joint step 1:1", "joint step 2:1"]),
        "online": ("cached", ["decoder epoch, 16 images", "gan epoch, 16 images"]),
    }
    assert set(rows) == {
        (what, implementation)
        for slow, (fast, names) in pairs.items()
        for what in names
        for implementation in (slow, fast)
    }
    for slow, (fast, names) in pairs.items():
        for what in names:
            speedup = rows[what, slow]["seconds"] / rows[what, fast]["seconds"]
            assert rows[what, fast]["speedup"] == pytest.approx(speedup)
            assert rows[what, slow]["speedup"] == 1
    # The backbone ran for the store, and in each of two online epochs after one batch to warm up;
    # an epoch from the cache never calls it.
    batches = 16 // train.SIZES["small"].batch
    assert len(calls) == batches + 2 * (1 + batches)


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
