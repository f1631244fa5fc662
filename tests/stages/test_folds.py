"""A layer folded space-to-depth is transformed as the layer itself would be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import featurestore
from featurestore import StoreSpec
from featurestore.dataset import Batch
from stages.augment.channel_dropout import ChannelDropout, ChannelDropoutConfig
from stages.common.runtime import make_accelerator
from stages.gan.gan_trainer import GanTrainer
from stages.gan.networks import Networks
from stages.gan.objective import Objective
from stages.models.discriminator import Discriminator
from stages.models.generator import Generator
from stages.segmentation.folds import expand_channels, mirror, unfolded_channels
from stages.segmentation.transforms import augment

FOLDS = ((2, 2), (5, 1), (3, 4))  # 8 + 5 + 48 channels
CHANNELS, HEIGHT, WIDTH, STRIDE = 61, 4, 6, 8


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layers(batch: int) -> list[Tensor]:
    """Draw each layer of FOLDS at its own resolution."""
    return [
        torch.rand(batch, channels, fold * HEIGHT, fold * WIDTH, generator=rng(channels)) + 0.5
        for channels, fold in FOLDS
    ]


def folded(maps: list[Tensor]) -> Tensor:
    """Assemble layers as the loader does."""
    pairs = zip(maps, FOLDS, strict=True)
    return torch.cat([F.pixel_unshuffle(layer, fold) for layer, (_, fold) in pairs], 1)


def unfolded(features: Tensor) -> list[Tensor]:
    blocks = features.split([channels * fold**2 for channels, fold in FOLDS], 1)
    pairs = zip(blocks, FOLDS, strict=True)
    return [F.pixel_shuffle(block, fold) for block, (_, fold) in pairs]


def test_a_mirrored_map_unfolds_to_mirrored_layers() -> None:
    maps = layers(3)
    assert torch.equal(mirror(folded(maps), FOLDS), folded([layer.flip(-1) for layer in maps]))
    with_draws = folded(maps)[None].repeat(2, 1, 1, 1, 1)
    assert torch.equal(mirror(mirror(with_draws, FOLDS), FOLDS), with_draws)
    plain = torch.rand(2, 7, 3, 5)
    assert torch.equal(mirror(plain, ((7, 1),)), plain.flip(-1))


def test_values_of_channels_are_repeated_for_their_sub_pixels() -> None:
    assert unfolded_channels(FOLDS) == 10
    values = torch.arange(20).view(2, 10)
    expected = torch.cat([values[:, :2].repeat_interleave(4, 1), values[:, 2:7]], 1)
    expected = torch.cat([expected, values[:, 7:].repeat_interleave(16, 1)], 1)
    assert torch.equal(expand_channels(values, FOLDS), expected)


def test_flip_mirrors_folded_layers_as_it_mirrors_images() -> None:
    maps, masks = layers(8), torch.randint(0, 5, (8, 32, 48), dtype=torch.uint8)
    (flipped,), moved = augment([folded(maps)], masks, ["flip"], rng(), FOLDS)
    chosen = torch.rand(8, generator=rng()) < 0.5
    assert 0 < chosen.sum() < 8
    for layer, changed in zip(maps, unfolded(flipped), strict=True):
        assert torch.equal(changed[chosen], layer[chosen].flip(-1))
        assert torch.equal(changed[~chosen], layer[~chosen])
    assert torch.equal(moved[chosen], masks[chosen].flip(-1))


def test_copy_paste_mirrors_the_sub_pixels_of_what_it_pastes() -> None:
    """Each sub-pixel shows its class and its column, so that a wrong order of columns is seen."""
    batch = 64
    classes = torch.zeros(batch, HEIGHT, WIDTH, dtype=torch.uint8)
    classes[:, 1:3, 2:4] = 1 + torch.arange(batch)[:, None, None].to(torch.uint8) % 3
    masks = classes.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)
    fine = torch.arange(4.0 * WIDTH).expand(batch, 1, 4 * HEIGHT, -1)
    features = F.pixel_unshuffle(fine, 4)
    (pasted,), moved = augment([features], masks, ["copy_paste"], rng(1), ((1, 4),))
    changed = (moved != masks)[:, ::STRIDE, ::STRIDE]
    assert changed.any()
    steps = F.pixel_shuffle(pasted, 4)[:, 0, ::4].unflatten(2, (WIDTH, 4)).diff(dim=-1)
    # Within a pasted pixel columns rise by 1, or fall by 1 where the object was mirrored.
    rising = (steps == 1).all(-1)
    assert (rising | (steps == -1).all(-1)).all()
    assert rising[~changed].any()
    assert (~rising)[changed].any()


@pytest.mark.parametrize("folds", [FOLDS, ((CHANNELS, 1),)])
def test_dropout_drops_all_sub_pixels_of_a_channel(folds: tuple[tuple[int, int], ...]) -> None:
    features, masks = folded(layers(50)), torch.zeros(50, 32, 48, dtype=torch.uint8)
    (dropped,), _ = augment([features], masks, ["channel_dropout"], rng(), folds)
    kept = torch.rand(50, unfolded_channels(folds), generator=rng()) >= 0.1
    expected = features * expand_channels(kept, folds)[:, :, None, None]
    assert torch.equal(dropped, expected)
    assert not kept.all()


def channel_dropout(features: Tensor, folds: tuple[tuple[int, int], ...]) -> Tensor:
    context = SimpleNamespace(
        accelerator=make_accelerator("cpu", "no"),
        decoder=None,
        store=SimpleNamespace(spec=SimpleNamespace(folds=folds)),
    )
    config = ChannelDropoutConfig(augmenter="channel-dropout", fraction=0.25)
    augmenter = ChannelDropout(config, context)  # type: ignore[arg-type]
    masks = torch.zeros(len(features), 32, 48, dtype=torch.uint8)
    batch = Batch(torch.arange(len(features)), features, masks, None)
    return augmenter.augment(batch, rng(3)).batches[0].features


def test_the_augmenter_drops_whole_channels_too() -> None:
    features = folded(layers(20))
    plain = channel_dropout(features, ((CHANNELS, 1),))
    kept = torch.rand(20, CHANNELS, 1, 1, generator=rng(3)) >= 0.25
    assert torch.equal(plain, features * kept / 0.75)
    kept = torch.rand(20, 10, generator=rng(3)) >= 0.25
    for number, layer in enumerate(unfolded(channel_dropout(features, FOLDS))):
        first = sum(channels for channels, _ in FOLDS[:number])
        of_layer = kept[:, first : first + FOLDS[number][0], None, None]
        assert torch.equal(layer, layers(20)[number] * of_layer / 0.75)


def test_the_discriminator_sees_folded_layers_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (CHANNELS, 8, 8)
    sizes = {"num_classes": 3}
    networks = Networks(
        Generator(
            **sizes,
            feature_shape=shape,
            nonnegative=True,
            feature_scale=torch.ones(CHANNELS),
            z_dim=4,
            ngf=1,
            spade_hidden=4,
        ),
        Discriminator(**sizes, feature_channels=CHANNELS, ndf=2),
    )
    trainer = GanTrainer(
        make_accelerator("cpu", "no"),
        networks,
        Objective(diffaugment=("flip",)),
        folds=FOLDS,
        generator_lr=1e-3,
        discriminator_lr=1e-3,
        betas=(0.0, 0.9),
    )
    seen: list[Tensor] = []
    judge = networks.discriminator.forward
    monkeypatch.setattr(
        networks.discriminator,
        "forward",
        lambda groups, masks: (seen.extend(groups), judge(groups, masks))[1],
    )
    real, masks = torch.rand(16, *shape), torch.zeros(16, 64, 64, dtype=torch.uint8)
    step = trainer.forward(real, masks, None, rng=rng())
    mirrored = [torch.equal(*pair) for pair in zip(seen[0], mirror(real, FOLDS), strict=True)]
    kept = [torch.equal(*pair) for pair in zip(seen[0], real, strict=True)]
    assert 0 < sum(mirrored) < 16
    assert [not each for each in mirrored] == kept
    chosen = torch.tensor(mirrored)[:, None, None, None]
    assert torch.equal(seen[1], torch.where(chosen, mirror(step.fake, FOLDS), step.fake))


def test_a_store_with_one_layer_has_nothing_folded(features: Path) -> None:
    spec: StoreSpec = featurestore.open(features / "train").spec
    assert spec.folds == ((12, 1),)
