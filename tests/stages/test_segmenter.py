"""Images of any size keep their size and place, with the scores that training measured."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import featurestore
from stages.common.errors import ConfigError, DataError
from stages.common.windows import Grid
from stages.segmentation import joining
from stages.segmentation.metrics import confusion_matrix, score
from stages.training.models import load_decoder, read_spec
from stages.use import Segmenter
from stages.use.windows import View, cut
from tests.factories import SPEC
from tests.imports import ROOT

PALETTE = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
)  # equally far from black, so that padding is of no class


class Colours(nn.Module):
    """A backbone whose features are the mean colours of 8 x 8 pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images.float(), 8)


class Nearest(nn.Module):
    """A decoder that knows the classes by their colours."""

    def forward(self, features: Tensor) -> Tensor:
        centres = torch.tensor(PALETTE, dtype=torch.float32)[
            None, :, :, None, None
        ]  # (1, K, 3, 1, 1)
        return -((features[:, None] - centres) ** 2).sum(2) / 1e4


def by_colour(rule: str = "stretch", size: tuple[int, int] = (64, 64)) -> Segmenter:
    """A segmenter that needs no training: every pixel is of the class whose colour it has."""
    spec = dataclasses.replace(
        SPEC,
        feature_shape=(3, size[0] // 8, size[1] // 8),
        mask_shape=size,
        palette=PALETTE,
        resize=rule,
    )
    return Segmenter(Colours(), Nearest(), spec, device=torch.device("cpu"))


def blocks(height: int, width: int, *, across: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image of three blocks of colour and its classes: a half, then two quarters."""
    side = width if across else height
    line = np.repeat([0, 1, 2], [side // 2, side // 4, side - side // 2 - side // 4]).astype(
        np.uint8
    )
    classes = np.ascontiguousarray(
        np.broadcast_to(line if across else line[:, None], (height, width))
    )
    return np.array(PALETTE, np.uint8)[classes], classes


@pytest.mark.parametrize(
    ("rule", "mode", "size"),
    [
        ("stretch", "resize", (128, 192)),
        ("stretch", "resize", (192, 64)),
        ("stretch", "resize", (32, 48)),
        ("pad", "resize", (96, 128)),
        ("pad", "resize", (256, 128)),
        ("pad", "resize", (16, 32)),
        ("crop", "resize", (128, 192)),
        ("crop", "resize", (192, 64)),
        ("crop", "resize", (32, 64)),
        ("tile", "resize", (112, 160)),
        ("tile", "resize", (32, 112)),
        ("stretch", "slide", (112, 160)),
        ("stretch", "slide", (32, 48)),
        ("stretch", "slide", (32, 112)),
    ],
)
def test_blocks_come_back_at_their_very_place(rule: str, mode: str, size: tuple[int, int]) -> None:
    for across in (True, False):
        image, classes = blocks(*size, across=across)
        np.testing.assert_array_equal(by_colour(rule)(image, mode=mode), classes)


@pytest.mark.parametrize(
    ("scale", "size"), [(0.5, (224, 320)), (2.0, (56, 80)), (0.25, (256, 256))]
)
def test_slide_at_a_scale_comes_back_at_the_size_of_the_image(
    scale: float, size: tuple[int, int]
) -> None:
    for across in (True, False):
        image, classes = blocks(*size, across=across)
        np.testing.assert_array_equal(by_colour()(image, mode="slide", scale=scale), classes)


@pytest.mark.parametrize("mode", ["resize", "slide"])
@pytest.mark.parametrize("rule", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("size", [(61, 150), (200, 97), (64, 64), (1, 1), (300, 1), (65, 63)])
def test_any_size_has_probabilities_of_that_size(
    rule: str, mode: str, size: tuple[int, int]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    segmenter = by_colour(rule)
    found = segmenter.probabilities(image, mode=mode)
    assert found.shape == (3, *size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(found.argmax(0), segmenter(image, mode=mode))


@pytest.mark.parametrize(
    ("rule", "mode"), [("stretch", "resize"), ("crop", "resize"), ("stretch", "slide")]
)
def test_a_mirrored_image_is_segmented_mirrored(rule: str, mode: str) -> None:
    """A shift by half a pixel would show: noise has its borders everywhere."""
    image = np.random.default_rng(1).integers(0, 256, (90, 160, 3)).astype(np.uint8)
    segmenter = by_colour(rule)
    upright, mirrored = (
        segmenter.probabilities(image, mode=mode),
        segmenter.probabilities(image[::-1, ::-1].copy(), mode=mode),
    )
    np.testing.assert_allclose(
        mirrored[:, ::-1, ::-1], upright, atol=0.02
    )  # Pillow rounds to whole colours


@pytest.mark.parametrize(
    ("coarse", "fine"),
    [
        ((8, 8), (64, 64)),
        ((5, 7), (33, 90)),
        ((40, 30), (17, 11)),
        ((6, 6), (6, 9)),
        ((1, 1), (4, 5)),
    ],
)
def test_interpolation_in_parts_is_interpolation(
    coarse: tuple[int, int], fine: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "CHUNK_BYTES", 4 * 3 * fine[1] * 5)  # five rows
    scores = torch.randn(3, *coarse, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(scores[None], size=fine, mode="bilinear", align_corners=False)[0]
    for bands in ([scores], scores.split(2, 1), scores.split(1, 1)):
        parts = list(joining._interpolate(iter(bands), fine, coarse))
        assert max(part.shape[1] for part in parts) <= 5
        torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_interpolation_of_a_part_leaves_the_rest_out() -> None:
    scores = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(scores[None], size=(64, 64), mode="bilinear", align_corners=False)[0]
    for rows, columns in ((48, 40), (45, 64), (64, 3), (1, 1)):
        found = torch.cat(
            list(joining._interpolate(iter([scores]), (rows, columns), (rows / 8, columns / 8))), 1
        )
        torch.testing.assert_close(found, expected[:, :rows, :columns])


def test_windows_cover_everything_evenly() -> None:
    for side, overlap in ((64, 0.0), (65, 0.0), (100, 0.25), (1000, 0.25), (1000, 0.9), (10, 0.5)):
        grid = Grid.over((side, 64), (64, 64), overlap)
        starts = grid.tops
        assert grid.lefts == (0,)
        assert starts[0] == 0
        assert starts[-1] == max(0, side - 64)
        steps = np.diff(starts)
        assert (steps <= np.ceil(64 * (1 - overlap))).all()
        assert len(steps) == 0 or steps.max() - steps.min() <= 1


def test_slide_averages_where_windows_overlap() -> None:
    image = np.random.default_rng(2).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    segmenter = by_colour()
    left, right = segmenter.probabilities(image[:, :64]), segmenter.probabilities(image[:, 32:])
    found = segmenter.probabilities(image, mode="slide", overlap=0.5)
    np.testing.assert_allclose(found[..., :32], left[..., :32], atol=1e-6)
    np.testing.assert_allclose(found[..., 32:64], (left[..., 32:] + right[..., :32]) / 2, atol=1e-6)
    np.testing.assert_allclose(found[..., 64:], right[..., 32:], atol=1e-6)


@pytest.mark.parametrize("rule", ["stretch", "pad", "crop"])
def test_slide_is_resize_where_one_window_covers(rule: str) -> None:
    image = np.random.default_rng(3).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    segmenter = by_colour(rule)
    np.testing.assert_array_equal(
        segmenter.probabilities(image, mode="slide"), segmenter.probabilities(image)
    )


class Cells(nn.Module):
    """A backbone whose features are the mean colours of h x w cells, for any H and W."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float(), self.size)


@pytest.mark.parametrize(
    ("stride", "window", "cells"),
    [(14, (126, 98), (9, 7)), (16, (64, 96), (4, 6)), (32, (90, 75), (12, 10))],
)
def test_windows_of_any_stride_are_joined_as_training_upsamples(
    stride: int, window: tuple[int, int], cells: tuple[int, int]
) -> None:
    """H / h need not be an integer (the last case): the cells cover the window evenly."""
    spec = dataclasses.replace(
        SPEC, feature_shape=(3, *cells), mask_shape=window, output_stride=stride, palette=PALETTE
    )
    segmenter = Segmenter(Cells(cells), Nearest(), spec, device=torch.device("cpu"))

    def expected(image: np.ndarray) -> np.ndarray:
        """What a decoder's logits of one window, black outside of the image, are in training."""
        height, width = image.shape[:2]
        padded = np.pad(image, ((0, window[0] - height), (0, window[1] - width), (0, 0)))
        pixels = torch.from_numpy(padded).permute(2, 0, 1)[None]
        logits = Nearest()(Cells(cells)(pixels))
        whole = F.interpolate(logits, size=window, mode="bilinear", align_corners=False)
        return whole[0, :, :height, :width].softmax(0).numpy()

    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (*window, 3)).astype(np.uint8)
    whole = segmenter.probabilities(image)
    np.testing.assert_allclose(whole, expected(image), atol=1e-5)
    part = image[: window[0] // 2 + 3, : window[1] - 5]
    slid = segmenter.probabilities(part, mode="slide")
    np.testing.assert_allclose(slid, expected(part), atol=1e-5)
    wide = rng.integers(0, 256, (window[0], 2 * window[1], 3)).astype(np.uint8)
    halves = [segmenter.probabilities(half) for half in np.split(wide, 2, axis=1)]
    slid = segmenter.probabilities(wide, mode="slide", overlap=0.0)
    np.testing.assert_allclose(slid, np.concatenate(halves, 2), atol=1e-5)


@pytest.mark.parametrize("mode", ["resize", "slide"])
def test_a_batch_equals_its_images_one_by_one(mode: str) -> None:
    rng = np.random.default_rng(4)
    images = [
        rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        for size in ((50, 80), (64, 64), (130, 70), (20, 20))
    ]
    segmenter = by_colour("crop")
    for batch_size in (1, 3, 8):
        found = list(segmenter.segment(images, batch_size=batch_size, mode=mode))
        assert len(found) == len(images)
        for classes, image in zip(found, images, strict=True):
            np.testing.assert_array_equal(classes, segmenter(image, mode=mode))


@pytest.mark.medium
def test_a_large_image_does_not_need_all_its_logits_at_once() -> None:
    """40 classes of 4 megapixels are 640 MB."""
    code = (
        "import resource, numpy as np, torch\n"
        "from tests.stages.test_segmenter import Segmenter, Colours, SPEC, nn, dataclasses\n"
        "class Many(nn.Module):\n"
        "    def forward(self, features):\n"
        "        return features[:, :1] * torch.linspace(0, 1, 40)[None, :, None, None]\n"
        "names = tuple(map(str, range(40)))\n"
        "spec = dataclasses.replace(\n"
        "    SPEC, class_names=names, palette=((0, 0, 0),) * 40,\n"
        "    mask_shape=(256, 256), feature_shape=(3, 32, 32))\n"
        "segmenter = Segmenter(Colours(), Many(), spec, device=torch.device('cpu'))\n"
        "image = np.full((2000, 2000, 3), 200, np.uint8)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert (segmenter(image) == 39).all()\n"
        "assert (segmenter(image, mode='slide', overlap=0) == 39).all()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 400_000, "KB"


def test_images_are_paths_pil_images_and_arrays_turned_as_their_exif_tag_says(
    tmp_path: Path,
) -> None:
    image, classes = blocks(64, 128)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(image[::-1, ::-1]).save(tmp_path / "a.png", exif=exif)
    segmenter = by_colour()
    for given in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.open(tmp_path / "a.png"),
        image,
        Image.fromarray(image),
    ):
        np.testing.assert_array_equal(segmenter(given), classes)


def test_other_files_and_arrays_are_refused(tmp_path: Path) -> None:
    segmenter = by_colour()
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.jpg: not a readable image"):
        segmenter(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"b\.jpg: this image is missing"):
        segmenter(tmp_path / "b.jpg")
    for array in (
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match=r"an \(H, W, 3\) uint8 array"):
            segmenter(array)


def test_views_out_of_range_are_refused() -> None:
    for settings, words in (
        ({"mode": "whole"}, "mode: should be resize or slide, found 'whole'"),
        ({"overlap": 1.0}, "overlap: should be a fraction"),
        ({"scale": 0.0}, "scale: should be a number above 0"),
        ({"scale": float("nan")}, "scale: should be a number above 0"),
        ({"scale": 0.5}, "scale: should be 1 in mode resize"),
    ):
        with pytest.raises(ConfigError, match=words):
            View(**settings)


def test_images_through_both_networks_score_as_in_training(trained: Path) -> None:
    """Their size is the training's, so that only the features' rounding to float16 differs."""
    segmenter = Segmenter.load(trained / "models" / "decoders" / "baseline-0", device="cpu")
    stored = featurestore.open(trained / "features" / "test")
    predicted = segmenter.segment([sample.image for sample in stored], batch_size=4)
    confusion = torch.zeros(7, 7, dtype=torch.int64)
    for classes, sample in zip(predicted, stored, strict=True):
        confusion += confusion_matrix(
            torch.from_numpy(classes), torch.from_numpy(sample.mask.copy()), 7
        )
    found = score(confusion, stored.spec.class_names)
    expected = json.loads((trained / "metrics" / "baseline-0" / "test.json").read_text())
    assert abs(found.pixel_accuracy - expected["pixel_accuracy"]) < 1e-3
    assert abs(found.miou - expected["miou"]) < 1e-3
    files = sorted((trained / "photos" / "images" / "test").glob("*.jpg"))
    for file, classes in zip(files, segmenter.segment(files), strict=True):
        np.testing.assert_array_equal(segmenter(Image.open(file)), classes)


def test_probabilities_are_those_of_cached_features(trained: Path) -> None:
    folder = trained / "models" / "decoders" / "baseline-0"
    segmenter, decoder = (
        Segmenter.load(folder, device="cpu", weights="decoder-best"),
        load_decoder(folder, weights="decoder-best"),
    )
    sample = featurestore.open(trained / "features" / "test")[0]
    features = torch.from_numpy(sample.features.astype(np.float32))[None]
    expected = decoder(features, sample.mask.shape).softmax(1)[0].numpy()
    np.testing.assert_allclose(segmenter.probabilities(sample.image), expected, atol=5e-3)


def test_a_backbone_with_other_weights_is_refused(trained: Path, tmp_path: Path) -> None:
    import timm

    folder = trained / "models" / "decoders" / "baseline-0"
    torch.manual_seed(0)
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        DataError,
        match=r"other\.pth: these are other efficientnet_lite0 weights .*; give --backbone-weights",
    ):
        Segmenter.load(folder, backbone_weights=tmp_path / "other.pth", device="cpu")
    with pytest.raises(DataError, match=r"none\.pth: there is no such weights file"):
        Segmenter.load(folder, backbone_weights=tmp_path / "none.pth", device="cpu")
    with pytest.raises(ConfigError, match="weights: should be decoder or decoder-best"):
        Segmenter.load(folder, weights="best")
    with pytest.raises(DataError, match="there is no trained model here"):
        Segmenter.load(tmp_path)


def test_an_image_is_cut_by_the_rule_of_its_training(trained: Path) -> None:
    spec = read_spec(trained / "models" / "decoders" / "baseline-0")
    assert (spec.mask_shape, spec.resize) == ((64, 64), "stretch")
    shapes = {
        rule: cut(
            Image.new("RGB", (200, 100)), window=(64, 64), rule=rule, view=View()
        ).pixels.shape
        for rule in ("stretch", "pad", "crop", "tile")
    }
    assert shapes == {
        "stretch": (64, 64, 3),
        "pad": (32, 64, 3),
        "crop": (64, 128, 3),
        "tile": (100, 200, 3),
    }


@pytest.mark.medium
def test_importing_the_package_does_not_import_pytorch() -> None:
    """The command line imports it for --help."""
    code = (
        "import sys, stages.use\n"
        "assert 'torch' not in sys.modules\n"
        "assert stages.use.Segmenter.__name__ == 'Segmenter'\n"
        "assert not hasattr(stages.use, 'Segmenters')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
