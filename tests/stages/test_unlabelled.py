"""Unlabelled images: found, checked, extracted without labels, refused where they are labelled."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.common.errors import ConfigError, DataError
from stages.data.manifest import read_manifest
from tests.factories import extract, extract_config, prepare, prepare_config


def add_unlabelled(photos: Path, count: int = 3) -> None:
    folder = photos / "more" / "deep"
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (70, 90, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.mark.medium
def test_images_of_a_folder_are_extracted_without_labels(photos: Path, tmp_path: Path) -> None:
    add_unlabelled(photos)
    summary = prepare(prepare_config(photos, unlabelled="more"), tmp_path)
    assert summary["unlabelled"] == 3
    assert summary["images"] == 12
    stores = extract(extract_config(), tmp_path)
    store = stores["unlabelled"]
    assert store.ids == [f"unlabelled/deep/{number}.png" for number in range(3)]
    assert (store.mask(0) == 255).all()
    assert store.spec == stores["train"].spec
    assert len(stores["train"]) == 6


@pytest.mark.medium
def test_without_them_the_store_is_empty(photos: Path, tmp_path: Path) -> None:
    prepare(prepare_config(photos), tmp_path)
    store = extract(extract_config(), tmp_path)["unlabelled"]
    assert len(store) == 0
    store.verify()


def test_images_that_train_fraction_leaves_out_lose_their_labels(
    photos: Path, tmp_path: Path
) -> None:
    prepare(prepare_config(photos, train_fraction=0.5, unlabelled="left-out"), tmp_path)
    entries, _ = read_manifest(tmp_path / "dataset")
    splits = [entry.split for entry in entries]
    assert (splits.count("train"), splits.count("unlabelled")) == (3, 3)
    ids = {split: {e.id for e in entries if e.split == split} for split in set(splits)}
    assert not ids["train"] & ids["unlabelled"]
    assert all(not entry.mask for entry in entries if entry.split == "unlabelled")
    with pytest.raises(ConfigError) as error:
        prepare(prepare_config(photos, unlabelled="left-out"), tmp_path)
    assert str(error.value) == (
        "prepare.unlabelled: left-out needs images that prepare.train_fraction leaves out; lower it"
    )


def test_a_labelled_image_among_them_is_refused(photos: Path, tmp_path: Path) -> None:
    add_unlabelled(photos)
    copy = photos / "more" / "copy.jpg"
    shutil.copy(photos / "images" / "test" / "1.jpg", copy)
    with pytest.raises(DataError) as error:
        prepare(prepare_config(photos, unlabelled="more"), tmp_path)
    assert str(error.value) == (
        f"{copy}: is unlabelled here, and labelled as {photos / 'images' / 'test' / '1.jpg'} of"
        " the split 'test'; remove it from prepare.unlabelled"
    )


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_images_is_refused(photos: Path, tmp_path: Path, name: str) -> None:
    (photos / "empty").mkdir()
    with pytest.raises(DataError) as error:
        prepare(prepare_config(photos, unlabelled=name), tmp_path)
    assert str(error.value).startswith(f"{photos / name}: ")
    assert str(error.value).endswith("correct prepare.unlabelled")
