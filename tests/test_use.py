"""predict and evaluate, as a user calls them."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import featurestore
import pipeline
from stages.segmenter import Segmenter


def call(*arguments: object) -> Result:
    return CliRunner().invoke(pipeline.main, [str(argument) for argument in arguments])


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Five photographs of different sizes, one in a folder of its own."""
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (90, 120)), ("b.png", (64, 64)), ("c.jpg", (40, 30)), ("d.jpg", (64, 200)), ("deep/a.jpg", (50, 50))):
        path = tmp_path / "album" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(path)
    return tmp_path / "album"


def decoder_of(trained: Path) -> Path:
    return trained / "models" / "decoders" / "baseline-0"


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_predict_writes_masks_with_a_palette_overlays_and_probabilities(trained: Path, album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("predict", decoder_of(trained), album, "--out", out, "--probabilities", "--device", "cpu", "--batch-size", "3")
    assert result.exit_code == 0, result.output
    assert "5 of 5 photographs segmented" in result.output
    segmenter = Segmenter.load(decoder_of(trained), device="cpu")
    for photograph in (path for path in album.rglob("*") if path.is_file()):
        name = photograph.relative_to(album).with_suffix("")
        with Image.open(out / "masks" / f"{name}.png") as mask, Image.open(photograph) as image:
            assert mask.mode == "P"
            assert tuple(mask.getpalette()[:21]) == tuple(part for colour in segmenter.spec.palette for part in colour)
            np.testing.assert_array_equal(np.asarray(mask), segmenter(photograph))
            with Image.open(out / "overlays" / f"{name}.jpg") as overlay:
                assert overlay.size == image.size
        shares = np.load(out / "probabilities" / f"{name}.npz")["probabilities"]
        assert shares.dtype == np.float16
        np.testing.assert_allclose(shares, segmenter.probabilities(photograph), atol=2e-3)
    with open(out / "classes.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(segmenter.spec.class_names)
    assert (out / "legend.png").is_file()


def test_predict_goes_on_where_it_stopped_and_redoes_what_changed(trained: Path, album: Path, tmp_path: Path) -> None:
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    command = ("predict", decoder_of(trained), album, "--device", "cpu", "--out")
    assert call(*command, undisturbed).exit_code == 0
    assert call("predict", decoder_of(trained), album / "a.jpg", album / "b.png", "--device", "cpu", "--out", out).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    (out / "masks" / "c.png.partial").write_bytes(b"killed here")
    result = call(*command, out)
    assert "2 of them before" in result.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (out / "masks" / "c.png.partial").unlink(missing_ok=True)
    assert files_below(out) == files_below(undisturbed)
    assert "all of them before" in call(*command, out).output

    Image.new("RGB", (33, 44)).save(album / "a.jpg")  # another photograph under the name
    assert "4 of them before" in call(*command, out).output
    with Image.open(out / "masks" / "a.png") as mask:
        assert mask.size == (33, 44)
    (out / "masks" / "b.png").write_bytes((out / "masks" / "b.png").read_bytes()[:40])  # damaged
    assert "4 of them before" in call(*command, out).output


def test_predict_refuses_to_mix_and_force_replaces(trained: Path, album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("predict", decoder_of(trained), album, "--device", "cpu", "--out", out)
    assert call(*command).exit_code == 0
    for more, words in ((("--mode", "slide"), "mode resize, not slide"), (("--weights", "decoder-best"), "another decoder")):
        result = call(*command, *more)
        if more[0] == "--weights" and files_equal(trained):
            continue  # the last epoch was the best one
        assert result.exit_code == 1
        assert words in result.output
        assert "--force" in result.output
    assert call(*command, "--mode", "slide", "--force").exit_code == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    result = call("predict", decoder_of(trained), album, "--out", other)
    assert result.exit_code == 1
    assert "is not empty, and no folder of predictions" in result.output


def files_equal(trained: Path) -> bool:
    last, best = (decoder_of(trained) / f"{name}.safetensors" for name in ("decoder", "decoder-best"))
    return last.read_bytes() == best.read_bytes()


def test_damaged_photographs_are_named_at_the_end_and_the_others_done(trained: Path, album: Path, tmp_path: Path) -> None:
    (album / "broken.jpg").write_bytes((album / "a.jpg").read_bytes()[:300])
    result = call("predict", decoder_of(trained), album, "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 1
    assert "broken.jpg: not a readable image" in result.output
    assert "5 of 6 photographs segmented" in result.output
    assert len(list((tmp_path / "out" / "masks").rglob("*.png"))) == 5


def test_inputs_are_files_folders_and_patterns(trained: Path, album: Path, tmp_path: Path) -> None:
    command = ("predict", decoder_of(trained), "--device", "cpu", "--no-overlay", "--out")
    assert call(*command, tmp_path / "1", f"{album}/**/*.jpg").exit_code == 0
    made = {str(path.relative_to(tmp_path / "1" / "masks")) for path in (tmp_path / "1" / "masks").rglob("*.png")}
    assert made == {"a.png", "c.png", "d.png", "deep/a.png"}
    assert not (tmp_path / "1" / "overlays").exists()

    result = call(*command, tmp_path / "2", album / "a.jpg", album / "deep" / "a.jpg")
    assert result.exit_code == 2
    assert "would have the same output, a.png" in result.output
    assert not (tmp_path / "2").exists()
    for nothing, words in ((tmp_path / "nowhere", "no file, folder or pattern of files"), (trained / "metrics", "there is no photograph")):
        result = call(*command, tmp_path / "3", nothing)
        assert result.exit_code == 2
        assert words in result.output


def test_evaluate_gives_the_numbers_of_train_decoder(trained: Path, tmp_path: Path) -> None:
    result = call("evaluate", decoder_of(trained), trained / "features" / "test", "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    expected = json.loads((trained / "metrics" / "baseline-0" / "test.json").read_text())
    for key in ("pixel_accuracy", "miou", "iou", "confusion", "absent"):
        assert found[key] == expected[key]
    assert f"mIoU {100 * expected['miou']:.2f} over 7 classes" in result.output
    with Image.open(tmp_path / "out" / "confusion.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20

    first, second = list(expected["iou"].items())[:2]
    chosen = call("evaluate", decoder_of(trained), trained / "features" / "test", "--class", first[0], "--device", "cpu")
    assert f"mIoU {100 * first[1]:.2f} over {first[0]}" in chosen.output
    assert second[0] in chosen.output  # the table has every class
    result = call("evaluate", decoder_of(trained), trained / "features" / "test", "--class", "zebra")
    assert result.exit_code == 2
    assert "'zebra' is no class of this decoder" in result.output


def test_evaluate_refuses_features_of_another_backbone(trained: Path, tmp_path: Path) -> None:
    store = featurestore.open(trained / "features" / "test")
    values = {**store.spec.to_dict(), "weights_digest": "0" * 64}
    with featurestore.create(tmp_path / "other", featurestore.StoreSpec.from_dict(values)) as writer:
        for sample in store:
            writer.append(id=sample.id, features=sample.features, mask=sample.mask, image=sample.image)
    result = call("evaluate", decoder_of(trained), tmp_path / "other", "--device", "cpu")
    assert result.exit_code == 1
    assert "has backbone weights 000000000000, but the decoder was trained on" in result.output


def test_a_decoder_of_an_older_version_says_so(trained: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(decoder_of(trained), old)
    config = json.loads((old / "config.json").read_text())
    del config["features"]
    (old / "config.json").write_text(json.dumps(config))
    result = call("evaluate", old, trained / "features" / "test")
    assert result.exit_code == 1
    assert "does not describe the features that the model was trained on" in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.real
def test_real_photographs_are_segmented_at_their_own_size(trained: Path, real_data: Path, tmp_path: Path) -> None:
    ids = sorted(os.listdir(real_data / "voc2012-partial" / "JPEGImages"))[:3]
    photographs = [real_data / "voc2012-partial" / "JPEGImages" / id for id in ids]
    result = call("predict", decoder_of(trained), *photographs, "--mode", "slide", "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for photograph in photographs:
        with Image.open(photograph) as image, Image.open(tmp_path / "out" / "masks" / f"{photograph.stem}.png") as mask:
            assert mask.size == image.size
