"""Transformations change real features, generated features and the mask in the same way."""

from __future__ import annotations

import pytest
import torch

from stages.segmentation.transforms import TRANSFORMS, augment

BATCH, CHANNELS, HEIGHT, WIDTH, STRIDE = 6, 9, 8, 12, 4
FOLDS = ((CHANNELS, 1),)


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """Draw masks of classes 1 to 5; channel c of the features is the class, times c."""
    classes = torch.randint(
        1, 6, (BATCH, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0)
    ).to(torch.uint8)
    features = classes[:, None] * torch.arange(1, CHANNELS + 1).view(1, -1, 1, 1).float()
    return features, classes.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_features_and_mask_move_together_and_real_and_generated_alike(name: str) -> None:
    features, masks = sample()
    twice = torch.cat([features, 10 * features])  # two draws a mask
    (real, fake), moved = augment(
        [features, twice], masks, [name], torch.Generator().manual_seed(1), FOLDS
    )
    assert real.shape == features.shape
    assert moved.dtype == torch.uint8
    torch.testing.assert_close(fake, torch.cat([real, 10 * real]))
    small = moved[:, ::STRIDE, ::STRIDE]
    assert torch.equal(small.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2), moved)
    per_class = torch.where(small == 255, 0, small).float()
    numbers = torch.arange(1, CHANNELS + 1).view(1, -1, 1, 1)
    kept = real.flatten(2).amax(2) > 0  # (B, C): channels that were not dropped
    torch.testing.assert_close(real, per_class[:, None] * numbers * kept[:, :, None, None])
    assert not torch.equal(real, features)


def test_transformations_by_their_definitions() -> None:
    features, masks = sample()
    rng = torch.Generator().manual_seed(2)
    (flipped,), _ = augment([features], masks, ["flip"], rng, FOLDS)
    mirrored = [
        torch.equal(changed, before.flip(-1))
        for changed, before in zip(flipped, features, strict=True)
    ]
    assert 0 < sum(mirrored) < BATCH
    assert all(
        is_mirrored or torch.equal(changed, before)
        for is_mirrored, changed, before in zip(mirrored, flipped, features, strict=True)
    )

    (shifted,), moved = augment([features], masks, ["translation"], rng, FOLDS)
    for changed, before in zip(shifted, features, strict=True):
        fits = []
        for down in (-1, 0, 1):  # an eighth of 8 and of 12, rounded
            for right in (-2, -1, 0, 1, 2):
                expected = torch.zeros_like(before)
                rows, columns = (
                    slice(max(down, 0), HEIGHT + min(down, 0)),
                    slice(max(right, 0), WIDTH + min(right, 0)),
                )
                expected[:, rows, columns] = before.roll((down, right), (1, 2))[:, rows, columns]
                fits.append(torch.equal(changed, expected))
        assert sum(fits) == 1
    assert (moved == 255).any()

    (cut,), holed = augment([features], masks, ["cutout"], rng, FOLDS)
    for features_cut, mask in zip(cut, holed, strict=True):
        empty = (features_cut == 0).all(0)
        assert 0 < empty.sum() <= HEIGHT // 2 * WIDTH // 2
        assert torch.equal(mask[::STRIDE, ::STRIDE] == 255, empty)

    many = torch.ones(50, 400, 1, 1)
    (dropped,), _ = augment(
        [many], torch.zeros(50, 4, 4, dtype=torch.uint8), ["channel_dropout"], rng, ((400, 1),)
    )
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_gradients_pass_and_a_seed_repeats_the_transformations() -> None:
    features, masks = sample()
    features.requires_grad_()
    every = [name for name in TRANSFORMS if name != "copy_paste"]
    (first,), _ = augment([features], masks, every, torch.Generator().manual_seed(3), FOLDS)
    (again,), _ = augment([features], masks, every, torch.Generator().manual_seed(3), FOLDS)
    assert torch.equal(first, again)
    first.sum().backward()
    assert set(features.grad.unique().tolist()) == {
        0.0,
        1.0,
    }  # each value is shown once or not at all


def test_copy_paste_puts_a_class_of_another_sample_over_half_of_the_samples() -> None:
    # Each sample has a background class, and a square of another class that can be pasted.
    classes = (
        torch.arange(1, 201)[:, None, None].expand(-1, 8, 8).clone().to(torch.uint8) // 2 * 2
    )  # 0, 2, 2, 4, 4 ...
    classes[:, 2:5, 3:5] += 1
    features = classes[:, None].float().requires_grad_()
    masks = classes.repeat_interleave(4, 1).repeat_interleave(4, 2)
    (pasted_features,), moved = augment(
        [features], masks, ["copy_paste"], torch.Generator().manual_seed(0), ((1, 1),)
    )
    torch.testing.assert_close(pasted_features[:, 0], moved[:, ::4, ::4].float())
    changed = [
        (mask, before)
        for mask, before in zip(moved, masks, strict=True)
        if not torch.equal(mask, before)
    ]
    assert 0.4 < len(changed) / len(masks) < 0.6
    places = set()
    for mask, before in changed:
        (pasted,) = mask[mask != before].unique().tolist()
        assert pasted % 2 == 1  # never what covers most of a sample
        rows, columns = (mask[::4, ::4] == pasted).nonzero().T
        places.add((int(rows.min()), int(columns.min())))
        assert len(rows) <= 6 if pasted not in before else len(rows) <= 12
    assert {row for row, _ in places} == {0, 1, 2, 3, 4}  # 2 shifted by up to a quarter of 8
    pasted_features.sum().backward()
    assert features.grad is not None
    assert features.grad.sum() == pasted_features.numel()  # every pixel comes from one place


def test_copy_paste_leaves_samples_of_one_class_as_they_are() -> None:
    masks = torch.full((4, 8, 8), 3, dtype=torch.uint8)
    masks[:, :2] = 255
    features = torch.randn(4, 5, 2, 2)
    (pasted_features,), moved = augment(
        [features], masks, ["copy_paste"], torch.Generator().manual_seed(0), ((5, 1),)
    )
    assert torch.equal(pasted_features, features)
    assert torch.equal(moved, masks)
