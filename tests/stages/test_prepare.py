"""prepare reads each layout, and names each kind of bad file before it writes anything."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from stages.common.errors import ConfigError, DataError
from stages.data.images import decode_image, resize_pair
from stages.data.masks import decode_mask
from stages.datasets import voc, wastesim
from stages.datasets.splits import halve, random_split
from tests.factories import SCENES, prepare
from tests.factories import prepare_config as config
from tests.imports import ROOT


def manifest(tmp_path: Path) -> list[dict[str, str]]:
    with open(tmp_path / "dataset" / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


# -- layouts ---------------------------------------------------------------------------------------


def test_folder_with_splits(photos: Path, tmp_path: Path) -> None:
    summary = prepare(config(photos), tmp_path)
    rows = manifest(tmp_path)
    assert [row["split"] for row in rows] == ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    assert rows[0]["id"] == "train/0"
    assert (rows[0]["width"], rows[0]["height"]) == ("64", "64")
    assert len(rows[0]["image_sha256"]) == 64
    assert json.loads((tmp_path / "dataset" / "summary.json").read_text()) == summary
    assert summary["classes"] == list(wastesim.CLASSES.names)
    assert sum(summary["splits"]["train"]["pixel_share"].values()) == pytest.approx(1)
    masks = np.stack(
        [np.asarray(Image.open(photos / "masks" / "val" / f"{number}.png")) for number in range(3)]
    )
    assert summary["splits"]["val"]["pixel_share"]["belt"] == pytest.approx((masks == 0).mean())


def test_smaller_training_fractions_are_subsets(photos: Path, tmp_path: Path) -> None:
    chosen = []
    for fraction in (1.0, 0.5, 0.3, 0.01):
        summary = prepare(config(photos, train_fraction=fraction), tmp_path)
        splits: dict[str, set[str]] = {}
        for row in manifest(tmp_path):
            splits.setdefault(row["split"], set()).add(row["id"])
        assert (len(splits["val"]), len(splits["test"])) == (3, 3)
        assert summary["splits"]["train"]["images"] == len(splits["train"])
        chosen.append(splits["train"])
    assert [len(ids) for ids in chosen] == [6, 3, 2, 1]
    assert chosen[3] < chosen[2] < chosen[1] < chosen[0]


def test_folds_divide_the_training_images_and_leave_out_the_test_images(
    photos: Path, tmp_path: Path
) -> None:
    tested, trained = [], []
    for number in range(1, 5):
        summary = prepare(config(photos, fold=f"{number}/4"), tmp_path)
        rows = manifest(tmp_path)
        tested.append({row["id"] for row in rows if row["split"] == "test"})
        trained.append({row["id"] for row in rows if row["split"] == "train"})
        assert summary["splits"]["val"]["images"] == 3
    every = {f"train/{number}" for number in range(6)}
    assert sorted(map(len, tested)) == [1, 1, 2, 2]
    assert sorted(id for ids in tested for id in ids) == sorted(every)
    assert all(test | train == every for test, train in zip(tested, trained, strict=True))


def test_folds_divide_the_images_that_train_fraction_keeps(photos: Path, tmp_path: Path) -> None:
    prepare(config(photos, train_fraction=0.5), tmp_path)
    kept = {row["id"] for row in manifest(tmp_path) if row["split"] == "train"}
    prepare(config(photos, train_fraction=0.5, fold="1/3"), tmp_path)
    rows = manifest(tmp_path)
    assert {row["id"] for row in rows if row["split"] != "val"} == kept


@pytest.mark.parametrize("fold", ["3/2", "1/1", "0/2", "1", "1/x"])
def test_a_fold_that_is_no_part_of_a_division_is_refused(photos: Path, fold: str) -> None:
    with pytest.raises(ValueError, match="fold"):
        config(photos, fold=fold)


def test_more_folds_than_training_images_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="7 folds need at least 7 training images, there are 6"):
        prepare(config(photos, fold="1/7"), tmp_path)


def test_folder_without_splits_any_image_format_and_a_bare_class_list(
    photos: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    for kind in ("images", "masks"):
        (flat / kind).mkdir(parents=True)
    for number in range(6):
        suffix = (".jpg", ".png", ".bmp", ".tif", ".webp", ".jpeg")[number]
        Image.open(photos / "images" / "train" / f"{number}.jpg").save(
            flat / "images" / f"photo {number}{suffix}"
        )
        Image.open(photos / "masks" / "train" / f"{number}.png").save(
            flat / "masks" / f"photo {number}.png"
        )
    (flat / "classes.csv").write_text("name\n" + "\n".join(wastesim.CLASSES.names))
    summary = prepare(config(flat, split="random", ratios=[0.5, 0.25, 0.25]), tmp_path)
    assert {split: part["images"] for split, part in summary["splits"].items()} == {
        "train": 3,
        "val": 2,
        "test": 1,
    }
    assert (
        len({tuple(colour) for colour in summary["palette"]}) == 7
    )  # colours are made up, and differ


def test_classes_can_stand_in_the_parameters(photos: Path, tmp_path: Path) -> None:
    (photos / "classes.csv").unlink()
    named = {
        name: list(colour)
        for name, colour in zip(wastesim.CLASSES.names, wastesim.CLASSES.palette, strict=True)
    }
    summary = prepare(
        config(photos, classes=[{name: colour} for name, colour in named.items()]), tmp_path
    )
    assert summary["classes"] == list(wastesim.CLASSES.names)
    assert summary["palette"][3] == list(wastesim.CLASSES.palette[3])


def test_voc_layout_official_and_random(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    ids = [f"2007_{number:06d}" for number in range(6)]
    for number, id in enumerate(ids):
        Image.open(photos / "images" / "train" / f"{number}.jpg").save(
            root / "JPEGImages" / f"{id}.jpg"
        )
        mask = Image.open(photos / "masks" / "train" / f"{number}.png").convert("P")
        mask.putpalette([part for colour in voc.CLASSES.palette for part in colour])
        mask.save(root / "SegmentationClass" / f"{id}.png")
    lists = root / "ImageSets" / "Segmentation"
    for name, chosen in (("train", ids[:3]), ("val", ids[3:]), ("trainval", ids)):
        (lists / f"{name}.txt").write_text("\n".join(chosen) + "\n")
    prepare(config(root, dataset="voc"), tmp_path)
    splits = {row["id"]: row["split"] for row in manifest(tmp_path)}
    assert {id for id, split in splits.items() if split == "train"} == set(ids[:3])
    assert sorted(splits[id] for id in ids[3:]) == ["test", "val", "val"]
    prepare(config(root, dataset="voc", split="random", ratios=[0.5, 0.25, 0.25]), tmp_path)
    assert sorted(row["split"] for row in manifest(tmp_path)) == [
        "test",
        "train",
        "train",
        "train",
        "val",
        "val",
    ]
    (lists / "trainval.txt").write_text(" ".join([*ids, ids[0]]))
    with pytest.raises(DataError, match="2007_000000 is listed twice"):
        prepare(config(root, dataset="voc", split="random"), tmp_path)


def test_voc_colours_are_the_devkits() -> None:
    known = {0: (0, 0, 0), 1: (128, 0, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {value: voc.CLASSES.palette[value] for value in known} == known


def test_wastesim_is_a_function_of_its_seed(tmp_path: Path) -> None:
    settings = config(ROOT / "data" / "wastesim", dataset="wastesim")
    prepare(settings, tmp_path)
    first = manifest(tmp_path)
    prepare(settings, tmp_path)
    assert manifest(tmp_path) == first
    other = {**SCENES, "seed": 1}
    prepare(config(ROOT / "data" / "wastesim", dataset="wastesim", wastesim=other), tmp_path)
    assert manifest(tmp_path)[0]["image_sha256"] != first[0]["image_sha256"]
    assert Path(first[0]["image"]).is_file()


def test_every_material_is_drawn_and_overlaps_hide_what_is_below() -> None:
    abundances = wastesim.read_abundances(ROOT / "data" / "wastesim")
    masks = [
        wastesim.draw_scene(np.random.default_rng(seed), abundances, 96, (4, 8))
        for seed in range(12)
    ]
    assert {int(value) for image, mask in masks for value in np.unique(mask)} == set(range(7))
    assert all(image.shape == (96, 96, 3) and image.std() > 10 for image, _ in masks)


# -- splits and resizing ---------------------------------------------------------------------------


def test_random_split_has_the_thesis_fractions_and_ignores_the_order_of_ids() -> None:
    ids = [f"{number:04d}" for number in range(2913)]
    splits = random_split(ids, (0.7, 0.15, 0.15), seed=0)
    counts = {name: list(splits.values()).count(name) for name in ("train", "val", "test")}
    assert counts == {"train": 2039, "val": 437, "test": 437}
    assert random_split(ids[::-1], (0.7, 0.15, 0.15), seed=0) == splits
    assert random_split(ids, (0.7, 0.15, 0.15), seed=1) != splits
    assert sorted(halve(ids[:5], 0).values()) == ["test", "test", "val", "val", "val"]


@pytest.mark.parametrize(
    ("images", "ratios", "counts"),
    [
        (3, (0.7, 0.15, 0.15), (1, 1, 1)),
        (5, (0.7, 0.15, 0.15), (3, 1, 1)),
        (7, (0.7, 0.15, 0.15), (5, 1, 1)),
        (4, (0.5, 0.5, 0.0), (2, 2, 0)),
    ],
)
def test_a_random_split_of_few_images_leaves_no_split_empty(
    images: int, ratios: tuple[float, ...], counts: tuple[int, ...]
) -> None:
    splits = list(random_split([f"{number}" for number in range(images)], ratios, 0).values())
    assert tuple(splits.count(name) for name in ("train", "val", "test")) == counts


@pytest.mark.parametrize("rule", ["stretch", "pad", "crop"])
def test_resize_rules(rule: str) -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    mask = np.zeros((40, 80), np.uint8)
    image[:, 40:], mask[:, 40:] = 200, 1
    small, labels = resize_pair(Image.fromarray(image), mask, size=(32, 32), rule=rule)
    assert small.shape == (32, 32, 3)
    assert labels.shape == (32, 32)
    assert set(np.unique(labels)) == ({0, 1, 255} if rule == "pad" else {0, 1})
    inside = labels != 255
    assert inside.mean() == (0.5 if rule == "pad" else 1)
    assert (labels[inside] == 1).mean() == 0.5
    assert small[inside & (labels == 1)].mean() > 150 > 50 > small[inside & (labels == 0)].mean()


def test_images_are_turned_as_their_exif_tag_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert decode_image((tmp_path / "a.jpg").read_bytes(), tmp_path / "a.jpg").size == (20, 30)


def test_a_camera_whose_tags_nobody_can_write_is_no_obstacle(tmp_path: Path) -> None:
    """With the text tag Software as a fraction, Pillow's ``exif_transpose`` raises."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x0131] = "abcdefg"
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    order = "little" if b"Exif\0\0II" in content else "big"
    entry = b"".join(
        number.to_bytes(size, order) for number, size in ((0x0131, 2), (2, 2), (8, 4))
    )  # tag, text, eight bytes
    assert content.count(entry) == 1
    fraction = b"".join(
        number.to_bytes(size, order) for number, size in ((0x0131, 2), (5, 2), (1, 4))
    )
    content = content.replace(entry, fraction)
    with pytest.raises(AttributeError):
        ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert decode_image(content, tmp_path / "a.jpg").size == (20, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_as_pillow_does(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    decoded = decode_image((tmp_path / "a.png").read_bytes(), tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected))


def test_the_files_void_value_becomes_255(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 11]], np.uint8)).save(tmp_path / "a.png")
    mask = decode_mask(
        (tmp_path / "a.png").read_bytes(), tmp_path / "a.png", num_classes=11, void_index=11
    )
    assert mask.tolist() == [[0, 255]]


