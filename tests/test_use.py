"""predict and evaluate: a trained decoder on images and on stores."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file, save_file

import featurestore
from stages.common.errors import DataError
from stages.datasets.class_list import as_classes, read_labels
from stages.reporting.confusion import confusion
from stages.reporting.overlay import legend, overlay
from stages.use import Segmenter, predict
from stages.use import evaluate as evaluation
from tests.factories import call, one_line
from tests.imports import ROOT

BASELINE = "models/decoders/baseline-0"


@pytest.fixture
def project_copy(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working directory with the trained decoder and three images of different sizes."""
    shutil.copytree(trained / BASELINE, tmp_path / BASELINE)
    rng = np.random.default_rng(0)
    source = sorted((trained / "photos" / "images" / "test").glob("*.jpg"))
    for name, file, size in (
        ("1.jpg", source[0], (64, 64)),
        ("a/1.jpg", source[1], (150, 90)),
        ("a/b.c.png", source[2], (80, 200)),
    ):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).resize(size).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / ".1.jpg").write_bytes(rng.bytes(10))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call_predict(*arguments: str) -> Result:
    return call("predict", BASELINE, *arguments, "--device", "cpu")


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Read contents and times of change by path."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in found
    }


# -- predict ---------------------------------------------------------------------------------------


def test_a_folder_of_images(project_copy: Path) -> None:
    result = call_predict("photos", "--out", "out", "--probabilities")
    assert result.exit_code == 0, result.output
    assert "out: 3 of 3 images segmented\n" in result.output
    assert set(files(Path("out"))) == {
        *("classes.csv", "legend.png", "predictions.json"),
        *(f"masks/{name}.png" for name in ("1", "a/1", "a/b.c")),
        *(f"overlays/{name}.jpg" for name in ("1", "a/1", "a/b.c")),
        *(f"probabilities/{name}.npz" for name in ("1", "a/1", "a/b.c")),
    }
    segmenter = Segmenter.load(BASELINE, device="cpu")
    for image, name in (("1.jpg", "1"), ("a/1.jpg", "a/1"), ("a/b.c.png", "a/b.c")):
        mask = Image.open(f"out/masks/{name}.png")
        assert mask.mode == "P"
        assert mask.getpalette()[: 3 * 7] == [
            part for colour in segmenter.spec.palette for part in colour
        ]
        np.testing.assert_array_equal(np.asarray(mask), segmenter(f"photos/{image}"))
        assert (
            Image.open(f"out/overlays/{name}.jpg").size
            == mask.size
            == Image.open(f"photos/{image}").size
        )
        probabilities = np.load(f"out/probabilities/{name}.npz")["probabilities"]
        assert probabilities.dtype == np.float16
        np.testing.assert_allclose(
            probabilities.astype(np.float32), segmenter.probabilities(f"photos/{image}"), atol=2e-3
        )
    classes = as_classes(read_labels(Path("out")), 255, Path("out/classes.csv"))
    assert (classes.names, classes.palette) == (segmenter.spec.class_names, segmenter.spec.palette)


@pytest.mark.medium
def test_files_and_patterns(project_copy: Path) -> None:
    for inputs, names in (
        (["photos/1.jpg"], {"1"}),
        (["photos/1.jpg", "photos/1.jpg", "photos/a/b.c.png"], {"1", "b.c"}),
        (["photos/*/*.jpg"], {"a/1"}),
        (["photos/**/*"], {"1", "a/1", "a/b.c"}),
        (["photos/[a-z]"], None),
    ):
        shutil.rmtree("out", ignore_errors=True)
        result = call_predict(
            *inputs, "--out", "out", "--no-overlay", "--mode", "slide", "--workers", "0"
        )
        if names is None:
            assert result.exit_code == 2
        else:
            assert {
                name.removeprefix("masks/") for name in files(Path("out")) if "masks" in name
            } == {f"{name}.png" for name in names}
            assert not Path("out/overlays").exists()


def test_predictions_inside_the_folder_of_images_are_no_images(project_copy: Path) -> None:
    assert "3 of 3" in call_predict("photos", "--out", "photos/out").output
    assert (
        "3 of 3 images segmented, all of them before"
        in call_predict("photos", "--out", "photos/out").output
    )
    assert "3 of 3" in call_predict("photos/**/*.*", "--out", "photos/out").output


