"""train-decoder's heads on several layers, its optimizer, and its weights of the classes."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import featurestore
from stages import train_decoder
from stages.common.errors import ConfigError
from stages.training.models import load_decoder
from stages.training.update import adamw
from tests.factories import SPEC, run_decoder, stop_after

SHAPES = {"fine": (3, 16, 16), "grid": (6, 8, 8)}
LAYERED = dataclasses.replace(
    SPEC,
    feature_shape=(3 * 4 + 6, 8, 8),
    mask_shape=(64, 64),
    layer_names=tuple(SHAPES),
    layer_shapes=tuple(SHAPES.values()),
    has_images=False,
)
BASELINE = {"augmenter": "none"}


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of a layer of stride 4 and one of stride 8, which tell three classes apart."""
    root, rng = tmp_path_factory.mktemp("layered"), np.random.default_rng(0)
    centres = {name: 3 * rng.random((3, shape[0])) for name, shape in SHAPES.items()}
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        with featurestore.create(root / split, LAYERED, fingerprint=split) as writer:
            for number in range(count):
                squares = rng.choice(3, (4, 4), p=[0.75, 0.2, 0.05])
                labels = squares.repeat(4, 0).repeat(4, 1)
                features = {}
                for name, (channels, height, width) in SHAPES.items():
                    coarse = labels[:: 16 // height, :: 16 // width]
                    noise = 0.3 * rng.standard_normal((channels, height, width))
                    values = centres[name][coarse].transpose(2, 0, 1) + noise
                    features[name] = np.maximum(values, 0).astype(np.float32)
                mask = labels.repeat(4, 0).repeat(4, 1).astype(np.uint8)
                writer.append(id=f"{split} {number}", features=features, mask=mask, image=None)
    return root


@pytest.mark.medium
@pytest.mark.parametrize("head", ["linear", "deeplabv3plus"])
def test_heads_learn_from_layers_and_are_loaded(layered: Path, tmp_path: Path, head: str) -> None:
    scores = run_decoder(layered, tmp_path, BASELINE, name="b", decoder=head, epochs=20, lr=2e-2)
    folder = tmp_path / "decoders" / "b-0"
    assert scores.miou > 0.5  # chance, the frequent class everywhere, is 0.25
    decoder = load_decoder(folder)
    assert decoder.last.in_channels == {"linear": 18, "deeplabv3plus": 8}[head]
    described = json.loads((folder / "config.json").read_text())["architecture"]
    assert described["folds"] == [[3, 2], [6, 1]]
    size = (16, 16) if head == "deeplabv3plus" else (8, 8)
    assert decoder(torch.zeros(1, 18, 8, 8)).shape == (1, 3, *size)


@pytest.mark.medium
@pytest.mark.parametrize("variant", [BASELINE, {"augmenter": "isda"}], ids=["none", "isda"])
def test_a_killed_training_with_decay_and_class_weights_resumes_to_the_same_bits(
    layered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: dict
) -> None:
    changes = {"decoder": "deeplabv3plus", "weight_decay": 0.05, "class_weight_cap": 5.0}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_decoder(layered, whole, variant, name="b", **changes)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        run_decoder(layered, killed, variant, name="b", **changes)
    run_decoder(layered, killed, variant, name="b", **changes)
    resumed, undisturbed = (
        (root / "decoders" / "b-0" / "decoder.safetensors").read_bytes() for root in (killed, whole)
    )
    assert resumed == undisturbed


def test_deeplabv3plus_on_a_store_without_a_finer_layer_is_one_line(
    features: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        run_decoder(features, tmp_path, BASELINE, name="b", decoder="deeplabv3plus")
    assert str(error.value) == (
        "train_decoder.decoder: deeplabv3plus needs a layer on the grid 8 x 8 and a finer one, "
        f"found resnet50 8 x 8 in {features / 'train'}; add a layer of stride 4 to "
        "extract.layers, or choose another decoder"
    )
    assert not (tmp_path / "decoders").exists()


def test_real_and_added_batches_have_the_classes_weights_of_the_training_masks(
    layered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor | None] = []
    loss = train_decoder.upsampled_cross_entropy

    def look(logits: Tensor, masks: Tensor, class_weights: Tensor | None) -> Tensor:
        seen.append(class_weights)
        return loss(logits, masks, class_weights)

    monkeypatch.setattr(train_decoder, "upsampled_cross_entropy", look)
    variant = {"augmenter": "noise"}
    run_decoder(layered, tmp_path, variant, name="w", epochs=1, class_weight_cap=6.0)
    pixels = featurestore.open(layered / "train").stats.class_pixels
    expected = torch.tensor([min(6.0, float(pixels[0] / count)) for count in pixels])
    assert expected[2] == 6
    assert 1 < expected[1] < 6
    assert len(seen) == 2 * 2  # two steps, each of a real and an added batch
    for weights in seen:
        assert weights is not None
        torch.testing.assert_close(weights, expected)
    seen.clear()
    run_decoder(layered, tmp_path, variant, name="plain", epochs=1)
    assert seen == [None] * 4


# -- optimizer -------------------------------------------------------------------------------------


def trained(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    torch.manual_seed(1)
    for _ in range(5):
        network(torch.randn(4, 3, 7, 7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in network.parameters()]


def networks(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.Conv2d(9, 2, 1))
    return [copy.deepcopy(first) for _ in range(count)]


def test_without_decay_adamw_is_adam_bit_for_bit() -> None:
    ours, plain = networks(2)
    betas = (0.8, 0.99)
    adam = torch.optim.Adam(plain.parameters(), 1e-2, betas, fused=True)
    for actual, expected in zip(
        trained(ours, adamw({ours: 1e-2}, betas, 0.0)), trained(plain, adam), strict=True
    ):
        assert torch.equal(actual, expected)


def test_decay_shrinks_weights_of_convolutions_only() -> None:
    ours, reference = networks(2)
    betas = (0.9, 0.999)
    optimizer = adamw({ours: 1e-2}, betas, 0.5)
    groups = [
        {"params": [reference[0].weight, reference[2].weight], "weight_decay": 0.5},
        {
            "params": [reference[0].bias, *reference[1].parameters(), reference[2].bias],
            "weight_decay": 0.0,
        },
    ]
    expected = trained(reference, torch.optim.AdamW(groups, 1e-2, betas, fused=True))
    for actual, value in zip(trained(ours, optimizer), expected, strict=True):
        assert torch.equal(actual, value)
    (without,) = networks(1)
    undecayed = trained(without, adamw({without: 1e-2}, betas, 0.0))
    assert not torch.equal(undecayed[0], expected[0])
