"""Stores of several layers: bytes, reading, and the map that layers are assembled into."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import featurestore
from featurestore import FeatureStore, SampleError, SpecMismatchError, StoreSpec
from featurestore.dataset import FeatureLoader, assemble, gather_maps, split_map
from featurestore.layouts import LAYOUTS
from featurestore.statistics import Statistics
from tests.factories import SPEC

# Of images of 64 x 96: strides 4, 8, 16 and 32, whose sides are halved and rounded up.
SHAPES = {"a": (2, 16, 24), "b": (3, 8, 12), "c": (4, 4, 6), "d": (5, 2, 3)}
LAYERED = dataclasses.replace(
    SPEC,
    feature_shape=(2 * 4 + 3 + 4 + 5, 8, 12),
    mask_shape=(64, 96),
    output_stride=8,
    layer_names=tuple(SHAPES),
    layer_shapes=tuple(SHAPES.values()),
)


def layers_of(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {name: rng.random(shape).astype(np.float16) for name, shape in SHAPES.items()}


def write_layers(path: Path, spec: StoreSpec = LAYERED, count: int = 5) -> FeatureStore:
    with featurestore.create(path, spec, samples_per_shard=2) as writer:
        for number in range(count):
            rng = np.random.default_rng([1, number])
            mask = rng.integers(spec.num_classes, size=spec.mask_shape).astype(np.uint8)
            image = rng.integers(256, size=(*spec.mask_shape, 3)).astype(np.uint8)
            writer.append(
                id=str(number),
                features=layers_of(number),
                mask=mask,
                image=image if spec.has_images else None,
            )
    return featurestore.open(path)


@pytest.mark.parametrize("compression", [name for name in LAYOUTS if name != "int8"])
def test_every_layer_is_read_as_it_was_written(tmp_path: Path, compression: str) -> None:
    store = write_layers(tmp_path / "s", dataclasses.replace(LAYERED, compression=compression))
    store.verify()
    for number in range(5):
        for name, expected in layers_of(number).items():
            np.testing.assert_array_equal(store.features(number, name), expected)
            np.testing.assert_array_equal(store[number].layers[name], expected)
            gathered = store.gather(f"layers/{name}/features", [4, number])
            np.testing.assert_array_equal(gathered[1], expected)


def test_layers_are_read_by_plain_hdf5(tmp_path: Path) -> None:
    write_layers(tmp_path / "s")
    with h5py.File(tmp_path / "s" / "shard-00001.h5") as file:
        assert file.attrs["format_version"] == 2
        assert [name.decode() for name in file.attrs["layer_names"]] == list(SHAPES)
        assert file.attrs["layer_shapes"].tolist() == [list(shape) for shape in SHAPES.values()]
        np.testing.assert_array_equal(file["layers/c/features"][1], layers_of(3)["c"])
        assert "features" not in file


def test_the_layers_of_an_uncompressed_store_are_not_copied(tmp_path: Path) -> None:
    store = write_layers(tmp_path / "s")
    assert not store.features(0, "b").flags.owndata
    assert not store.select(["b"]).features(0).flags.owndata


def reference_map(number: int) -> torch.Tensor:
    """Assemble as docs/format.md says, pixel by pixel for the folded layer: (C, h, w)."""
    layers = {name: torch.from_numpy(x).float()[None] for name, x in layers_of(number).items()}
    folded = torch.stack(
        [layers["a"][0, c, y::2, x::2] for c in range(2) for y in range(2) for x in range(2)]
    )
    upsampled = [
        F.interpolate(layers[name], (8, 12), mode="bilinear", align_corners=False)[0]
        for name in "cd"
    ]
    return torch.cat([folded, layers["b"][0], *upsampled])


@pytest.mark.parametrize("cache", ["none", "host"])
def test_the_loader_assembles_one_map(tmp_path: Path, cache: str) -> None:
    store = write_layers(tmp_path / "s")
    (batch,) = FeatureLoader(store, 5, cache=cache)
    expected = torch.stack([reference_map(number) for number in range(5)])
    torch.testing.assert_close(batch.features, expected)
    assert batch.features.shape[1:] == store.spec.feature_shape
    assert torch.equal(gather_maps(store, range(5)), batch.features)


@pytest.mark.parametrize(
    ("names", "folds", "shape", "stride"),
    [
        (["b", "d"], ((3, 1), (5, 1)), (8, 8, 12), 8),
        (["c", "d"], ((4, 1), (5, 1)), (9, 4, 6), 16),
        (["d"], ((5, 1),), (5, 2, 3), 32),
        (["a"], ((2, 2),), (8, 8, 12), 8),
        (["a", "c"], ((2, 4), (4, 1)), (36, 4, 6), 16),
    ],
)
def test_selected_layers_make_a_map_on_their_own_grid(
    tmp_path: Path,
    names: list[str],
    folds: tuple[tuple[int, int], ...],
    shape: tuple[int, int, int],
    stride: int,
) -> None:
    store = write_layers(tmp_path / "s").select(names)
    assert (store.spec.folds, store.spec.feature_shape) == (folds, shape)
    assert store.spec.output_stride == stride
    (batch,) = FeatureLoader(store, 5)
    assert batch.features.shape == (5, *shape)
    layers = [torch.from_numpy(np.stack([layers_of(i)[n] for i in range(5)])) for n in names]
    assert torch.equal(batch.features, assemble(layers, store.spec))


def test_the_only_layer_is_handed_on_as_it_is_stored(tmp_path: Path) -> None:
    (batch,) = FeatureLoader(write_layers(tmp_path / "s").select(["b"]), 5)
    assert batch.features.dtype == torch.float16
    assert torch.equal(batch.features[3], torch.from_numpy(layers_of(3)["b"]))


@pytest.mark.parametrize("single", [False, True], ids=["store", "shard"])
def test_statistics_are_of_the_channels_of_the_map(tmp_path: Path, single: bool) -> None:
    store = write_layers(tmp_path / "s", count=2)
    if single:
        store = featurestore.open(tmp_path / "s" / "shard-00000.h5")
    parts = []
    for name in "da":
        values = np.stack([layers_of(i)[name] for i in range(2)]).astype(np.float64)
        parts.append(np.repeat(values.mean((0, 2, 3)), 4 if name == "a" else 1))
    stats = store.select(["d", "a"]).stats  # in the store's order, a grid of stride 32
    assert isinstance(stats, Statistics)
    np.testing.assert_allclose(stats.mean[-5:], parts[0], rtol=1e-5)
    assert len(stats.mean) == store.select(["d", "a"]).spec.feature_shape[0] == 2 * 64 + 5
    np.testing.assert_allclose(store.stats.mean[:8], parts[1], rtol=1e-5)
    assert len(store.stats.std) == store.spec.feature_shape[0]


def test_a_layer_that_is_not_stored_is_refused_with_those_that_are(tmp_path: Path) -> None:
    store = write_layers(tmp_path / "s")
    with pytest.raises(SpecMismatchError, match="'e' is not stored; stored is a, b, c, d"):
        store.select(["b", "e"])
    with pytest.raises(SpecMismatchError, match="has several layers; name one of a, b, c, d"):
        store.features(0)
    with pytest.raises(SpecMismatchError, match="has no layer 'e' of a, b, c, d"):
        store.features(0, "e")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"a": None}, "layers are"),
        ({"c": np.zeros((4, 4, 5), np.float16)}, r"c features are \(4, 4, 5\)"),
    ],
)
def test_a_sample_needs_every_layer_in_its_shape(
    tmp_path: Path, layers: dict[str, np.ndarray | None], message: str
) -> None:
    given = {name: x for name, x in {**layers_of(0), **layers}.items() if x is not None}
    mask = np.zeros(LAYERED.mask_shape, np.uint8)
    with (
        pytest.raises(SampleError, match=message),
        featurestore.create(tmp_path / "s", LAYERED) as writer,
    ):
        writer.append(id="x", features=given, mask=mask)


def test_a_spec_with_layers_that_do_not_make_its_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"make a map of \(20, 8, 12\), but feature_shape is"):
        dataclasses.replace(LAYERED, feature_shape=(19, 8, 12))
    with pytest.raises(ValueError, match="'a' of 15 x 24 is no multiple of the grid 8 x 12"):
        dataclasses.replace(LAYERED, layer_shapes=((2, 15, 24), *list(SHAPES.values())[1:]))


def test_a_split_map_assembles_to_itself(tmp_path: Path) -> None:
    store = write_layers(tmp_path / "s")
    maps = gather_maps(store, [3, 1])
    layers = split_map(maps, store.spec)
    assert [tuple(layer.shape[1:]) for layer in layers] == [
        SHAPES["a"],
        SHAPES["b"],
        (4, 8, 12),
        (5, 8, 12),
    ]
    np.testing.assert_array_equal(layers[0][1], layers_of(1)["a"])
    assert torch.equal(assemble(layers, store.spec), maps)


def test_only_layers_and_native_strides_make_a_store_of_version_2(tmp_path: Path) -> None:
    native = dataclasses.replace(SPEC, native_strides=True)
    assert (SPEC.format_version, native.format_version, LAYERED.format_version) == (1, 2, 2)
    assert "native_strides" not in SPEC.to_attributes()
    for spec in (SPEC, native, LAYERED):
        assert StoreSpec.from_attributes(spec.to_attributes()) == spec
        assert StoreSpec.from_dict(spec.to_dict()) == spec