def test_finished_images_are_skipped(project_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call_predict("photos", "--out", "out")
    before = files(Path("out"))
    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "load", None)  # nothing is left to do, so no network is built
        assert (
            "3 of 3 images segmented, all of them before"
            in call_predict("photos", "--out", "out").output
        )
    made = ("masks", "overlays")
    assert {name: state for name, state in files(Path("out")).items() if name.startswith(made)} == {
        name: state for name, state in before.items() if name.startswith(made)
    }

    def made_anew() -> set[str]:
        state = files(Path("out"))
        assert (
            "3 of 3 images segmented, 2 of them before"
            in call_predict("photos", "--out", "out").output
        )
        return {
            name
            for name, (_, changed) in files(Path("out")).items()
            if name.startswith(made) and changed != state[name][1]
        }

    Image.new("RGB", (40, 40)).save("photos/1.jpg")  # another image
    assert made_anew() == {"masks/1.png", "overlays/1.jpg"}
    Path("out/overlays/a/1.jpg").write_bytes(b"")
    Path("out/masks/a/1.png").write_bytes(Path("out/masks/a/1.png").read_bytes()[:20])
    assert made_anew() == {"masks/a/1.png", "overlays/a/1.jpg"}
    assert (
        "3 of 3 images segmented\n"
        in call_predict("photos", "--out", "out", "--probabilities").output
    )


