"""The benchmarks run and report what they promise; no measured time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import choice, common, peer_methods, peers, train
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.timing import device_intervals, read_trace, union_ms
from benchmarks.gpu.trace import STEPS, waiting_calls
from stages.backbones.build import build_backbone
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
        "literal": (
            "ours",
            ["gan step", "joint step 1:1", "joint step 2:1", "unfrozen decoder step"],
        ),
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


# -- benchmarks.peers ----------------------------------------------------------------------------

PEERS_STUDY = """
preset: voc2012-lite
set:
  prepare.dataset: folder
  extract.input_size: 64
  train_decoder.batch_size: 2
  train_decoder.width: 8
  variants.augmented: {augmenter: none, augment: [flip, translation]}
  variants.swaps: {augmenter: class-transfer}
seeds: [0]
experiments:
  all: {variants: [augmented, swaps]}
"""


@pytest.mark.medium
@pytest.mark.parametrize(("stride", "dilate", "layers"), [(8, True, 4), (16, False, 3)])
def test_peers_encoder_computes_the_features_of_the_backbone(
    stride: int, dilate: bool, layers: int
) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    names = ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]
    backbone = build_backbone(
        name="efficientnet_lite0", weights="default", layers=names, dilate=dilate
    )
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    for trained in (False, True):
        network = peer_methods.build_network(5, width=8, stride=stride, trained=trained)
        assert network.encoder.output_stride == stride
        trainable = {each.requires_grad for each in network.encoder.parameters()}
        assert trainable == {trained}
        network.train()
        norms = [m for m in network.encoder.modules() if "BatchNorm" in type(m).__name__]
        assert {norm.training for norm in norms} == {trained}
        network.eval()
        with torch.no_grad():
            features = network.encoder(peer_methods.normalised(images))[2:]
            assert network(peer_methods.normalised(images)).shape == (2, 5, 64, 96)
        ours = backbone(images)  # at stride 16 the library dilates the last layer
        for theirs, expected in list(zip(features, ours, strict=True))[:layers]:
            torch.testing.assert_close(theirs, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_peers_benchmark_has_a_row_a_time_and_method(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    study, file = tmp_path / "study.yaml", tmp_path / "rows.json"
    study.write_text(PEERS_STUDY)
    options = ["--root", str(photos), "--device", "cpu", "--class", "belt", "--json", str(file)]
    options += ["--minutes", "0.1", "--minutes", "1e-5", "--run", "all/augmented-0"]
    result = CliRunner().invoke(peers.main, [str(study), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())
    assert [(row["minutes"], row["method"]) for row in rows] == [
        (minutes, method) for minutes in (1e-5, 0.1) for method in peer_methods.METHODS
    ]
    for row in rows[:3]:  # no time is left after reading the images
        assert (row["steps"], row["miou"]) == (0, None)
    for row in rows[3:]:
        assert row["steps"] >= 1
        assert 6 <= row["seconds"] < 60
        assert 0 < row["miou"] <= 1
        assert row["miou_named"] == row["iou"]["belt"]


def test_peers_benchmark_refuses_runs_that_it_cannot_measure(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    study = tmp_path / "study.yaml"
    study.write_text(PEERS_STUDY)
    for name, message in (("all/swaps-0", "class-transfer"), ("all/augmented-1", "no run")):
        arguments = [str(study), "--root", str(photos), "--run", name]
        result = CliRunner().invoke(peers.main, arguments)
        assert result.exit_code == 2
        assert message in result.output


def test_peers_benchmark_names_the_package_that_is_missing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(PEERS_STUDY)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    arguments = [str(study), "--root", str(photos), "--run", "all/augmented-0"]
    result = CliRunner().invoke(peers.main, arguments)
    assert result.exit_code == 1
    assert "segmentation_models_pytorch is not installed; run pip install" in result.output


def test_peers_first_times_are_of_the_first_training_that_is_as_good() -> None:
    measured = {"cached": (None, 0.5, 0.4), "smp trained": (0.2, 0.4, 0.6)}
    rows = [
        {"run": "a", "method": method, "seconds": seconds, "miou": values[number]}
        for number, seconds in enumerate((10.0, 20.0, 40.0))
        for method, values in measured.items()
    ]
    first, second = peers.first_times(rows, "miou")
    assert first == {
        "run": "a", "final mIoU of": "cached", "miou": 0.4, "cached": 20.0, "smp trained": 20.0
    }  # fmt: skip
    assert second == {"run": "a", "final mIoU of": "smp trained", "miou": 0.6, "smp trained": 40.0}


# -- benchmarks.choice ---------------------------------------------------------------------------


@pytest.mark.slow
def test_choice_benchmark_tests_every_candidate_and_names_the_regret(
    photos: Path, tmp_path: Path
) -> None:
    study, file = tmp_path / "study.yaml", tmp_path / "rows.json"
    study.write_text(PEERS_STUDY.replace("set:\n", "set:\n  train_decoder.epochs: 1\n", 1))
    options = ["--root", str(photos), "--run", "all/augmented-0", "--folds", "2"]
    options += ["--scratch", str(tmp_path / "scratch"), "--device", "cpu", "--workers", "0"]
    result = CliRunner().invoke(
        choice.main, [str(study), *options, "--json", str(file)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())
    assert [row["chosen"] for row in rows] == ["yes"] + [""] * (len(rows) - 1)
    assert rows[0]["folds"] == 2
    assert all(0 <= row["test"] <= 100 for row in rows)
    assert sum("difference" not in row for row in rows) == 1  # the baseline
    best = max(row["test"] for row in rows)
    assert f"regret in all/augmented-0: {best - rows[0]['test']:.2f} points" in result.output


def test_choice_benchmark_compares_with_the_candidate_that_is_best_on_average() -> None:
    rows = [
        {"case": case, "candidate": name, "test": test, "chosen": "yes" if name == chosen else ""}
        for case, chosen, scores in (
            ("a", "x", {"x": 50.0, "y": 52.0, "z": 40.0}),
            ("b", "z", {"x": 30.0, "y": 33.0, "z": 35.0}),
        )
        for name, test in scores.items()
    ]
    assert choice.regrets(rows) == ("y", {"a": 2.0, "b": -2.0})


# -- benchmarks.gpu, on the CPU ------------------------------------------------------------------


def gpu_rows(folder: Path, *arguments: str) -> list[dict]:
    """Run ``python -m benchmarks.gpu`` small on the CPU and return the rows it wrote."""
    options = ["--device", "cpu", "--size", "small", "--json", str(folder / "rows.json")]
    result = CliRunner().invoke(gpu.main, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads((folder / "rows.json").read_text())


def test_gpu_benchmark_says_in_one_line_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in gpu.ORDER:
        result = CliRunner().invoke(gpu.main, [command])
        assert result.exit_code == 1
        assert result.output.startswith("PyTorch finds no CUDA device here")
        assert result.output.count("\n") == 1


@pytest.mark.medium
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("target", ["gpu-tests", "gpu-benchmarks"])
def test_gpu_targets_stop_with_one_line_without_a_gpu(target: str) -> None:
    result = subprocess.run(
        ["make", "--silent", target, f"GPU_PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    first, *others = result.stderr.splitlines()
    assert first.startswith("PyTorch finds no CUDA device here")
    assert all(line.startswith("make") for line in others)
    assert not result.stdout


@pytest.mark.slow
def test_gpu_benchmarks_write_a_table_and_rows_for_each_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ORDER", ("ceilings",))
    arguments = ["all", "--device", "cpu", "--size", "small", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(gpu.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "ceilings.json",
        "ceilings.txt",
    ]
    assert (tmp_path / "out" / "ceilings.txt").read_text() in result.output
    result = CliRunner().invoke(gpu.main, [*arguments, "--minutes", "1e-9"])
    assert result.exit_code == 1
    assert "these did not finish: ceilings (out of time)" in result.output


def test_gpu_ceilings_are_rates_by_precision(tmp_path: Path) -> None:
    rows = gpu_rows(tmp_path, "ceilings")
    assert all(row["value"] > 0 for row in rows)
    rates = [(row["what"].split(",")[0], row["precision"], row["unit"]) for row in rows]
    assert rates[0] == ("memory of the CPU", None, "GiB")
    for what in ("matrix product", "3 x 3 convolution"):  # a CPU has no TF32 and no fp16
        for precision in ("fp32", "bf16"):
            assert (what, precision, "TFLOP/s") in rates
    assert ("host to device", None, "GB/s") in rates
    assert len(rates) == 9


def test_gpu_loss_has_a_row_a_loss_and_type(tmp_path: Path) -> None:
    rows = gpu_rows(tmp_path, "loss")
    assert [(row["dtype"], row["implementation"]) for row in rows] == [
        (dtype, name) for dtype in ("fp32", "bf16") for name in ("plain", "upsampled")
    ]
    for plain, ours in zip(rows[::2], rows[1::2], strict=True):
        assert ours["speedup"] == pytest.approx(plain["ms"] / ours["ms"])
        assert ours["memory_mib"] is None  # a CPU counts no memory


def test_gpu_loader_has_every_cache(tmp_path: Path) -> None:
    rows = gpu_rows(tmp_path, "loader")
    assert [(row["cache"], row["threads"]) for row in rows] == [
        *[(cache, threads) for cache in ("none", "host") for threads in (1, 2, 4)],
        ("device", 2),
    ]
    sample_bytes = 320 * 8 * 8 * 2 + 64 * 64
    for row in rows:
        assert row["gb_per_s"] == pytest.approx(row["samples_per_s"] * sample_bytes / 1e9)
        assert row["to_limit"] == pytest.approx(row["gb_per_s"] / row["limit_gb_per_s"])


@pytest.mark.medium
def test_gpu_extract_has_a_row_a_stage(tmp_path: Path) -> None:
    rows = gpu_rows(tmp_path, "extract")
    decoding = [row for row in rows if row["stage"] == "decode and resize"]
    assert [row["threads"] for row in decoding[:2]] == [1, 2]
    assert [(row["stage"], row["precision"]) for row in rows[len(decoding) :]] == [
        ("host to device", None),
        ("backbone", "fp32"),
        ("backbone", "bf16"),
        ("device to host", None),
        ("write", None),
        ("extract, whole", "fp32"),
        ("extract, whole", "bf16"),
    ]
    for row in rows:
        if row["to_limit"] is not None:
            assert row["to_limit"] == pytest.approx(row["images_per_s"] / row["limit_per_s"])
    assert all(row["images_per_s"] > 0 for row in rows if row["stage"] != "extract, whole")


@pytest.mark.medium
def test_gpu_steps_compare_with_the_literal_implementation(tmp_path: Path) -> None:
    rows = gpu_rows(tmp_path, "steps", "--no-compile")
    assert [(row["precision"], row["what"], row["implementation"]) for row in rows] == [
        (precision, what, how)
        for precision in ("fp32", "bf16")
        for what in ("gan", "decoder", "joint")
        for how in ("literal", "eager")
    ]
    for literal, ours in zip(rows[::2], rows[1::2], strict=True):
        assert ours["to_literal"] == pytest.approx(literal["ms"] / ours["ms"])
        assert ours["samples_per_s"] == pytest.approx(2000 / ours["ms"])  # a batch has two
        assert ours["to_matrix_product"] > 0
        assert ours["idle"] is ours["peak_mib"] is ours["problem"] is None


def test_gpu_steps_begin_none_after_their_time(tmp_path: Path) -> None:
    rows = gpu_rows(tmp_path, "steps", "--minutes", "1e-9")
    assert {row["problem"] for row in rows} == {"not run: out of time"}
    assert [row["implementation"] for row in rows[-6:]] == ["compiled"] * 6
    assert [row["precision"] for row in rows[-6::3]] == ["bf16", "fp32"]


@pytest.mark.medium
def test_gpu_trace_lists_operators_of_a_stage(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    rows = gpu_rows(tmp_path, "trace", "--kind", "gan", "--precision", "fp32", "--out", str(file))
    assert {row["table"] for row in rows} == {"operator"}  # no host waits for a CPU
    convolution = next(row for row in rows if row["operator"] == "aten::convolution_backward")
    assert convolution["calls_a_step"] % 1 == 0
    assert convolution["host_ms_a_step"] > 0
    steps = {event["name"] for event in read_trace(file) if "ProfilerStep" in event["name"]}
    assert steps == {f"ProfilerStep#{number}" for number in range(6, 10)}


def test_gpu_trace_finds_waits_within_the_steps() -> None:
    def event(name: str, category: str, begin: float, duration: float, thread: int = 1) -> dict:
        return {"name": name, "cat": category, "ts": begin, "dur": duration, "tid": thread}

    events = [
        event("ProfilerStep#6", "user_annotation", 0, 100),
        event("aten::item", "cpu_op", 10, 30),
        event("aten::_local_scalar_dense", "cpu_op", 11, 20),
        event("cudaStreamSynchronize", "cuda_runtime", 12, 8),
        event("aten::add", "cpu_op", 10, 90, thread=2),
        event("cudaDeviceSynchronize", "cuda_runtime", 150, 9),  # the profiler's, after the steps
        event("kernel", "kernel", 20, 10),
        event("copy", "gpu_memcpy", 25, 10),
        event("ProfilerStep#6", "gpu_user_annotation", 140, 100),
    ]
    assert list(waiting_calls(events)) == [
        {
            "wait": "cudaStreamSynchronize",
            "inside": "aten::_local_scalar_dense",
            "calls_a_step": 1 / STEPS,
            "ms_a_step": 0.008 / STEPS,
        }
    ]
    assert union_ms(device_intervals(events)) == pytest.approx(0.015)  # 20 to 35
    assert union_ms([]) == 0


@pytest.mark.slow
def test_write_benchmark_has_a_row_an_implementation_and_place(tmp_path: Path) -> None:
    run(
        sys.executable,
        *("-m", "benchmarks.write", "--samples", "16", "--channels", "8", "--rounds", "1"),
        *("--memory", str(tmp_path), "--json", str(tmp_path / "rows.json")),
        cwd=ROOT,
        TMPDIR=str(tmp_path),
    )
    rows = json.loads((tmp_path / "rows.json").read_text())
    written = [row for row in rows if row["what"] == "write"]
    ours, others = (
        ["featurestore, threads", "featurestore, append"],
        ["h5py, plain", "write and fsync", "write, sha256, statistics"],
    )
    expected = [("memory", name) for name in [*ours, *others, *ours]]
    expected += [("disk", name) for name in [*ours, *others]]
    assert [(row["where"], row["implementation"]) for row in written] == expected
    assert [row["compression"] for row in written[:7]] == ["none"] * 5 + ["zeros"] * 2
    assert [row["what"] for row in rows[len(written) :]] == ["hash", "extract"]
    assert all(row["samples_per_s"] > 0 for row in rows if row["what"] != "extract")


@pytest.mark.medium
def test_gpu_monitor_is_compared_with_the_training_between_two_measurements(
    tmp_path: Path,
) -> None:
    step, measurement = gpu_rows(tmp_path, "monitor")
    fraction = measurement["ms"] / (5 * 63 * step["ms"])
    assert measurement["fraction_of_training"] == pytest.approx(fraction)
