"""Large images as windows: what a store holds, and that an image's pixels are scored once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import featurestore
from featurestore import FeatureStore, SpecMismatchError
from featurestore.dataset import FeatureLoader
from stages.common.errors import DataError
from stages.common.runtime import make_accelerator
from stages.common.windows import Grid, image_name, positions_of_rank, split_id, window_id
from stages.data import samples
from stages.data.manifest import read_manifest
from stages.datasets import wastesim
from stages.segmentation.evaluation import evaluate, evaluate_images
from stages.segmentation.metrics import confusion_matrix
from stages.studies.runner import data_content
from stages.training.models import load_decoder
from stages.use.mask_source import folder_masks
from tests.factories import (
    call,
    extract,
    extract_config,
    one_line,
    prepare,
    prepare_config,
    run_decoder,
    tiny_params,
)
from tests.imports import ROOT

SIDE = 64
SIZES = {  # height and width by split and name; smaller, equal to and larger than a window
    "train": {"wide": (70, 250), "tall": (150, 64)},
    "val": {"v": (64, 100)},
    "test": {"big": (150, 170), "t@0,64": (64, 64), "small": (40, 52), "flat": (40, 130)},
}
UNLABELLED = np.s_[:, 50:190]  # columns of "wide" that hold no label


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, float32 stores of windows of 64 x 64, and a decoder trained on them."""
    root = tmp_path_factory.mktemp("tiled")
    abundances = wastesim.read_abundances(ROOT / "data" / "wastesim")
    (root / "photos").mkdir()
    names = ["name", *wastesim.CLASSES.names]
    (root / "photos" / "classes.csv").write_text("\n".join(names) + "\n")
    for split, sizes in SIZES.items():
        for number, (name, (height, width)) in enumerate(sizes.items()):
            image, mask = wastesim.draw_scene(
                np.random.default_rng([len(split), number]), abundances, 256, (20, 30)
            )
            mask = mask[:height, :width].copy()
            if name == "wide":
                mask[UNLABELLED] = 255
            for folder, pixels in (("images", image[:height, :width]), ("masks", mask)):
                path = root / "photos" / folder / split / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    prepare(prepare_config(root / "photos"), root)
    extract(extract_config(resize="tile", feature_dtype="float32"), root)
    run_decoder(root / "features", root, {"augmenter": "none"}, name="baseline", batch_size=2)
    return root


def store_of(tiled: Path, split: str) -> FeatureStore:
    return featurestore.open(tiled / "features" / split)


def pixels_of(tiled: Path, kind: str, split: str, name: str) -> np.ndarray:
    return np.asarray(Image.open(tiled / "photos" / kind / split / f"{name}.png"))


# -- geometry and ids ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "overlap", "starts"),
    [
        (40, 0.25, (0,)),  # padded
        (64, 0.25, (0,)),
        (65, 0.25, (0, 1)),  # the last window ends with the image
        (112, 0.25, (0, 48)),  # exactly the overlap
        (113, 0.25, (0, 24, 49)),
        (128, 0.0, (0, 64)),
    ],
)
def test_windows_along_a_side(side: int, overlap: float, starts: tuple[int, ...]) -> None:
    assert Grid.over((side, 10), (64, 64), overlap).tops == starts
    assert Grid.over((10, side), (64, 64), overlap).lefts == starts


def test_stored_windows_give_their_grid_and_what_none_shows_is_left_out() -> None:
    whole = Grid.over((150, 170), (64, 64))
    assert Grid.spanned_by(list(whole.corners()), (64, 64)) == (whole, list(whole.corners()))
    assert Grid.spanned_by([(0, 0)], (64, 64))[0].size == (64, 64)
    grid, moved = Grid.spanned_by([(40, 100), (40, 300), (90, 300)], (64, 64))
    assert (grid.size, grid.tops, grid.lefts) == ((114, 128), (0, 50), (0, 64))
    assert moved == [(0, 0), (0, 64), (50, 64)]


