"""The first approach: a conditional GAN's generator without SPADE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stages.gan.networks import build_networks
from stages.models.concat_generator import ConcatGenerator
from stages.models.generator import Generator
from stages.reporting.curves import read_curves
from stages.train_gan import TrainGanConfig
from stages.training.models import load_generator
from tests.factories import GAN, VARIANTS, run_decoder, run_gan


def generator(**changes) -> ConcatGenerator:
    settings = {
        "num_classes": 5,
        "feature_shape": (20, 8, 12),
        "nonnegative": True,
        "feature_scale": torch.rand(20) + 0.5,
        "z_dim": 7,
        "ngf": 1,
        "init_gain": 1.0,
    }
    return ConcatGenerator(**{**settings, **changes})


def random_masks(batch: int, height: int = 64, width: int = 96) -> Tensor:
    masks = torch.randint(0, 5, (batch, height, width), dtype=torch.uint8)
    masks[:, :9] = 255
    return masks


@pytest.mark.parametrize(
    "options", [{}, {"feature_shape": (20, 9, 13)}, {"norm": "instance"}, {"z_dim": 0}], ids=str
)
def test_features_have_the_stores_shape_and_follow_mask_and_noise(options: dict) -> None:
    network = generator(**options).eval()
    masks, z = random_masks(2), torch.randn(4, network.z_dim)
    scaled = network(z, masks)
    assert scaled.shape == (4, *options.get("feature_shape", (20, 8, 12)))
    assert scaled.min() >= 0
    torch.testing.assert_close(network.generate(masks, z=z), scaled * network.feature_scale)
    torch.testing.assert_close(scaled[2:], network(z[2:], masks), rtol=1e-4, atol=1e-5)
    assert (scaled - network(z, (masks + 1) % 5)).abs().mean() > 1e-3
    other = network(torch.randn(4, network.z_dim), masks)
    assert ((scaled - other).abs().mean() > 1e-3) == bool(network.z_dim)


def test_every_feature_pixels_label_is_read() -> None:
    network = generator().eval()
    masks, z = torch.zeros(1, 64, 96, dtype=torch.uint8), torch.randn(1, 7)
    for row, column in ((0, 0), (3, 5), (7, 11)):
        changed = masks.clone()
        changed[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
        assert (network(z, changed) != network(z, masks)).any()


def test_mask_and_noise_are_read_by_the_first_layer_and_by_no_other() -> None:
    """With the first layer's output fixed, nothing else depends on them."""
    network, z = generator(), torch.randn(2, 7)
    assert network.first.in_channels == 7 + 16 * 6
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 8
    assert all(layer.affine for layer in norms)
    network.eval().first.register_forward_hook(lambda *_: torch.ones(2, 16, 2, 3))
    masks = random_masks(2)
    assert torch.equal(network(z, masks), network(torch.randn(2, 7), (masks + 1) % 5))


def test_widths_and_upsampling_are_those_of_the_spade_generator() -> None:
    settings = {
        "num_classes": 21,
        "feature_shape": (2048, 32, 32),
        "nonnegative": True,
        "feature_scale": torch.ones(2048),
    }
    with torch.device("meta"):
        plain, spade = ConcatGenerator(**settings), Generator(**settings)
    for name in ("quarter", "half_0", "half_1", "full"):
        one, other = plain.get_submodule(name), spade.get_submodule(name)
        for layer in ("conv_0", "conv_1"):
            shapes = [block.get_submodule(layer).weight.shape for block in (one, other)]
            assert shapes[0] == shapes[1] == (1024, 1024, 3, 3)
    assert plain.to_features.weight.shape == spade.to_features.weight.shape


@pytest.mark.medium
def test_its_collapse_measures_stand_beside_spades_and_a_decoder_learns(
    features: Path, tmp_path: Path
) -> None:
    rows = {
        name: run_gan(features, tmp_path / name, frozen_epochs=2, conditioning=name)
        for name in ("spade", "concat")
    }
    assert rows["spade"].keys() == rows["concat"].keys()
    measures = {"monitor/diversity", "monitor/variance_ratio", "monitor/frechet"}
    assert measures <= rows["concat"].keys()
    assert isinstance(load_generator(tmp_path / "concat" / "gan"), ConcatGenerator)
    for name in ("frozen", "edited", "featuregan-1x"):
        run_decoder(features, tmp_path / "concat", VARIANTS[name], name=name, epochs=1)
        assert "decoder/ce_added" in read_curves(tmp_path / "concat" / "metrics" / f"{name}-0")


def test_descriptions_without_the_key_are_of_spade_generators() -> None:
    described = {
        **TrainGanConfig(**GAN).model_dump(),
        "num_classes": 3,
        "feature_shape": [12, 8, 8],
        "output_stride": 8,
        "nonnegative": True,
    }
    del described["conditioning"]
    assert isinstance(build_networks(described).generator, Generator)
    concat = build_networks({**described, "conditioning": "concat"}).generator
    assert isinstance(concat, ConcatGenerator)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"family": "flow"}, "family flow does not work with conditioning concat; set it to gan"),
        ({"prior": "class-means"}, "prior class-means does not work with conditioning concat"),
        ({"noise": "spatial"}, "noise spatial does not work with conditioning concat; set it to"),
    ],
)
def test_keys_of_other_generators_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainGanConfig(**{**GAN, "conditioning": "concat", **changes})