# -- bad input -------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def save(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


BAD_FILES = {
    "a missing image": ("images/train/1.jpg", lambda path: path.unlink(), "image is missing"),
    "a missing mask": ("masks/val/2.png", lambda path: path.unlink(), "mask is missing"),
    "sizes that differ": (
        "masks/train/0.png",
        lambda path: save(path, np.zeros((64, 63), np.uint8)),
        "the mask is 63 x 64 pixels",
    ),
    "an unknown value": (
        "masks/test/0.png",
        lambda path: save(path, np.full((64, 64), 7, np.uint8)),
        r"mask value 7 is no class \(0 to 6\)",
    ),
    "an unknown colour": (
        "masks/train/3.png",
        lambda path: save(path, np.zeros((64, 64, 3), np.uint8)),
        r"colour \(0, 0, 0\) in row 0, column 0 \(from 0\) is that of no class",
    ),
    "a truncated image": (
        "images/train/2.jpg",
        truncate,
        "not a readable image, or a truncated one",
    ),
    "an image of 16 bits": (
        "images/train/1.jpg",
        lambda path: Image.fromarray(np.full((64, 64), 4000, np.uint16)).save(path, format="png"),
        r"more than 8 bits a channel \(mode I;16\); convert it to 8 bits",
    ),
    "an unreadable image": (
        "images/test/1.jpg",
        lambda path: path.write_bytes(b"no picture"),
        "not a readable image",
    ),
    "a truncated mask": ("masks/train/5.png", truncate, "not a readable mask, or a truncated one"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_remedy(photos: Path, tmp_path: Path, case: str) -> None:
    name, spoil, words = BAD_FILES[case]
    spoil(photos / name)
    with pytest.raises(DataError, match=words) as caught:
        prepare(config(photos), tmp_path)
    assert str(caught.value).startswith(str(photos / name))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "dataset").exists()


def test_all_problems_are_listed_not_only_the_first(photos: Path, tmp_path: Path) -> None:
    for name, spoil, _ in BAD_FILES.values():
        spoil(photos / name)
    with pytest.raises(DataError, match="and 7 more problems") as caught:
        prepare(config(photos), tmp_path)
    listed = (tmp_path / "scratch" / "problems.txt").read_text().splitlines()
    assert len(listed) == 8
    assert "\n" not in str(caught.value)


def test_duplicate_ids_and_empty_splits(photos: Path, tmp_path: Path) -> None:
    (photos / "images" / "train" / "0.png").write_bytes(
        (photos / "images" / "train" / "0.jpg").read_bytes()
    )
    with pytest.raises(DataError, match=r"has the same id \(0\)"):
        prepare(config(photos), tmp_path)
    (photos / "images" / "train" / "0.png").unlink()
    for file in (*(photos / "images" / "val").iterdir(), *(photos / "masks" / "val").iterdir()):
        file.unlink()
    with pytest.raises(DataError, match="no images for the split 'val'"):
        prepare(config(photos), tmp_path)


def test_a_split_without_a_label_is_refused(photos: Path, tmp_path: Path) -> None:
    for file in (photos / "masks" / "test").iterdir():
        save(file, np.full((64, 64), 255, np.uint8))
    with pytest.raises(DataError, match="split 'test' hold not one labelled pixel"):
        prepare(config(photos), tmp_path)


def test_masks_of_0_and_255_are_not_taken_for_one_class(photos: Path, tmp_path: Path) -> None:
    (photos / "classes.csv").write_text("name\nbackground\nobject\n")
    for file in (photos / "masks").rglob("*.png"):
        save(file, np.asarray(Image.open(file)).astype(bool) * np.uint8(255))
    with pytest.raises(
        DataError,
        match=r"hold only one class, 'background' "
        r"\(255 means no label: where it is your object, set prepare.binary to true\)",
    ):
        prepare(config(photos), tmp_path)


def test_a_class_without_training_pixels_is_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(photos / "classes.csv", "a") as file:
        file.write("unicorn,1,2,3\n")
    prepare(config(photos), tmp_path)
    assert "no training mask has a pixel of unicorn" in capsys.readouterr().out


def test_a_name_that_is_not_utf_8_is_named(photos: Path, tmp_path: Path) -> None:
    for folder, suffix in ((b"images", b".jpg"), (b"masks", b".png")):
        place = os.fsencode(photos) + b"/" + folder + b"/train/"
        os.rename(place + b"0" + suffix, place + b"M\xfcll" + suffix)
    with pytest.raises(
        DataError,
        match=r"the name 'M\\udcfcll\.\w+' is not in UTF-8, as manifests and stores are; "
        "rename the file",
    ):
        prepare(config(photos), tmp_path)


def test_a_wrong_root_and_class_list(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        prepare(config(tmp_path / "nowhere"), tmp_path)
    (photos / "classes.csv").unlink()
    with pytest.raises(DataError, match="class list is missing"):
        prepare(config(photos), tmp_path)
    (photos / "classes.csv").write_text("name,red,green,blue\nbelt,0,0,300\n")
    with pytest.raises(DataError, match="colour of class 'belt'"):
        prepare(config(photos), tmp_path)
    (photos / "classes.csv").write_text("name\nbelt\nbelt\n")
    with pytest.raises(DataError, match="occurs twice"):
        prepare(config(photos), tmp_path)


def test_a_failed_run_leaves_the_earlier_result(photos: Path, tmp_path: Path) -> None:
    prepare(config(photos), tmp_path)
    before = manifest(tmp_path)
    (photos / "masks" / "train" / "0.png").unlink()
    with pytest.raises(DataError):
        prepare(config(photos), tmp_path)
    assert manifest(tmp_path) == before