@pytest.mark.parametrize(
    ("id", "rule", "expected"),
    [
        ("photo@0,64", "tile", ("photo", (0, 64))),
        ("photo@2@0,64", "tile", ("photo@2", (0, 64))),
        ("a@1,2@3,4", "tile", ("a@1,2", (3, 4))),
        ("a\nb@0,0", "tile", ("a\nb", (0, 0))),
        ("photo@0,64", "pad", ("photo@0,64", (0, 0))),  # the name of a whole image
        ("photo@0,64-1", "tile", ("photo@0,64-1", (0, 0))),  # a generated sample
        ("photo@a,b", "tile", ("photo@a,b", (0, 0))),
    ],
)
def test_an_id_names_image_and_corner(id: str, rule: str, expected: tuple) -> None:
    assert split_id(id, rule) == expected
    assert split_id(window_id(id, (7, 9)), "tile") == (id, (7, 9))


def test_processes_share_images_and_not_windows() -> None:
    ids = ["a@0,0", "a@0,9", "b@0,0", "c@0,0", "c@0,9"]
    assert [positions_of_rank(ids, "tile", rank, 2) for rank in (0, 1)] == [[0, 1, 3, 4], [2]]
    assert [positions_of_rank(ids[:2], "tile", rank, 2) for rank in (0, 1)] == [[0, 1], []]


# -- the store -------------------------------------------------------------------------------------


def test_a_store_holds_the_windows_row_by_row(tiled: Path) -> None:
    store = store_of(tiled, "test")
    assert store.spec.resize == "tile"
    names = list(dict.fromkeys(image_name(id, "tile") for id in store.ids))
    assert [Path(name).name for name in names] == sorted(SIZES["test"])
    for name in names:
        short = Path(name).name
        image, mask = (pixels_of(tiled, kind, "test", short) for kind in ("images", "masks"))
        grid = Grid.over(mask.shape, (SIDE, SIDE))
        held = [position for position, id in enumerate(store.ids) if image_name(id, "tile") == name]
        assert [store.ids[position] for position in held] == [
            window_id(name, corner) for corner in grid.corners()
        ]
        for position, (top, left) in zip(held, grid.corners(), strict=True):
            height, width = min(SIDE, mask.shape[0]), min(SIDE, mask.shape[1])
            shown = np.s_[top : top + height, left : left + width]
            inside = np.s_[:height, :width]
            np.testing.assert_array_equal(store.mask(position)[inside], mask[shown])
            np.testing.assert_array_equal(store.image(position)[inside], image[shown])
            outside = np.ones((SIDE, SIDE), bool)
            outside[inside] = False
            assert (store.mask(position)[outside] == 255).all()
            assert (store.image(position)[outside] == 0).all()


