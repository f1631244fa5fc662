"""Every augmenter does what its source says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter

import featurestore
from featurestore import SpecMismatchError
from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, Labelled, transform_features
from stages.augment.cvae import CVAE, fit
from stages.augment.isda import ISDA
from stages.augment.mixup import MixupConfig
from stages.augment.new_masks import NewMasks, resample
from stages.augment.registry import Variant, build_augmenter
from stages.augment.upsample import repeat_factors
from stages.augment.views import find_views
from stages.common.errors import ConfigError
from stages.common.runtime import Machine, make_accelerator
from stages.models.decoder import Decoder
from stages.segmentation.class_statistics import ClassStatistics
from stages.segmentation.regions import Regions
from tests.factories import SPEC

CHANNELS, SIDE, STRIDE, CLASSES = 6, 4, 8, 3
VOID = 255


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> featurestore.FeatureStore:
    """Eight images and their mirrored views: 0 everywhere, 1 in all but two, 2 in two."""
    shapes = {"feature_shape": (CHANNELS, SIDE, SIDE), "mask_shape": (SIDE * STRIDE, SIDE * STRIDE)}
    spec = dataclasses.replace(SPEC, **shapes, feature_dtype="float32", nonnegative=False)
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("store") / "train"
    samples = []
    for number in range(8):
        labels = np.zeros((SIDE, SIDE), np.uint8)
        labels[:, 2:] = 1 if number < 6 else 0
        labels[3, :2] = 2 if number in (0, 5) else 0
        labels[0, 0] = VOID
        features = rng.standard_normal((CHANNELS, SIDE, SIDE)).astype(np.float32) + labels[
            None
        ].clip(0, 2)
        image = rng.integers(0, 256, (32, 32, 3), np.uint8)
        samples.append(
            (f"photo {number}", features, labels.repeat(STRIDE, 0).repeat(STRIDE, 1), image)
        )
    with featurestore.create(path, spec, fingerprint="f") as writer:
        for view, turn in (("identity", lambda x, axis: x), ("hflip", np.flip)):
            for id, features, mask, image in samples:
                mirrored = 10 * (view == "hflip")  # so that one can tell whose features they are
                writer.append(
                    id=id,
                    view=view,
                    features=turn(features, 2) + mirrored,
                    mask=turn(mask, 1),
                    image=turn(image, 1),
                )
    return featurestore.open(path)


@pytest.fixture
def batch(store: featurestore.FeatureStore) -> Batch:
    return read(store, [0, 1, 2, 5])


def read(store: featurestore.FeatureStore, positions: list[int]) -> Batch:
    features, masks = (
        torch.from_numpy(store.gather(name, positions)) for name in ("features", "masks")
    )
    return Batch(torch.tensor(positions), features, masks, None)


def build(store: featurestore.FeatureStore, tmp_path: Path, **variant) -> Augmenter:
    torch.manual_seed(0)
    decoder = Decoder(
        head="deeplab", in_channels=CHANNELS, num_classes=CLASSES, width=5, atrous_rates=(1, 2)
    )
    context = Context(
        "mine",
        make_accelerator("cpu", "no"),
        store,
        decoder,
        tmp_path / "gan",
        0,
        10,
        Machine(device="cpu"),
    )
    return build_augmenter(TypeAdapter(Variant).validate_python(variant), context)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augment(augmenter: Augmenter, batch: Batch, seed: int = 0) -> list[Labelled]:
    """Augment a batch, with the extra samples that the loader would bring."""
    extra = augmenter.extra_positions(batch.positions.tolist(), rng(seed))
    assert len(extra) == augmenter.extra_batches * len(batch)
    assert set(extra) <= set(augmenter.extra_sources.tolist())
    if extra:
        batch = dataclasses.replace(batch, extra=read(augmenter.store, extra))
    return augmenter.augment(batch, rng(seed)).batches


def only(augmenter: Augmenter, batch: Batch, seed: int = 0) -> Labelled:
    (part,) = augment(augmenter, batch, seed)
    return part


def small(masks: torch.Tensor) -> torch.Tensor:
    return masks[:, ::STRIDE, ::STRIDE]


def centre(features: torch.Tensor, masks: torch.Tensor, sample: int, number: int) -> torch.Tensor:
    """(C,) mean over the pixels of a class in a sample, the plain way."""
    return features[sample][:, small(masks)[sample] == number].mean(1)


def test_the_baseline_adds_nothing_and_duplicate_repeats_the_batch(store, batch, tmp_path) -> None:
    assert build(store, tmp_path, augmenter="none").augment(batch, rng()).batches == []
    part = only(build(store, tmp_path, augmenter="duplicate", weight=0.5), batch)
    assert torch.equal(part.features, batch.features)
    assert torch.equal(part.targets[0][0], batch.masks)
    assert (part.targets[0][1], part.weight) == (1.0, 0.5)
    assert (
        len(build(store, tmp_path, augmenter="duplicate", ratio=2).augment(batch, rng()).batches)
        == 2
    )


def test_noise_is_additive_in_deviations_and_multiplicative(store, batch, tmp_path) -> None:
    many = dataclasses.replace(
        batch, features=batch.features.repeat(300, 1, 1, 1), masks=batch.masks.repeat(300, 1, 1)
    )
    added = (
        only(
            build(store, tmp_path, augmenter="noise", additive=2.0, multiplicative=0.0), many
        ).features
        - many.features
    )
    within_maps = added.flatten(2).var(2).mean(0).sqrt()  # every value has its own draw
    torch.testing.assert_close(
        within_maps, 2 * torch.from_numpy(store.stats.std).float(), rtol=0.03, atol=0
    )
    times = (
        only(
            build(store, tmp_path, augmenter="noise", additive=0.0, multiplicative=0.3), many
        ).features
        / many.features
    )
    assert float(times.mean()) == pytest.approx(1, abs=0.01)
    assert float(times.flatten(2).var(2).mean().sqrt()) == pytest.approx(0.3, rel=0.02)
    augmenter = build(
        store, tmp_path, augmenter="noise", additive=1.0, multiplicative=0.0, deviation="class"
    )
    by_class = only(augmenter, many).features - many.features
    of_class = by_class.transpose(0, 1)[:, small(many.masks) == 2].std(1)
    expected = ClassStatistics.of(
        store, store.positions("identity"), torch.device("cpu")
    ).deviations[2]
    torch.testing.assert_close(of_class, expected, rtol=0.1, atol=0)


def test_channel_dropout_leaves_out_whole_channels_and_keeps_the_mean(
    store, batch, tmp_path
) -> None:
    many = dataclasses.replace(
        batch, features=torch.ones(2000, CHANNELS, 2, 2), masks=batch.masks[:1].repeat(2000, 1, 1)
    )
    features = only(
        build(store, tmp_path, augmenter="channel-dropout", fraction=0.25), many
    ).features
    assert features.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(features.amin((2, 3)), features.amax((2, 3)))
    assert float(features.mean()) == pytest.approx(1, abs=0.03)


def test_class_statistics_equal_numpy(store) -> None:
    positions = store.positions("identity")
    statistics = ClassStatistics.of(store, positions, torch.device("cpu"))
    features, labels = (
        store.gather("features", positions),
        store.gather("masks", positions)[:, ::STRIDE, ::STRIDE],
    )
    for number in range(CLASSES):
        vectors = features.transpose(0, 2, 3, 1)[labels == number]
        np.testing.assert_allclose(statistics.means[number], vectors.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            statistics.deviations[number], vectors.std(0), rtol=1e-3, atol=1e-4
        )
        assert statistics.pixels[number] == (labels == number).sum()
        assert (
            statistics.images[number]
            == (labels == number).any((1, 2)).sum()
            == len(statistics.centres[number])
        )


def test_linear_delta_moves_a_region_by_the_difference_of_two_others(
    store, batch, tmp_path
) -> None:
    moved_by = (
        only(build(store, tmp_path, augmenter="linear-delta"), batch).features - batch.features
    )
    deltas = [moved_by[0][:, small(batch.masks)[0] == number] for number in range(CLASSES)]
    centres = {sample: centre(batch.features, batch.masks, sample, 1) for sample in (1, 2, 3)}
    candidates = [centres[j] - centres[k] for j in centres for k in centres if j != k]
    assert any(torch.allclose(deltas[1].mean(1), candidate, atol=1e-5) for candidate in candidates)
    assert torch.allclose(
        deltas[1], deltas[1][:, :1].expand_as(deltas[1]), atol=1e-6
    )  # all its pixels alike
    assert not deltas[2].any()  # class 2 is in one other image of the batch only
    assert not moved_by[:, :, 0, 0].any()  # void


def test_extrapolate_moves_away_from_the_class(store, batch, tmp_path) -> None:
    moved_by = (
        only(build(store, tmp_path, augmenter="extrapolate", strength=0.5), batch).features
        - batch.features
    )
    means = ClassStatistics.of(store, store.positions("identity"), torch.device("cpu")).means
    for sample, labels in enumerate(small(batch.masks)):
        for number in set(labels.unique().tolist()) - {VOID}:
            pixels = moved_by[sample][:, labels == number]
            expected = 0.5 * (centre(batch.features, batch.masks, sample, number) - means[number])
            torch.testing.assert_close(
                pixels, expected[:, None].expand_as(pixels), rtol=1e-4, atol=1e-5
            )
    assert not moved_by[:, :, 0, 0].any()  # void


def test_interpolate_moves_to_the_nearest_harder_region(store, batch, tmp_path) -> None:
    augmenter = build(store, tmp_path, augmenter="interpolate", strength=0.4)
    moved_by = only(augmenter, batch).features - batch.features
    with torch.no_grad():
        scores = augmenter.decoder.eval()(batch.features, (SIDE, SIDE))
    labels = small(batch.masks).long()
    losses = F.cross_entropy(scores, labels, ignore_index=VOID, reduction="none")
    hardness = [float(losses[sample][labels[sample] == 1].mean()) for sample in range(4)]
    centres = [centre(batch.features, batch.masks, sample, 1) for sample in range(4)]
    for sample in range(4):
        harder = [other for other in range(4) if hardness[other] > hardness[sample]]
        pixels = moved_by[sample][:, labels[sample] == 1]
        nearest = min(
            harder,
            key=lambda other: float((centres[other] - centres[sample]).norm()),
            default=sample,
        )  # none: it stays
        expected = 0.4 * (centres[nearest] - centres[sample])
        torch.testing.assert_close(
            pixels, expected[:, None].expand_as(pixels), rtol=1e-4, atol=1e-5
        )
    assert not moved_by[:, :, 0, 0].any()  # void


def test_mixup_has_two_masks_so_nothing_is_pasted_by_one() -> None:
    with pytest.raises(ValueError, match="copy_paste"):
        MixupConfig(augmenter="mixup", augment=["copy_paste"])


def test_mixup_mixes_features_and_targets_by_the_same_fractions(store, batch, tmp_path) -> None:
    part = only(build(store, tmp_path, augmenter="mixup", alpha=1.0), batch, seed=3)
    (masks, fraction), (others, rest) = part.targets
    assert torch.equal(masks, batch.masks)
    assert fraction + rest == pytest.approx(1)
    assert 0 < fraction < 1

    def partner(first: torch.Tensor, other: torch.Tensor, mixed: torch.Tensor) -> int:
        candidates = (fraction * first + rest * features for features in batch.features)
        same = [torch.allclose(mixture, mixed, atol=1e-5) for mixture in candidates]
        return next(i for i in range(4) if same[i] and torch.equal(batch.masks[i], other))

    order = [partner(*rows) for rows in zip(batch.features, others, part.features, strict=True)]
    assert sorted(order) == [0, 1, 2, 3]


def test_mixups_fraction_is_from_a_beta_distribution(store, batch, tmp_path) -> None:
    augmenter = build(store, tmp_path, augmenter="mixup", alpha=0.2)
    fractions = np.array([only(augmenter, batch, seed).targets[0][1] for seed in range(1500)])
    assert fractions.mean() == pytest.approx(1 / 2, abs=0.04)
    assert fractions.var() == pytest.approx(
        1 / (4 * (2 * 0.2 + 1)), rel=0.07
    )  # of Beta(a, a); the variance of a uniform fraction is less than half


def test_upsample_draws_images_of_rare_classes_more_often(store, batch, tmp_path) -> None:
    positions = store.positions("identity")
    factors = repeat_factors(store, positions, 1.0)
    np.testing.assert_allclose(
        factors, [2, *[(8 / 6) ** 0.5] * 4, 2, 1, 1]
    )  # sqrt(1 / fraction) of the rarest class
    np.testing.assert_allclose(
        repeat_factors(store, positions, 0.5), [2**0.5, 1, 1, 1, 1, 2**0.5, 1, 1]
    )
    augmenter = build(store, tmp_path, augmenter="upsample")
    with_rare = sum(
        int((small(only(augmenter, batch, seed).targets[0][0]) == 2).any((1, 2)).sum())
        for seed in range(300)
    )
    assert with_rare / 1200 == pytest.approx(4 / factors.sum(), abs=0.04)


def test_hflip_views_reads_the_mirrored_views_of_the_batch(store, batch, tmp_path) -> None:
    part = only(build(store, tmp_path, augmenter="hflip-views"), batch)
    torch.testing.assert_close(part.features, batch.features.flip(3) + 10)
    assert torch.equal(part.targets[0][0], batch.masks.flip(2))


def test_the_mirrored_views_of_images_are_found(store) -> None:
    positions = np.array([6, 2])
    views = find_views(store, positions, ["hflip"])[:, 0]
    assert [store.ids[position] for position in views] == ["photo 6", "photo 2"]
    assert {store.views[position] for position in views} == {"hflip"}


def test_hflip_views_wants_mirrored_views(store, batch, tmp_path) -> None:
    with featurestore.create(tmp_path / "train", store.spec, fingerprint="f") as writer:
        writer.append(
            id="photo", features=store.features(0), mask=store.mask(0), image=store.image(0)
        )
    with pytest.raises(SpecMismatchError, match="extract.views"):
        build(featurestore.open(tmp_path / "train"), tmp_path, augmenter="hflip-views")


def test_calibration_draws_rare_regions_around_the_calibrated_mean(store, batch, tmp_path) -> None:
    augmenter = build(
        store, tmp_path, augmenter="calibration", rare=0.5, neighbours=2
    )  # class 2 is in a quarter of them
    rows = ClassStatistics.of(store, store.positions("identity"), torch.device("cpu")).centres
    region_centre = centre(batch.features, batch.masks, 0, 2)
    mean = (region_centre + rows[0].mean(0) + rows[1].mean(0)) / 3
    covariance = (torch.cov(rows[0].T) + torch.cov(rows[1].T)) / 2
    draws = augmenter.draw(region_centre.expand(4000, -1), rng())
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.06)
    torch.testing.assert_close(
        torch.cov(draws.T), covariance, rtol=0, atol=0.12 * float(covariance.abs().max())
    )
    part = only(augmenter, batch)
    changed = (part.features != batch.features).any(1)
    assert torch.equal(changed, small(batch.masks) == 2)
    assert (part.targets[0][0][1] == VOID).all()  # no rare class there, so its loss is left out
    assert torch.equal(part.targets[0][0][0], batch.masks[0])


def test_calibration_takes_the_nearest_class_and_adds_alpha_to_every_covariance(
    store, tmp_path
) -> None:
    augmenter = build(store, tmp_path, augmenter="calibration", rare=0.5, neighbours=1, spread=0.5)
    rows = ClassStatistics.of(store, store.positions("identity"), torch.device("cpu")).centres
    for number, other in ((0, 1), (1, 0)):
        near = 0.8 * rows[number].mean(0) + 0.2 * rows[other].mean(0)
        draws = augmenter.draw(near.expand(4000, -1), rng())
        torch.testing.assert_close(
            draws.mean(0), (near + rows[number].mean(0)) / 2, rtol=0, atol=0.06
        )
        torch.testing.assert_close(
            torch.cov(draws.T), torch.cov(rows[number].T) + 0.5, rtol=0, atol=0.08
        )


def test_cvae_learns_each_classs_distribution(store, batch, tmp_path) -> None:
    torch.manual_seed(0)
    classes = torch.arange(2).repeat(500)
    means = torch.tensor([[2.0, 0.0], [-2.0, 1.0]])
    model = CVAE(channels=2, num_classes=2, latent=2, hidden=32)
    fit(model, means[classes] + 0.1 * torch.randn(1000, 2), classes, 600, rng())
    with torch.no_grad():
        drawn = model.decode(torch.randn(500, 2), torch.ones(500, dtype=torch.int64))
    torch.testing.assert_close(drawn.mean(0), means[1], rtol=0, atol=0.15)
    first, again, other = (
        only(build(store, tmp_path, augmenter="cvae", fit_steps=20), batch, seed).features
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_cvae_puts_drawn_centres_in_the_place_of_real_ones(store, batch, tmp_path) -> None:
    augmenter = build(store, tmp_path, augmenter="cvae", latent=4, fit_steps=20)
    added = only(augmenter, batch, 7).features
    z = torch.randn(len(batch) * CLASSES, 4, generator=rng(7)).view(len(batch), CLASSES, 4)
    for sample, number in ((0, 0), (0, 1), (0, 2), (3, 2)):
        with torch.no_grad():
            drawn = (
                augmenter.model.decode(z[sample, number][None], torch.tensor([number]))[0]
                * augmenter.scale
            )
        region = small(batch.masks)[sample] == number
        moved = (
            batch.features[sample][:, region]
            - centre(batch.features, batch.masks, sample, number)[:, None]
            + drawn[:, None]
        )
        torch.testing.assert_close(added[sample][:, region], moved, rtol=1e-4, atol=1e-4)
    void = small(batch.masks) == VOID
    assert torch.equal(added.movedim(1, -1)[void], batch.features.movedim(1, -1)[void])


def test_isda_is_the_expectation_under_gaussian_samples(store, batch, tmp_path) -> None:
    # Proposition 1: exp(logit_k - logit_y) after the adjustment is the mean over samples.
    augmenter = build(store, tmp_path, augmenter="isda", strength=1.5)
    torch.manual_seed(1)
    last = torch.nn.Conv2d(5, CLASSES, 1)
    augmenter.variances = torch.rand(CLASSES, 5)
    augmenter.step = 4  # of 10, so that lambda is 0.6
    margins = augmenter.margins(last.weight.flatten(1))
    vector, label = torch.randn(5), 2
    samples = vector + (0.6 * augmenter.variances[label]).sqrt() * torch.randn(400_000, 5)
    weight, bias = last.weight.flatten(1), last.bias
    with torch.no_grad():
        logits = samples @ weight.T + bias
        expected = (logits - logits[:, label : label + 1]).exp().mean(0)
        adjusted = weight @ vector + bias + margins[label]
        torch.testing.assert_close((adjusted - adjusted[label]).exp(), expected, rtol=0.02, atol=0)
    expected = torch.autograd.grad(  # the margins are differentiated by the weights, too
        sum(
            0.3 * (augmenter.variances[y] * (weight[k] - weight[y]).square()).sum()
            for y in range(CLASSES)
            for k in range(CLASSES)
        ),
        last.weight,
    )
    torch.testing.assert_close(
        torch.autograd.grad(augmenter.margins(last.weight.flatten(1)).sum(), last.weight), expected
    )


def test_isda_estimates_the_variances_of_all_vectors_so_far(store, batch, tmp_path) -> None:
    augmenter = build(store, tmp_path, augmenter="isda")
    parts = [torch.randn(4, 5, SIDE, SIDE) * 2 + shift for shift in (1, 2, 3)]
    masks = [
        batch.masks,
        torch.where(batch.masks == 1, 0, batch.masks),
        batch.masks,
    ]  # batches have unequal numbers of a class's vectors
    last = torch.nn.Conv2d(5, CLASSES, 1)
    for embeddings, truth in zip(parts, masks, strict=True):
        change = augmenter.adjust_logits(truth)
        scores = change(embeddings, last(embeddings), last)
        assert torch.equal(scores, last(embeddings))  # lambda is 0 at the start
    for number in range(CLASSES):
        pairs = zip(parts, masks, strict=True)
        vectors = torch.cat(
            [embeddings.permute(0, 2, 3, 1)[small(truth) == number] for embeddings, truth in pairs]
        )
        torch.testing.assert_close(
            augmenter.variances[number], vectors.var(0, unbiased=False), rtol=1e-4, atol=1e-4
        )
    labels = small(batch.masks)
    augmenter.step = 10
    with torch.no_grad():
        raised = augmenter.adjust_logits(batch.masks)(parts[0], last(parts[0]), last) - last(
            parts[0]
        )
    chosen = raised.gather(1, torch.where(labels == VOID, 0, labels).long()[:, None])
    assert float(chosen.abs().max()) < 1e-5  # the logit of the pixel's class stays
    assert (raised >= -1e-5).all()
    assert not raised[:, :, 0, 0].any()  # void


@pytest.mark.parametrize("head", ["deeplab", "fcn"])
def test_logits_can_be_adjusted_after_the_last_layer(head: str) -> None:
    decoder = Decoder(
        head=head, in_channels=8, num_classes=CLASSES, width=5, atrous_rates=(1, 2)
    ).eval()
    features = torch.randn(2, 8, SIDE, SIDE)

    def again(
        embeddings: torch.Tensor, scores: torch.Tensor, last: torch.nn.Conv2d
    ) -> torch.Tensor:
        assert torch.equal(last(embeddings), scores)
        return scores + 1

    torch.testing.assert_close(decoder(features, (8, 8), again), decoder(features, (8, 8)) + 1)


@pytest.mark.parametrize(
    "variant",
    [
        {"augmenter": "calibration", "rare": 0.5},
        {"augmenter": "class-transfer"},
        {"augmenter": "cvae", "fit_steps": 5},
        {"augmenter": "extrapolate", "strength": 5.0},
        {"augmenter": "linear-delta"},
        {"augmenter": "noise"},
    ],
    ids=lambda variant: variant["augmenter"],
)
def test_changed_features_are_at_least_0_where_the_backbones_are(
    variant, store, batch, tmp_path
) -> None:
    augmenter = build(store, tmp_path, **variant)
    signed = only(augmenter, batch).features
    assert float(signed.min()) < 0
    augmenter.spec = dataclasses.replace(augmenter.spec, nonnegative=True)
    assert torch.equal(only(augmenter, batch).features, signed.clamp(min=0))


def test_combined_augmenters_add_what_each_of_them_adds(store, batch, tmp_path) -> None:
    isda = {"augmenter": "isda", "strength": 3.0}
    of = [
        {"augmenter": "duplicate", "ratio": 2, "weight": 0.5},
        isda,
        {"augmenter": "channel-dropout"},
    ]
    combined, alone = (
        build(store, tmp_path, augmenter="combined", of=of),
        build(store, tmp_path, **isda),
    )
    *copies, dropped = combined.augment(batch, rng()).batches
    assert [part.weight for part in copies] == [0.5, 0.5]
    assert all(torch.equal(part.features, batch.features) for part in copies)
    kept = dropped.features != 0
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(dropped.features[kept], batch.features[kept] / 0.7)
    last = torch.nn.Conv2d(5, CLASSES, 1)
    embeddings = torch.randn(4, 5, SIDE, SIDE)
    adjusted = []
    for augmenter in (combined, alone):
        augmenter.after_optimizer_step(Augmented())
        adjusted.append(augmenter.adjust_logits(batch.masks)(embeddings, last(embeddings), last))
    assert torch.equal(*adjusted)
    assert not torch.equal(adjusted[0], last(embeddings))


def test_combined_augmenters_draw_apart_and_the_first_as_it_would_alone(
    store, batch, tmp_path
) -> None:
    upsample = {"augmenter": "upsample"}
    twice = build(store, tmp_path, augmenter="combined", of=[upsample, upsample])
    alone = build(store, tmp_path, **upsample)
    each = [augment(twice, batch, seed) for seed in range(5)]
    assert all(
        torch.equal(first.features, only(alone, batch, seed).features)
        for seed, (first, _) in enumerate(each)
    )
    assert not any(torch.equal(first.features, second.features) for first, second in each)


@pytest.mark.parametrize(
    ("of", "shared", "text"),
    [
        (
            [{"augmenter": "noise", "augment": ["flip"]}, {"augmenter": "isda"}],
            {},
            "augment of noise applies to all members; write it beside augmenter: combined",
        ),
        (
            [{"augmenter": "noise", "until": 0.5}, {"augmenter": "isda"}],
            {},
            "until of noise applies to all members; write it beside augmenter: combined",
        ),
        (
            [{"augmenter": "featuregan"}, {"augmenter": "isda"}],
            {},
            "combined variants cannot train a generator",
        ),
        (
            [{"augmenter": "mixup"}, {"augmenter": "isda"}],
            {"augment": ["copy_paste"]},
            "mixup cannot be combined here: copy_paste",
        ),
        (
            [{"augmenter": "hflip-views"}, {"augmenter": "isda"}],
            {"view": "random"},
            "hflip-views cannot be combined here: view: ",
        ),
        (
            [{"augmenter": "isda"}, {"augmenter": "isda"}],
            {},
            "isda is listed twice; list it once and raise strength",
        ),
        ([{"augmenter": "none"}, {"augmenter": "isda"}], {}, "'none' found"),
        ([{"augmenter": "isda"}], {}, "at least 2"),
    ],
)
def test_what_cannot_be_combined_is_refused(of, shared, text) -> None:
    with pytest.raises(ValueError, match=text):
        TypeAdapter(Variant).validate_python({"augmenter": "combined", "of": of, **shared})


@pytest.mark.parametrize("augmenter", ["none", "isda"])
@pytest.mark.parametrize("key", [{"until": 0.7}, {"statistics": "real"}], ids=str)
def test_keys_of_added_batches_are_refused_where_there_are_none(augmenter: str, key: dict) -> None:
    with pytest.raises(
        ValueError,
        match=f"{next(iter(key))} applies only to variants that add batches; remove it",
    ):
        TypeAdapter(Variant).validate_python({"augmenter": augmenter, **key})


def test_until_is_refused_for_duplicate() -> None:
    with pytest.raises(ValueError, match="until has no effect on duplicate"):
        TypeAdapter(Variant).validate_python({"augmenter": "duplicate", "until": 0.7})


def test_combined_variants_need_what_their_members_need() -> None:
    varied = {"augmenter": "featuregan", "generator": "frozen", "vary": 0.5, "ratio": 2}
    of = [varied, {"augmenter": "hflip-views"}, {"augmenter": "isda"}]
    needs = TypeAdapter(Variant).validate_python({"augmenter": "combined", "of": of})
    assert (needs.needs_gan, needs.needs_mirrored, needs.needs_family, needs.added_batches) == (
        True,
        True,
        ("flow",),
        3,
    )
    assert needs.needs_classes == 2
    needs = TypeAdapter(Variant).validate_python(
        {"augmenter": "combined", "of": [{"augmenter": "noise"}, {"augmenter": "isda"}]}
    )
    assert (needs.needs_gan, needs.needs_mirrored, needs.needs_family, needs.added_batches) == (
        False,
        False,
        (),
        1,
    )


def test_isda_resumes_from_its_state(store, batch, tmp_path) -> None:
    one, two = (build(store, tmp_path, augmenter="isda") for _ in range(2))
    last = torch.nn.Conv2d(5, CLASSES, 1)
    embeddings = torch.randn(4, 5, SIDE, SIDE)
    one.adjust_logits(batch.masks)(embeddings, last(embeddings), last)
    one.step = 7
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.margins(last.weight.flatten(1)), two.margins(last.weight.flatten(1)))
    assert isinstance(two, ISDA)


def test_regions_draw_other_regions_of_the_same_class(store, batch) -> None:
    regions = Regions.of(batch.features, batch.masks, CLASSES)
    chosen, enough = regions.others(1, rng())
    assert enough.tolist() == [
        [True, True, True],
        [True, True, False],
        [True, True, False],
        [True, True, True],
    ]
    assert chosen[0, 2, 0] == 3
    assert chosen[3, 2, 0] == 0
    assert all(chosen[sample, 0, 0] != sample for sample in range(4))


def test_resampled_masks_shift_and_scale() -> None:
    masks = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    right = resample(masks, torch.ones(1), torch.tensor([[0.0, 0.25]]), fill=VOID)
    assert right[0, 0].tolist() == [VOID, 0, 1, 2]
    larger = resample(masks, torch.full((1,), 2.0), torch.zeros(1, 2))
    assert larger[0].tolist() == [[5, 5, 6, 6], [5, 5, 6, 6], [9, 9, 10, 10], [9, 9, 10, 10]]
    smaller = resample(masks, torch.full((1,), 0.5), torch.zeros(1, 2), fill=VOID)
    assert smaller[0, 0].tolist() == [VOID] * 4
    assert smaller[0, 1].tolist() == [VOID, 5, 7, VOID]


def test_new_masks_paste_rare_objects(store, batch) -> None:
    pasting = NewMasks(["paste"], store, store.positions("identity"))
    before = int((batch.masks == 2).sum())
    after = [int((pasting(batch.masks, rng(seed)) == 2).sum()) for seed in range(20)]
    assert np.mean(after) > before
    for seed in range(20):
        changed = pasting(batch.masks, rng(seed))
        assert set(changed[changed != batch.masks].tolist()) <= {
            1,
            2,
        }  # objects, not the background
    assert torch.equal(pasting(batch.masks, rng(1)), pasting(batch.masks, rng(1)))


def test_a_fraction_of_the_masks_is_changed_and_the_other_samples_are_added_unchanged(
    store, batch, tmp_path
) -> None:
    masks = batch.masks.repeat(500, 1, 1)
    half = NewMasks(["swap"], store, store.positions("identity"), fraction=0.5)(masks, rng())
    all_of_them = NewMasks(["swap"], store, store.positions("identity"))(masks, rng())
    changed = (half != masks).flatten(1).any(1)
    assert torch.equal(half[changed], all_of_them[changed])
    assert float(changed.float().mean()) == pytest.approx(
        0.5 * float((all_of_them != masks).flatten(1).any(1).float().mean()), abs=0.04
    )
    many = Batch(torch.arange(2000), batch.features.repeat(500, 1, 1, 1), masks, None)
    part = only(build(store, tmp_path, augmenter="class-transfer", fraction=0.5), many)
    same = (part.targets[0][0] == masks).flatten(1).all(1)
    assert 800 < int(same.sum()) < 1600
    torch.testing.assert_close(part.features[same], many.features[same])


def test_new_masks_give_an_object_another_class(store, batch) -> None:
    swapping = NewMasks(["swap"], store, store.positions("identity"))
    seen = set()
    for seed in range(20):
        for before, after in zip(batch.masks, swapping(batch.masks, rng(seed)), strict=True):
            ((old, new),) = {
                pair
                for pair in zip(before.flatten().tolist(), after.flatten().tolist(), strict=True)
                if pair[0] != pair[1]
            }
            assert torch.equal(
                after, torch.where(before == old, new, before)
            )  # all of its pixels, and no other
            seen.add((old, new))
    assert seen == {(1, 2), (2, 1)}
    ground = torch.zeros_like(batch.masks)
    assert torch.equal(swapping(ground, rng()), ground)


def test_new_masks_need_classes_to_change(store) -> None:
    class Masks:
        """Of a data set with two classes."""

        spec = store.spec

        def mask(self, position: int) -> np.ndarray:
            return np.array([[0, 0], [0, position % 2]], np.uint8)

    positions = np.arange(4)
    assert NewMasks(["paste"], Masks(), positions).objects.tolist() == [1]
    with pytest.raises(
        ConfigError,
        match=r"new_masks: exchanging classes \(swap, class-transfer\) needs 2 .*, found 1",
    ):
        NewMasks(["swap"], Masks(), positions)
    with pytest.raises(ConfigError, match=r"pasting objects needs 1 classes beside .*, found 0"):
        NewMasks(["paste"], Masks(), positions[:1])
    with pytest.raises(
        ConfigError, match="'flop' is unknown; known are flip, shift, scale, paste, swap"
    ):
        NewMasks(["flop"], Masks(), positions)


def test_no_object_gets_a_class_without_feature_pixels(store, batch) -> None:
    only_first = NewMasks(
        ["paste"], store, store.positions("identity"), known=np.arange(CLASSES) < 2
    )
    assert only_first.objects.tolist() == [1]
    with pytest.raises(ConfigError, match="needs 2 classes beside .*, found 1"):
        NewMasks(["swap"], store, store.positions("identity"), known=np.arange(CLASSES) < 2)


def test_class_transfer_moves_an_object_by_the_difference_of_the_means(
    store, batch, tmp_path
) -> None:
    part = only(build(store, tmp_path, augmenter="class-transfer", weight=0.5), batch)
    positions = store.positions("identity")
    features, masks = (
        torch.from_numpy(store.gather(name, positions)) for name in ("features", "masks")
    )
    vectors, labels = features.transpose(0, 1).flatten(1), small(masks).flatten()
    means = torch.stack([vectors[:, labels == number].mean(1) for number in range(CLASSES)])
    old, new = small(batch.masks), small(part.targets[0][0])
    places = (old != new).nonzero().tolist()
    assert places
    expected = batch.features.clone()
    for sample, row, column in places:
        expected[sample, :, row, column] += (
            means[new[sample, row, column].long()] - means[old[sample, row, column].long()]
        )
    torch.testing.assert_close(part.features, expected)
    assert part.weight == 0.5


def test_feature_augmentation_transforms_features_and_all_targets_alike(batch) -> None:
    part = Labelled(small(batch.masks)[:, None].float(), [(batch.masks, 0.5), (batch.masks, 0.5)])
    (changed,) = transform_features(["flip", "translation"], [part], rng(2), ((1, 1),))
    assert torch.equal(changed.targets[0][0], changed.targets[1][0])
    labels = small(changed.targets[0][0])
    assert not torch.equal(labels, small(batch.masks))
    inside = labels != VOID
    assert torch.equal(changed.features[:, 0][inside], labels[inside].float())
    assert transform_features([], [part], rng(), ((1, 1),))[0] is part
