"""Real images go through: Pascal VOC 2012 and CamVid, with the real pretrained backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featurestore import FeatureStore
from stages import extract
from stages.data.manifest import read_manifest
from stages.datasets import camvid
from stages.prepare import run as prepare
from tests.factories import extract_config, prepare_config

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_voc_whole(real_data: Path, tmp_path: Path) -> None:
    root = real_data / "voc2012-partial"
    settings = prepare_config(root, dataset="voc", split="random")
    summary = prepare(settings, out=tmp_path / "dataset", scratch=tmp_path / "scratch", workers=2)
    assert {split: part["images"] for split, part in summary["splits"].items()} == {
        "train": 651,
        "val": 140,
        "test": 139,
    }
    assert summary["classes"][8] == "cat"
    total = sum(part["images_with_class"]["cat"] for part in summary["splits"].values())
    assert total == 131 + 119
    official = prepare_config(root, dataset="voc", split="official")
    summary = prepare(official, out=tmp_path / "official", scratch=tmp_path / "scratch", workers=2)
    assert {split: part["images"] for split, part in summary["splits"].items()} == {
        "train": 460,
        "val": 235,
        "test": 235,
    }


def test_camvid_whole(real_data: Path, tmp_path: Path) -> None:
    """SegNet's copy is read; the splits by the owners' frame names equal the copy's."""
    settings = prepare_config(real_data / "camvid", dataset="camvid")
    summary = prepare(settings, out=tmp_path / "dataset", scratch=tmp_path / "scratch", workers=2)
    assert {split: part["images"] for split, part in summary["splits"].items()} == {
        "train": 367,
        "val": 101,
        "test": 233,
    }
    shares = summary["splits"]["train"]["pixel_share"]
    assert shares["road"] == pytest.approx(0.317 / (1 - 0.039), abs=2e-3)
    assert shares["bicyclist"] == pytest.approx(0.003 / (1 - 0.039), abs=1e-3)
    entries, _ = read_manifest(tmp_path / "dataset")
    assert all(camvid.split_of(Path(entry.image)) == entry.split for entry in entries)


def test_camvid_extracts_and_a_linear_probe_sees_its_classes(
    real_data: Path, tmp_path: Path
) -> None:
    """Features of a few real frames separate sky, road and buildings linearly."""
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        for split, count in (("train", 12), ("val", 2), ("test", 4)):
            folder = tmp_path / "camvid" / kind / split
            folder.mkdir(parents=True)
            for file in sorted((real_data / "camvid" / kind / split).glob(f"*.{suffix}"))[
                :: 20 if split == "train" else 25
            ][:count]:
                (folder / file.name).symlink_to(file)
    settings = prepare_config(tmp_path / "camvid", dataset="camvid")
    prepare(settings, out=tmp_path / "dataset", scratch=tmp_path / "scratch", workers=2)
    stores = extract.run(
        extract_config(input_size=[256, 352]),
        dataset=tmp_path / "dataset",
        out=tmp_path / "features",
        scratch=tmp_path / "scratch",
        device="cpu",
        workers=1,
    )
    train, test = stores["train"], stores["test"]
    assert train.spec.feature_shape == (320, 32, 44)
    first = np.asarray(
        Image.open(sorted((tmp_path / "camvid" / "masks" / "train").iterdir())[0]).resize(
            (352, 256), Image.Resampling.NEAREST
        )
    )
    np.testing.assert_array_equal(train.mask(0), np.where(first == 11, 255, first))

    def vectors(store: FeatureStore) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.cat(
            [
                torch.from_numpy(store.features(n).astype(np.float32)).flatten(1).T
                for n in range(len(store))
            ]
        )
        labels = torch.cat(
            [
                torch.from_numpy(store.mask(n)[4::8, 4::8].astype(np.int64)).flatten()
                for n in range(len(store))
            ]
        )
        kept = (labels == 0) | (labels == 1) | (labels == 3)
        return features[kept], labels[kept]

    features, labels = vectors(train)
    centre, spread = features.mean(0), features.std(0)
    augmented = torch.cat([(features - centre) / spread, torch.ones(len(features), 1)], dim=1)
    targets = torch.nn.functional.one_hot(labels, 4).float()
    weights = torch.linalg.lstsq(
        augmented.T @ augmented + 10 * torch.eye(augmented.shape[1]), augmented.T @ targets
    ).solution
    features, labels = vectors(test)
    predicted = (
        torch.cat([(features - centre) / spread, torch.ones(len(features), 1)], dim=1) @ weights
    ).argmax(1)
    assert (predicted == labels).float().mean() > 0.9