def test_training_windows_without_a_label_are_left_out_and_counted(
    tiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    original = samples.read_original
    monkeypatch.setattr(
        samples, "read_original", lambda entry, _: decoded.append(entry.id) or original(entry, _)
    )
    (tmp_path / "dataset").symlink_to(tiled / "dataset")
    train = extract(extract_config(resize="tile", feature_dtype="float32"), tmp_path)["train"]
    assert "2 of 13 training windows have no labelled pixel and are left out" in (
        capsys.readouterr().out
    )
    assert len(decoded) == len(set(decoded)) == sum(map(len, SIZES.values()))  # each image once
    grid = Grid.over((70, 250), (SIDE, SIDE))
    mask = pixels_of(tiled, "masks", "train", "wide")
    labelled = [corner for corner in grid.corners() if (grid.cut(mask, corner) != 255).any()]
    wide = [split_id(id, "tile")[1] for id in train.ids if "wide" in id]
    assert wide == labelled
    assert len(wide) < len(grid)
    assert all((train.mask(position) != 255).any() for position in range(len(train)))


@pytest.mark.medium
def test_a_view_changes_the_window_and_leaves_the_padding(tiled: Path, tmp_path: Path) -> None:
    views = ["identity", "hflip", "rotate", "crop", "colour", "random-2"]
    (tmp_path / "dataset").symlink_to(tiled / "dataset")
    train = extract(extract_config(resize="tile", views=views), tmp_path)["train"]
    count = len(train.positions("identity"))
    assert len(train) == 7 * count
    assert len({train.image(position).tobytes() for position in range(len(train))}) == len(train)
    for position, (id, view) in enumerate(zip(train.ids, train.views, strict=True)):
        of = position % count
        assert id == train.ids[of]
        if view == "hflip":
            np.testing.assert_array_equal(train.mask(position), train.mask(of)[:, ::-1])
            np.testing.assert_array_equal(train.image(position), train.image(of)[:, ::-1])
        if view == "colour":
            np.testing.assert_array_equal(train.mask(position), train.mask(of))

    entry = next(each for each in read_manifest(tiled / "dataset")[0] if "small" in each.id)
    settings = {"seed": 0, "size": (SIDE, SIDE), "rule": "tile"}
    classes = read_manifest(tiled / "dataset")[1]
    for view in views[:-1]:
        chosen = [samples.Sample(entry, view, (0, 0))]
        ((_, pixels, labels),) = samples.read_samples(chosen, classes=classes, **settings)
        outside = np.ones((SIDE, SIDE), bool)
        outside[:40, :52] = False
        assert (pixels[outside] == 0).all()
        assert (labels[outside] == 255).all()
        assert (labels[:40, :52] != 255).mean() > 0.5


# -- scores ----------------------------------------------------------------------------------------


def confusion_of(predicted: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> torch.Tensor:
    """Count the pixels of whole images, each once."""
    counts = torch.zeros(7, 7, dtype=torch.int64)
    for classes, mask in zip(predicted, masks, strict=True):
        counts += confusion_matrix(torch.tensor(classes), torch.tensor(mask), 7)
    return counts


@pytest.mark.parametrize("mode", ["slide", "resize"])  # which after tile is slide
def test_scores_are_those_of_predict_with_sliding_windows(
    tiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.chdir(tiled)
    decoder = "decoders/baseline-0"
    folder, out = "photos/images/test", str(tmp_path / "predictions")
    options = ("--mode", mode, "--device", "cpu", "--no-overlay", "--batch-size", "2")
    result = call("predict", decoder, folder, "--out", out, *options)
    assert result.exit_code == 0, result.output
    names = sorted(SIZES["test"])
    predicted = [
        np.asarray(Image.open(tmp_path / "predictions/masks" / f"{name}.png")) for name in names
    ]
    masks = [pixels_of(tiled, "masks", "test", name) for name in names]
    expected = confusion_of(predicted, masks)
    assert (expected.sum(0) > 0).sum() > 2  # classes that the decoder predicts
    assert int(expected.sum()) == sum(int((mask != 255).sum()) for mask in masks)

    scored = json.loads((tiled / "metrics/baseline-0/test.json").read_text())
    assert scored["confusion"] == expected.tolist()
    by_image = json.loads((tiled / "metrics/baseline-0/images.json").read_text())
    assert [Path(name).name for name in by_image] == names
    for counts, classes, mask in zip(by_image.values(), predicted, masks, strict=True):
        matrix = confusion_of([classes], [mask])
        entries = torch.cat([matrix.nonzero(), matrix[matrix > 0][:, None]], 1)
        assert counts == entries.flatten().tolist()

    out = tmp_path / "evaluation"
    arguments = ("--device", "cpu", "--batch-size", "3", "--out", str(out))
    result = call("evaluate", decoder, "features/test", *arguments)
    assert result.exit_code == 0, result.output
    assert "features/test: 4 images" in result.output
    found = json.loads((out / "evaluation.json").read_text())
    assert found["confusion"] == expected.tolist()
    assert found["samples"] == 4


def scores_of(tiled: Path, store: FeatureStore, positions: np.ndarray | None = None):
    loader = FeatureLoader(store, 3, positions=positions)
    decoder = load_decoder(tiled / "decoders/baseline-0")
    return evaluate_images(make_accelerator("cpu", "no"), decoder, loader, store)


@pytest.mark.medium
def test_windows_that_are_not_stored_change_no_score(
    tiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_labelled", lambda entry, classes, size: set(every(entry, size)))

    def every(entry, size):
        return Grid.over((entry.height, entry.width), size).corners()

    (tmp_path / "dataset").symlink_to(tiled / "dataset")
    settings = extract_config(resize="tile", feature_dtype="float32", batch_size=1)
    whole = extract(settings, tmp_path, out="whole")["train"]
    monkeypatch.undo()
    train = extract(settings, tmp_path)["train"]
    assert len(train) < len(whole)
    assert scores_of(tiled, train) == scores_of(tiled, whole)


def test_several_processes_score_what_one_does(tiled: Path) -> None:
    store = store_of(tiled, "test")
    shares = [positions_of_rank(store.ids, "tile", rank, 3) for rank in range(3)]
    parts = [scores_of(tiled, store, np.array(positions)) for positions in shares]
    assert {name: counts for part in parts for name, counts in part.items()} == scores_of(
        tiled, store
    )


# -- bad input, and what else reads a store -------------------------------------------------------


def test_windows_out_of_order_are_refused(tiled: Path, tmp_path: Path) -> None:
    source = store_of(tiled, "test")
    decoder, accelerator = (
        load_decoder(tiled / "decoders/baseline-0"),
        make_accelerator("cpu", "no"),
    )
    last = len(source) - 1
    for number, order in enumerate(([1, 0], [0, last, 1], [0, 0])):
        with featurestore.create(tmp_path / str(number), source.spec) as writer:
            for position in order:
                each = source[position]
                writer.append(id=each.id, features=each.features, mask=each.mask, image=each.image)
        store = featurestore.open(tmp_path / str(number))
        with pytest.raises(
            SpecMismatchError, match="does not hold the windows of .*big row by row"
        ):
            evaluate(accelerator, decoder, FeatureLoader(store, 2), store)


def test_an_image_of_another_size_than_in_the_manifest_is_named(
    tiled: Path, tmp_path: Path
) -> None:
    (tmp_path / "dataset").mkdir()
    for file in (tiled / "dataset").iterdir():
        text = file.read_text().replace(",52,40,", ",52,400,")
        (tmp_path / "dataset" / file.name).write_text(text)
    with pytest.raises(DataError, match=r"small\.png: is 52 x 40 pixels, but the manifest says 52"):
        extract(extract_config(resize="tile"), tmp_path)


def test_masks_to_generate_for_are_windows(tiled: Path) -> None:
    masks = folder_masks(tiled / "photos/masks/test", store_of(tiled, "test").spec)
    read = {Path(name).name: position for position, (name, _) in enumerate(masks.names)}
    np.testing.assert_array_equal(
        masks.mask(read["t@0,64"]), pixels_of(tiled, "masks", "test", "t@0,64")
    )
    with pytest.raises(DataError, match=r"this mask is 170 x 150 pixels.*windows of 64 x 64"):
        masks.mask(read["big"])


def test_a_study_knows_the_images_of_windows(tiled: Path) -> None:
    stores = {split: store_of(tiled, split) for split in SIZES}
    content = data_content(tiled / "dataset", stores)
    hashes = {entry.id: entry.image_sha256 for entry in read_manifest(tiled / "dataset")[0]}
    assert len(content) == 1 + sum(map(len, stores.values()))
    assert all(hashes[image_name(id, "tile")] == sha for _, id, _, sha, _ in content[1:])


@pytest.mark.medium
def test_estimate_counts_windows(tiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiled)
    (tiled / "params.yaml").write_text(tiny_params({"extract.resize": "tile"}))
    said = json.loads(call("estimate", "--json").stdout)
    assert said["images"] == {split: len(sizes) for split, sizes in SIZES.items()}
    assert {row["split"]: row["samples"] for row in said["stores"]} == {
        split: sum(len(Grid.over(size, (SIDE, SIDE))) for size in sizes.values())
        for split, sizes in SIZES.items()
    }
    refused = call("estimate", "--images", "20")
    assert refused.exit_code == 2
    assert "run the prepare stage, and leave out --images" in one_line(refused)