def test_other_settings_or_decoders_need_force(project_copy: Path) -> None:
    best = Path(BASELINE, "decoder-best.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in load_file(best).items()}, best)
    call_predict("photos", "--out", "out")
    before = files(Path("out"))
    for arguments, words in (
        (["--mode", "slide"], "out: holds predictions of mode resize, not slide; add --force"),
        (["--weights", "decoder-best"], "out: holds predictions of another decoder"),
    ):
        result = call_predict("photos", "--out", "out", *arguments)
        assert result.exit_code == 1
        assert words in one_line(result)
    assert files(Path("out")) == before
    assert (
        "all of them before" in call_predict("photos", "--out", "out", "--overlap", "0.5").output
    )  # one window overlaps no other
    assert (
        "3 of 3 images segmented\n"
        in call_predict("photos", "--out", "out", "--mode", "slide", "--force").output
    )
    np.testing.assert_array_equal(
        Image.open("out/masks/a/b.c.png"),
        Segmenter.load(BASELINE)("photos/a/b.c.png", mode="slide"),
    )
    assert "all of them before" in call_predict("photos", "--out", "out", "--mode", "slide").output
    result = call_predict("photos", "--out", "out", "--mode", "slide", "--overlap", "0.5")
    assert result.exit_code == 1
    assert "out: holds predictions of overlap 0.25, not 0.5" in one_line(result)
    Path("out/predictions.json").write_text("{")
    assert "predictions.json: cannot be read" in one_line(call_predict("photos", "--out", "out"))


def test_files_of_another_decoder_or_image_are_removed(project_copy: Path) -> None:
    call_predict("photos", "--out", "out", "--probabilities")
    before = files(Path("out")).keys()
    call_predict("photos", "--out", "out", "--no-overlay")
    assert files(Path("out")).keys() == before  # of the same decoder: nothing goes
    os.utime("photos/1.jpg")  # replaced
    call_predict("photos", "--out", "out", "--no-overlay")
    assert before - files(Path("out")).keys() == {"overlays/1.jpg", "probabilities/1.npz"}
    call_predict("photos/1.jpg", "--out", "out", "--mode", "slide", "--force", "--no-overlay")
    assert {path for path in files(Path("out")) if "/" in path} == {"masks/1.png"}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_damaged_images_are_named_and_the_others_done(project_copy: Path, workers: str) -> None:
    content = Path("photos/a/1.jpg").read_bytes()
    Path("photos/a/0.jpg").write_bytes(content[:300])
    Path("photos/a/2.jpg").write_bytes(b"")
    for _ in range(2):
        result = call_predict("photos", "--out", "out", "--workers", workers)
        assert result.exit_code == 1
        *failed, error = result.stderr.splitlines()
        assert [line.split(": not a readable image")[0] for line in failed] == [
            "Failed: photos/a/0.jpg",
            "Failed: photos/a/2.jpg",
        ]
        assert error == "Error: out: 2 of 5 images could not be read; the others are done"
        assert "3 of 5 images segmented" in result.stdout
        assert {path.stem for path in Path("out/masks").rglob("*.png")} == {"1", "b.c"}
    Path("photos/a/0.jpg").write_bytes(content)
    Path("photos/a/2.jpg").unlink()
    assert (
        "4 of 4 images segmented, 3 of them before" in call_predict("photos", "--out", "out").output
    )


def test_mistakes_are_one_line_before_any_work(
    trained: Path, project_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Segmenter, "load", None)
    shutil.copy("photos/1.jpg", "photos/1.png")
    Path("empty").mkdir()
    Path("mine/masks").mkdir(parents=True)
    for arguments, code, words in (
        (
            ["photos", "--out", "out"],
            2,
            "photos/1.png: would have the same output, 1.png, as photos/1.jpg",
        ),
        (
            ["photos/1.jpg", "photos/a/1.jpg", "--out", "out"],
            2,
            "photos/a/1.jpg: would have the same output, 1.png, as photos/1.jpg",
        ),
        (["empty", "--out", "out"], 2, "empty: there is no image (.jpg, "),
        (["nowhere", "--out", "out"], 2, "nowhere: no such file or folder"),
        (
            ["nowhere/*.jpg", "--out", "out"],
            2,
            "nowhere/*.jpg: no such file or folder, nor a pattern of one",
        ),
        (["photos/a", "--out", "out", "--scale", "0.5"], 2, "scale: should be 1 in mode resize"),
        (["photos/a", "--out", "mine"], 1, "mine: is not empty, and no folder of predictions"),
        (["photos/a", "--out", "photos/1.jpg"], 2, "is a file"),
    ):
        result = call_predict(*arguments)
        assert result.exit_code == code
        assert words in one_line(result)
        assert not Path("out").exists()
    for folder, words in (
        ("nothing", "there is no trained model here"),
        (BASELINE, "decoder-best.safetensors: there is no such weights file"),
    ):
        Path(BASELINE, "decoder-best.safetensors").unlink(missing_ok=True)
        result = call("predict", folder, "photos/a", "--out", "out", "--weights", "decoder-best")
        assert result.exit_code == 1
        assert words in one_line(result)
    Path("models/gan").mkdir()
    described = json.loads(Path(BASELINE, "config.json").read_text())
    Path("models/gan/config.json").write_text(
        json.dumps({**described, "architecture": {"family": "gan"}})
    )
    for folder, words in (
        (
            f"{BASELINE}/decoder.safetensors",
            "is a file; name the folder of the trained model that holds it",
        ),
        (
            "models/gan",
            "models/gan: holds a trained model, but no decoder; "
            "name a folder that train-decoder wrote",
        ),
    ):
        result = call("evaluate", folder, str(trained / "features/test"))
        assert result.exit_code == 1
        assert words in one_line(result)
    assert call("predict", BASELINE, "photos/a").exit_code == 2


def test_a_full_disk_is_one_line(project_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = predict.write_atomically

    def refuse(path: Path, content: bytes) -> None:
        if path.parent.name == "masks":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(predict, "write_atomically", refuse)
    result = call_predict("photos", "--out", "out")
    assert result.exit_code == 1
    assert "out/masks/1.png: cannot be written (No space left on device)" in one_line(result)


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(project_copy: Path) -> None:
    """Finished masks are whole and are skipped; the results equal those of one run."""
    for number in range(40):
        shutil.copy("photos/a/1.jpg", f"photos/{number:03}.jpg")
    assert call_predict("photos", "--out", "undisturbed", "--batch-size", "1").exit_code == 0
    command = [
        sys.executable,
        str(ROOT / "pipeline.py"),
        "predict",
        BASELINE,
        "photos",
        "--out",
        "out",
        "--batch-size",
        "1",
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for wanted in (1, 12):
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while process.poll() is None and len(list(Path("out/masks").rglob("*.png"))) < wanted:
            time.sleep(0.002)
        assert process.poll() is None, "it had ended before it was to be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    killed = files(Path("out/masks"))
    finished = {name: state for name, state in killed.items() if name.endswith(".png")}
    assert 12 <= len(finished) < 43
    result = call_predict("photos", "--out", "out")
    assert f"43 of 43 images segmented, {len(finished)} of them before" in result.output
    after = files(Path("out/masks"))
    assert {name: after[name] for name in finished} == finished
    for folder in ("masks", "overlays"):
        there, expected = files(Path("out") / folder), files(Path("undisturbed") / folder)
        assert {name: content for name, (content, _) in there.items()} == {
            name: content for name, (content, _) in expected.items()
        }


@pytest.mark.real
def test_real_images(real_data: Path, project_copy: Path) -> None:
    images = sorted((real_data / "voc2012-partial" / "JPEGImages").glob("*.jpg"))[:3]
    for mode in ("resize", "slide"):
        result = call_predict(*map(str, images), "--out", mode, "--mode", mode)
        assert result.exit_code == 0, result.output
        for file in images:
            assert Image.open(f"{mode}/masks/{file.stem}.png").size == Image.open(file).size


# -- pictures --------------------------------------------------------------------------------------


def test_overlays_colour_classes_and_leave_black_ones_as_photographed() -> None:
    image = np.full((40, 60, 3), 100, np.uint8)
    classes = np.zeros((40, 60), np.uint8)
    classes[:, 30:] = 1
    coloured = overlay(image, classes, ((0, 0, 0), (200, 0, 0)))
    assert (coloured[:, :29] == 100).all()
    assert (coloured[:, 29] == 255).all()
    assert (coloured[:, 30:] == (150, 50, 50)).all()


@pytest.mark.parametrize("count", [2, 21, 150])
@pytest.mark.medium
def test_confusion_and_legend_are_drawn_for_few_and_many_classes(
    count: int, tmp_path: Path
) -> None:
    names = [f"class number {value}" for value in range(count)]
    (tmp_path / "confusion.png").write_bytes(
        confusion((np.eye(count, dtype=int) * 90 + 1).tolist(), names)
    )
    picture = Image.open(tmp_path / "confusion.png")
    assert 600 < min(picture.size) <= max(picture.size) < 4000
    assert legend(names, [(value, value, value) for value in range(count)]).height == 12 + 26 * min(
        count, 25
    )


# -- evaluate --------------------------------------------------------------------------------------


@pytest.fixture
def in_trained(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def call_evaluate(*arguments: str) -> Result:
    return call("evaluate", BASELINE, *arguments, "--device", "cpu")


def test_the_numbers_are_those_of_training(in_trained: Path, tmp_path: Path) -> None:
    expected = json.loads(Path("metrics/baseline-0/test.json").read_text())
    for arguments, known in (
        (["features/test"], expected),
        (["features/val"], expected["val"]),
        (["features/test", "--weights", "decoder-best"], expected["best_on_val"]),
    ):
        result = call_evaluate(*arguments, "--out", str(tmp_path / "out"), "--batch-size", "4")
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        for key in ("pixel_accuracy", "miou", "iou"):
            assert found[key] == known[key]
        assert (
            f"PA {100 * known['pixel_accuracy']:.2f}, mIoU {100 * known['miou']:.2f} over 7 classes"
            in result.output
        )
        assert found["samples"] == 4
    assert Image.open(tmp_path / "out" / "confusion.png").format == "PNG"
    assert found["decoder"] == f"{BASELINE}/decoder-best.safetensors"


def test_the_mean_over_some_classes(in_trained: Path) -> None:
    iou = json.loads(Path("metrics/baseline-0/test.json").read_text())["iou"]
    result = call_evaluate("features/test", "--class", "belt", "--class", "paper")
    assert (
        f"mIoU {100 * (iou['belt'] + (iou['paper'] or 0)) / 2:.2f} over belt, paper"
        in result.output
    )
    result = call_evaluate("features/test", "--class", "cat")
    assert result.exit_code == 2
    assert "--class: 'cat' is no class of this decoder (belt, paper" in one_line(result)


def copy_store(source: Path, target: Path, repeat: int = 1, **changes: object) -> None:
    """Write a store with another spec; ``repeat`` multiplies the width of its maps."""
    store = featurestore.open(source)
    spec = dataclasses.replace(store.spec, has_images=False, **changes)
    with featurestore.create(target, spec, fingerprint="other") as writer:
        for sample in store:
            features = np.tile(sample.features, (1, 1, repeat))[: spec.feature_shape[0]]
            writer.append(id=sample.id, features=features, mask=np.tile(sample.mask, (1, repeat)))


def test_stores_of_other_sizes_are_scored_and_of_other_features_refused(
    in_trained: Path, tmp_path: Path
) -> None:
    source = Path("features/test")
    copy_store(
        source,
        tmp_path / "wide",
        2,
        feature_shape=(320, 8, 16),
        mask_shape=(64, 128),
        resize="pad",
        palette=((1, 2, 3),) * 7,
    )
    assert "4 images" in call_evaluate(str(tmp_path / "wide")).output
    names = featurestore.open(source).spec.class_names
    for number, (changes, words) in enumerate(
        (
            (
                {"backbone": "resnet50"},
                "has backbone resnet50, but the decoder was trained on efficientnet_lite0",
            ),
            (
                {"weights_digest": "0" * 64},
                "has backbone weights 000000000000, but the decoder was trained on",
            ),
            ({"feature_shape": (8, 8, 8)}, "has channels 8, but the decoder was trained on 320"),
            ({"class_names": names[::-1]}, "has classes glass, metal can"),
        )
    ):
        copy_store(source, tmp_path / str(number), **changes)
        result = call_evaluate(str(tmp_path / str(number)))
        assert result.exit_code == 1
        assert words in one_line(result)
    for arguments, words in (
        (("nowhere",), "there is no feature store here"),
        (("features",), "no index.json in this folder"),
    ):
        result = call_evaluate(*arguments)
        assert result.exit_code == 1
        assert words in one_line(result)


def test_a_decoder_of_an_older_version_says_so(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / BASELINE, tmp_path / "decoder")
    config = json.loads((tmp_path / "decoder" / "config.json").read_text())
    del config["mixed_precision"]
    (tmp_path / "decoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="does not name the precision of its training"):
        evaluation.run(
            tmp_path / "decoder",
            trained / "features" / "test",
            weights="decoder",
            classes=(),
            device="cpu",
            batch_size=4,
            workers=0,
        )
