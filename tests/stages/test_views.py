"""Views are the same change of image and mask, whatever else is extracted beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

import featurestore
from featurestore import SpecMismatchError
from featurestore.dataset import FeatureLoader
from stages import report
from stages.augment.views import training_views
from stages.backbones.build import build_backbone
from stages.common.config import parse
from stages.common.errors import ConfigError
from stages.data import views
from stages.data.images import resize_pair
from stages.data.views import configured_views, make_view, stored_views
from stages.extract import ExtractConfig, check_spec
from tests.factories import SPEC, call, prepare, prepare_config, sample, write_photos
from tests.factories import extract as run
from tests.factories import extract_config as config

ALL = ["identity", "hflip", "rotate", "crop", "colour", "random-3"]
RANDOM = [f"random-{number}" for number in range(200)]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """``tmp_path`` with a prepared data set of 2 + 1 + 1 images of 64 x 64."""
    write_photos(tmp_path / "photos", {"train": 2, "val": 1, "test": 1})
    prepare(prepare_config(tmp_path / "photos"), tmp_path)
    return tmp_path


def scene(height: int = 90, width: int = 120) -> tuple[Image.Image, np.ndarray]:
    """Make an image whose red channel is ten times the class of its mask: 1 to 20, in blocks."""
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 5 // width
    mask = (1 + 5 * rows[:, None] + columns).astype(np.uint8)
    return Image.fromarray(np.stack([10 * mask, mask, mask], axis=2)), mask


def made(view: str, *, id: str = "a", seed: int = 0, **changes) -> tuple[np.ndarray, np.ndarray]:
    image, mask = changes.pop("pair", scene())
    settings = {"size": (64, 64), "rule": "stretch", **changes}
    return make_view(image, mask, id=id, view=view, seed=seed, **settings)


@pytest.mark.medium
def test_stored_features_of_a_view_are_those_of_the_changed_image(prepared: Path) -> None:
    stores = run(config(views=ALL, feature_dtype="float32", view_seed=3), prepared)
    train, size = stores["train"], (64, 64)
    assert train.views == [view for view in stored_views(ALL) for _ in range(2)]
    assert set(stores["val"].views) == set(stores["test"].views) == {"identity"}
    backbone = build_backbone(name="efficientnet_lite0", weights="default")
    different = set()
    for each in train:
        folder, name = prepared / "photos", Path(each.id).name
        image = Image.open(folder / "images/train" / f"{name}.jpg").convert("RGB")
        mask = np.asarray(Image.open(folder / "masks/train" / f"{name}.png"))
        pixels, labels = make_view(
            image, mask, id=each.id, view=each.view, seed=3, size=size, rule="stretch"
        )
        np.testing.assert_array_equal(each.image, pixels)
        np.testing.assert_array_equal(each.mask, labels)
        (expected,) = backbone(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])[0]
        torch.testing.assert_close(
            torch.from_numpy(each.features.copy()), expected, rtol=1e-3, atol=1e-3
        )
        different.add(pixels.tobytes())
    assert len(different) == len(train)  # no view is a copy of another


def test_hflip_mirrors_what_is_stored() -> None:
    image, mask = scene(40, 120)
    plain = resize_pair(image, mask, size=(64, 64), rule="pad")
    for actual, expected in zip(made("hflip", pair=(image, mask), rule="pad"), plain, strict=True):
        np.testing.assert_array_equal(actual, expected[:, ::-1])


@pytest.mark.parametrize("rule", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("view", ["rotate", "crop", "random-0", "random-1", "random-5"])
def test_the_mask_is_changed_as_the_image_is(
    view: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "_recoloured", lambda image, _: image)
    plain = np.asarray(resize_pair(*scene(), size=(256, 320), rule=rule)[1])
    for seed in range(5):
        image, mask = made(view, seed=seed, size=(256, 320), rule=rule)
        shown = np.where(image[..., 0] == 0, 25.5, image[..., 0] / 10)  # black: void
        agree = (shown == np.where(mask == 255, 25.5, mask)).mean()
        assert agree > 0.85  # borders of blocks are interpolated
        assert (np.where(image[..., 0] == 0, 255, 0) != np.where(mask == 255, 255, 0)).mean() < 0.02
        assert (mask != plain).mean() > 0.02
        assert set(np.unique(mask)) <= {*range(1, 21), 255}


def test_views_are_those_that_torchvision_makes_of_a_real_image(real_data: Path) -> None:
    root = real_data / "camvid"
    file = sorted((root / "images/train").iterdir())[7]
    image = Image.open(file).convert("RGB")
    mask = np.asarray(Image.open((root / "masks/train" / file.name).with_suffix(".png")))
    labels = tv_tensors.Mask(mask.copy())
    for id in ("a", "b", "c"):
        angle = views._rng(4, id, "rotate").uniform(-15, 15)
        turned = F.rotate(image, angle, F.InterpolationMode.BILINEAR)
        turned_mask = F.rotate(labels, angle, F.InterpolationMode.NEAREST, fill=255)
        settings = {"size": (128, 160), "rule": "stretch"}
        pixels, found = make_view(image, mask, id=id, view="rotate", seed=4, **settings)
        expected, wanted = resize_pair(turned, turned_mask.numpy(), **settings)
        np.testing.assert_array_equal(pixels, expected)
        assert (found != wanted).mean() < 0.005  # pixels on a border: Pillow rounds otherwise
        assert 0.002 < (found == 255).mean() - (mask == 255).mean() < 0.25
        assert set(np.unique(found)) <= set(np.unique(mask)) | {255}

        pixels, found = make_view(image, mask, id=id, view="colour", seed=4, **settings)
        plain, wanted = resize_pair(image, mask, **settings)
        np.testing.assert_array_equal(found, wanted)
        change = np.abs(pixels.astype(int) - plain).mean()
        assert 1 < change < 80


def test_strengths_have_the_documented_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    angles, boxes, factors = [], [], []
    monkeypatch.setattr(
        views, "_rotated", lambda image, mask, angle: (angles.append(angle), (image, mask))[1]
    )
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(
            F,
            f"adjust_{name}",
            lambda image, factor, name=name: (factors.append((name, factor)), image)[1],
        )
    monkeypatch.setattr(
        Image.Image, "crop", lambda image, box: (boxes.append(box), Image.new("RGB", (1, 1)))[1]
    )
    monkeypatch.setattr(views, "resize_pair", lambda image, mask, **_: (mask, mask))
    for number in range(400):
        for view in ("rotate", "crop", "colour"):
            made(view, id=str(number), pair=scene(100, 200))
    assert -15 <= min(angles) < -14.5
    assert 14.5 < max(angles) <= 15
    lefts, tops, rights, bottoms = np.array(boxes).T
    heights = bottoms - tops
    assert np.abs((rights - lefts) - 2 * heights).max() <= 1  # the image's aspect ratio
    assert (heights.min(), heights.max()) == (50, 100)
    assert tops.min() == lefts.min() == 0
    assert (bottoms.max(), rights.max()) == (100, 200)
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.6, 1.4),
        ("hue", -0.1, 0.1),
    ):
        drawn = [factor for kind, factor in factors if kind == name]
        assert low <= min(drawn) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(drawn) <= high


def test_a_random_view_is_one_of_the_mixtures_with_equal_probability() -> None:
    drawn = [
        frozenset(views._drawn_changes(views._rng(0, str(number), view)))
        for number in range(20)
        for view in RANDOM
    ]
    counts = {changes: drawn.count(changes) for changes in set(drawn)}
    assert len(counts) == 14
    assert all(changes - {"hflip"} for changes in counts)
    assert all(abs(count - 4000 / 14) < 5 * (4000 / 14) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3), (700, 500)], ids=str)
@pytest.mark.parametrize("rule", ["stretch", "pad", "crop"])
def test_every_view_of_every_image_can_be_made(size: tuple[int, int], rule: str) -> None:
    for view in [*ALL[:-1], *RANDOM[:8]]:
        for target in ((64, 64), (64, 224)):
            image, mask = made(view, pair=scene(*size), size=target, rule=rule)
            assert (image.shape, mask.shape) == ((*target, 3), target)
            assert (image.dtype, mask.dtype) == (np.uint8, np.uint8)


# -- a function of seed, id and view ---------------------------------------------------------------


@pytest.mark.parametrize("view", ["rotate", "crop", "colour", "random-0"])
def test_a_view_is_a_function_of_seed_id_and_view(view: str) -> None:
    image, mask = scene()
    first = made(view)[0]
    np.random.rand(3)  # noqa: NPY002
    assert np.array_equal(made(view, pair=(image, mask))[0], first)
    assert not np.array_equal(made(view, seed=1)[0], first)
    assert not np.array_equal(made(view, id="b")[0], first)
    if view == "random-0":
        assert not np.array_equal(made("random-1")[0], first)


@pytest.mark.medium
def test_images_and_masks_do_not_depend_on_batch_workers_and_other_views(prepared: Path) -> None:
    def content(**changes) -> dict[tuple[str, str], tuple[bytes, bytes]]:
        workers = changes.pop("workers", 0)
        store = run(config(**changes), prepared, workers=workers)["train"]
        return {(each.id, each.view): (each.image.tobytes(), each.mask.tobytes()) for each in store}

    first = content(views=["identity", "random-2", "crop"])
    second = content(views=["random-3", "identity", "rotate"], batch_size=5, workers=2)
    shared = set(first) & set(second)
    assert {view for _, view in shared} == {"identity", "random-0", "random-1"}
    assert all(first[name] == second[name] for name in shared)
    other = content(views=["identity", "random-2"], view_seed=1)
    assert all((other[name] == first[name]) == (name[1] == "identity") for name in other)


@pytest.mark.medium
def test_the_seed_counts_only_for_views_that_draw(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, drawn = ["identity", "hflip"], ["identity", "crop"]
    run(config(views=plain), prepared, out="a")
    run(config(views=drawn), prepared, out="b")
    monkeypatch.setattr(featurestore, "create", lambda *_, **__: pytest.fail("extracted again"))
    run(config(views=plain, view_seed=5), prepared, out="a")
    run(config(views=drawn), prepared, out="b")
    with pytest.raises(pytest.fail.Exception, match="extracted again"):
        run(config(views=drawn, view_seed=5), prepared, out="b")


# -- training --------------------------------------------------------------------------------------


def stored(path: Path, names: list[str], images: int = 6) -> featurestore.FeatureStore:
    """Write a store of equal samples with the given views of each image."""
    with featurestore.create(path, SPEC, fingerprint="f") as writer:
        for view in names:
            for number in range(images):
                writer.append(**{**sample(number), "id": f"photo {number}", "view": view})
    return featurestore.open(path)


def test_training_draws_among_all_stored_views_of_its_image(tmp_path: Path) -> None:
    store = stored(tmp_path / "train", ["rotate", "identity", "random-0", "random-1"])
    positions = training_views(store, "random")
    assert positions.shape == (6, 4)
    assert [[store.views[p] for p in row] for row in positions] == [
        ["identity", "rotate", "random-0", "random-1"]
    ] * 6
    assert all(len({store.ids[p] for p in row}) == 1 for row in positions)
    loader = FeatureLoader(store, 3, seed=0, positions=positions)
    assert len(loader) == len(FeatureLoader(store, 3, seed=0, positions=positions[:, 0])) == 2
    drawn: list[int] = []
    for epoch in range(100):
        seen = [p for batch in loader.epoch(epoch) for p in batch.positions.tolist()]
        assert {store.ids[p] for p in seen} == set(store.ids)  # each image once an epoch
        drawn += seen
    counts = np.bincount(drawn, minlength=24)
    assert abs(counts - 25).max() < 5 * 25**0.5


def test_two_views_are_drawn_as_before(tmp_path: Path) -> None:
    store = stored(tmp_path / "train", ["identity", "hflip"])
    np.testing.assert_array_equal(
        training_views(store, "random"), np.stack([np.arange(6), np.arange(6, 12)], axis=1)
    )
    np.testing.assert_array_equal(training_views(store, "identity"), np.arange(6))


def test_a_store_without_the_views_that_training_draws_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecMismatchError, match=r"holds no view but identity.* add hflip, rotate"):
        training_views(stored(tmp_path / "one", ["identity"]), "random")
    stored(tmp_path / "two", ["identity", "hflip"])
    with featurestore.create(tmp_path / "half", SPEC, fingerprint="f") as writer:
        for number, view in ((0, "identity"), (1, "identity"), (0, "crop")):
            writer.append(**{**sample(number), "view": view})
    with pytest.raises(SpecMismatchError, match="there is no view crop of photo 1 é; add it to"):
        training_views(featurestore.open(tmp_path / "half"), "random")


def test_inspect_lists_the_views_of_a_store(tmp_path: Path) -> None:
    stored(tmp_path / "several", ["identity", "crop", "random-0", "random-1"], images=1)
    stored(tmp_path / "one", ["identity"], images=1)
    several, one = (call("inspect", str(tmp_path / name)).stdout for name in ("several", "one"))
    assert "  views       identity, crop, random-2\n" in several
    assert "\n  views" not in one


def test_the_report_shows_unchanged_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path / "train", ["crop", "identity", "random-0"])

    def shown(config, store, gan, device, chosen) -> None:
        assert sorted(chosen) == store.positions("identity").tolist()
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "_sample", shown)
    with pytest.raises(KeyboardInterrupt):
        report._generated(report.ReportConfig(), store, tmp_path, torch.device("cpu"))


# -- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["identity", "random-0"], r"extract.views.1: should be identity, hflip, rotate, crop, "),
        (["identity", "random-04"], r"random-K with K from 1 to 1000, found 'random-04'"),
        (["identity", "random-1001"], "found 'random-1001'"),
        (["identity", "random"], "found 'random'"),
        (["identity", "rotated"], "found 'rotated'"),
        (["identity", "crop", "crop"], "extract.views: crop is listed twice"),
        (["identity", "random-2", "random-4"], "extract.views: random-K is listed twice; list it"),
        (["hflip", "rotate"], "extract.views: must contain identity"),
    ],
    ids=str,
)
def test_views_that_cannot_be_made_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(TypeAdapter(ExtractConfig), {"views": names}, "extract")


def test_names_of_views_and_parameters_correspond() -> None:
    assert stored_views(ALL)[4:] == ("colour", "random-0", "random-1", "random-2")
    assert configured_views(["identity"] * 3 + list(stored_views(ALL))) == tuple(ALL)


def test_a_store_of_other_views_than_the_parameters_is_refused(prepared: Path) -> None:
    run(config(views=["identity", "crop", "random-2"]), prepared)
    asked = config(views=["random-2", "crop", "identity"])
    for split in ("train", "val", "test"):
        check_spec(asked, prepared / "features" / split)
    with pytest.raises(
        SpecMismatchError, match=r"was extracted with views .*random-2.* say .*iden"
    ):
        check_spec(config(), prepared / "features" / "train")
    check_spec(config(), prepared / "features" / "val")
