"""Feature maps of any stride and size: networks, transforms, labels, trainings."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featurestore
from featurestore.dataset import gather_maps
from stages.common.errors import ConfigError
from stages.common.runtime import make_accelerator
from stages.gan.flow_trainer import FlowTrainer
from stages.gan.gan_trainer import GanTrainer
from stages.gan.networks import Networks
from stages.gan.objective import Objective
from stages.models.blocks import nearest_pixels, one_hot, reduced_size
from stages.models.discriminator import Discriminator, PatchDiscriminator
from stages.models.flow_generator import FlowGenerator
from stages.models.generator import Generator
from stages.models.image_encoder import ImageEncoder
from stages.segmentation.regions import Regions, fill_cells, labels_at
from stages.segmentation.transforms import TRANSFORMS, augment
from stages.train_gan import check_input_size
from stages.training.models import load_generator
from stages.training.update import backward, step_and_zero_grad
from tests.factories import SPEC, VARIANTS, run_decoder, run_gan, tiny_params

CHANNELS, CLASSES, BATCH = 6, 3, 4
# Stride, (H, W), (h, w). The last two have no integer H / h.
SIZES = [
    (8, (64, 64), (8, 8)),
    (8, (72, 104), (9, 13)),
    (14, (518, 112), (37, 8)),
    (16, (144, 176), (9, 11)),
    (32, (360, 300), (12, 10)),
    (14, (131, 160), (10, 12)),
]
each_size = pytest.mark.parametrize(("stride", "image", "size"), SIZES)
Size = tuple[int, int]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_masks(image: Size, batch: int = BATCH) -> Tensor:
    masks = torch.randint(0, CLASSES, (batch, *image), dtype=torch.uint8, generator=rng())
    masks[:, :5] = 255
    return masks


def generator(size: Size, **changes) -> Generator:
    settings = {
        "num_classes": CLASSES,
        "feature_shape": (CHANNELS, *size),
        "nonnegative": False,
        "feature_scale": torch.ones(CHANNELS),
        "z_dim": 5,
        "ngf": 1,
        "spade_hidden": 8,
        "init_gain": 1.0,
    }
    return Generator(**{**settings, **changes})


# -- labels ----------------------------------------------------------------------------------------


@each_size
def test_a_feature_pixel_has_the_label_of_the_nearest_mask_pixel(
    stride: int, image: Size, size: Size
) -> None:
    masks = random_masks(image)
    rows, columns = ([i * side // n for i in range(n)] for side, n in zip(image, size, strict=True))
    labels = labels_at(masks, size)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, masks[:, rows][:, :, columns].long())
    if image == (stride * size[0], stride * size[1]):  # the first pixel of each cell
        assert torch.equal(labels, masks[:, ::stride, ::stride].long())
    hot = one_hot(masks, CLASSES, dtype=torch.float32, size=size)
    assert torch.equal(hot.argmax(1), torch.where(labels == 255, CLASSES, labels))


@each_size
def test_a_filled_cell_reaches_from_its_label_to_the_next(
    stride: int, image: Size, size: Size
) -> None:
    values = torch.arange(math.prod(size)).view(1, *size)
    filled = fill_cells(values, image)
    assert torch.equal(labels_at(filled, size), values)
    for y in range(image[0]):
        (row,) = (
            i
            for i in range(size[0])
            if i * image[0] // size[0] <= y < (i + 1) * image[0] // size[0]
        )
        assert filled[0, y, 0] == row * size[1]
    if image == (stride * size[0], stride * size[1]):
        repeated = values.repeat_interleave(stride, 1).repeat_interleave(stride, 2)
        assert torch.equal(filled, repeated)


@each_size
def test_regions_are_the_pixels_of_these_labels(stride: int, image: Size, size: Size) -> None:
    masks, features = random_masks(image), torch.randn(BATCH, CHANNELS, *size, generator=rng())
    regions = Regions.of(features, masks, CLASSES)
    labels = labels_at(masks, size)
    for sample in range(BATCH):
        for number in range(CLASSES):
            inside = features[sample][:, labels[sample] == number]
            torch.testing.assert_close(regions.centres[sample, number], inside.mean(1))


# -- networks --------------------------------------------------------------------------------------


@each_size
@pytest.mark.parametrize(
    "options",
    [{}, {"z_dim": 0}, {"noise": "spatial"}, {"class_means": torch.rand(CLASSES + 1, CHANNELS)}],
)
def test_the_generators_blocks_work_at_quarters_and_halves_rounded_up(
    stride: int, image: Size, size: Size, options: dict
) -> None:
    network = generator(size, **options)
    shapes: dict[str, tuple[Size, Size]] = {}
    for name in ("quarter", "half_0", "half_1", "full"):
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: shapes.update({name: tuple(x.shape[2:] for x in inputs)})
        )
    masks = random_masks(image)
    made = network(torch.randn(2 * BATCH, network.z_dim, generator=rng()), masks)
    assert made.shape == (2 * BATCH, CHANNELS, *size)
    divisors = {"quarter": 4, "half_0": 2, "half_1": 2, "full": 1}
    for name, divisor in divisors.items():
        expected = tuple(math.ceil(side / divisor) for side in size)
        assert shapes[name] == (expected, expected)  # of x and of the labels
    made.square().mean().backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_reduced_sizes_are_rounded_up() -> None:
    assert [reduced_size((37, 8), divisor) for divisor in (1, 2, 4)] == [(37, 8), (19, 4), (10, 2)]


def test_weights_of_the_generator_depend_on_the_size_only_in_the_first_map() -> None:
    shapes = [
        {name: tuple(x.shape) for name, x in generator(size).state_dict().items()}
        for size in ((8, 8), (37, 9))
    ]
    different = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    assert different == {"noise.weight", "noise.bias"}
    assert shapes[1]["noise.weight"] == (16 * 10 * 3, 5)


@each_size
@pytest.mark.parametrize("options", [{}, {"scales": 2}, {"kind": "segmentation"}], ids=str)
def test_discriminators_judge_maps_of_this_size(
    stride: int, image: Size, size: Size, options: dict
) -> None:
    network = Discriminator(
        num_classes=CLASSES, feature_channels=CHANNELS, output_stride=stride, ndf=4, **options
    )
    masks = random_masks(image)
    real, fake = (torch.randn(n * BATCH, CHANNELS, *size, generator=rng(n)) for n in (1, 2))
    of_real, of_fake = network([real, fake.requires_grad_()], masks)
    assert [len(scores) for scores in of_fake.scores] == [2 * BATCH] * options.get("scales", 1)
    if options.get("kind"):
        assert of_real.scores[0].shape == (BATCH, CLASSES + 1, *size)
    sum(scores.square().mean() for scores in of_fake.scores).backward()
    assert fake.grad is not None
    assert (fake.grad != 0).all()  # every pixel is seen


@pytest.mark.parametrize(
    ("stride", "halvings"), [(4, 2), (8, 3), (14, 4), (16, 4), (32, 5)], ids=str
)
def test_the_mask_passes_as_many_halvings_as_the_stride_has(stride: int, halvings: int) -> None:
    network = Discriminator(
        num_classes=CLASSES, feature_channels=CHANNELS, output_stride=stride, ndf=4
    )
    assert len(network.scales[0].mask_layers) == halvings


@pytest.mark.parametrize(("stride", "image", "size"), SIZES[1:5])
def test_the_patch_discriminator_sees_the_mask_interpolated_to_the_features(
    stride: int, image: Size, size: Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first layer equals a convolution of the features beside the interpolated embedding."""
    network = Discriminator(
        num_classes=CLASSES, feature_channels=CHANNELS, output_stride=stride, ndf=4
    ).eval()
    patch: PatchDiscriminator = network.scales[0]
    masks, real = random_masks(image), torch.randn(BATCH, CHANNELS, *size, generator=rng())
    (judgement,) = network([real], masks)
    x = one_hot(masks, CLASSES, dtype=torch.float32)
    for layer in patch.mask_layers:
        x = F.leaky_relu(layer(x), 0.2)
    lands = tuple(x.shape[2:]) == size
    assert lands == (stride in (8, 16))
    if not lands:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    expected = F.leaky_relu(patch.layers[0](torch.cat([real, x], 1)), 0.2)
    torch.testing.assert_close(judgement.layers[0], expected, rtol=1e-4, atol=1e-6)


def flow(size: Size) -> FlowGenerator:
    network = FlowGenerator(
        num_classes=CLASSES,
        feature_shape=(CHANNELS, *size),
        nonnegative=False,
        feature_scale=torch.ones(CHANNELS),
        components=CHANNELS,
        width=8,
        steps=2,
    )
    nn.init.normal_(network.last.weight, std=0.1)  # as if trained
    return network


@each_size
def test_a_flow_generates_swaps_and_varies_maps_of_this_size(
    stride: int, image: Size, size: Size
) -> None:
    network, masks = flow(size), random_masks(image)
    real = torch.randn(BATCH, CHANNELS, *size, generator=rng())
    z = torch.randn(BATCH, network.z_dim, generator=rng())
    made = network.generate(masks, z=z)
    assert made.shape == real.shape
    assert not torch.equal(made, network.generate((masks + 1) % CLASSES, z=z))
    there_and_back = network.swap_classes(real, masks, masks)
    assert (there_and_back - real).square().mean() < 0.02 * real.var()
    assert network.vary(real, masks, z=z, strength=0.5).shape == real.shape
    trainer = FlowTrainer(
        make_accelerator("cpu", "no"), Networks(network), lr=1e-3, betas=(0.9, 0.999)
    )
    step = trainer.forward(real, masks, None, ratio=2, rng=rng())
    backward(trainer.accelerator, *trainer.losses_with_parameters(step))
    assert all(parameter.grad.isfinite().all() for parameter in trainer.generator_parameters)


@each_size
@pytest.mark.parametrize("loss", ["hinge", "segmentation"])
def test_a_step_of_the_gan_with_every_transform(
    stride: int, image: Size, size: Size, loss: str
) -> None:
    networks = Networks(
        generator(size),
        Discriminator(
            num_classes=CLASSES,
            feature_channels=CHANNELS,
            output_stride=stride,
            ndf=4,
            kind="segmentation" if loss == "segmentation" else "patch",
        ),
        ImageEncoder(z_dim=5, nef=1),
    )
    trainer = GanTrainer(
        make_accelerator("cpu", "no"),
        networks,
        Objective(
            loss, lambda_rec=1.0, r1_gamma=float(loss == "hinge"), diffaugment=tuple(TRANSFORMS)
        ),
        folds=((CHANNELS, 1),),
        generator_lr=1e-3,
        discriminator_lr=1e-3,
        betas=(0.0, 0.9),
    )
    images = torch.randint(0, 256, (BATCH, 3, *image), dtype=torch.uint8, generator=rng())
    real = torch.randn(BATCH, CHANNELS, *size, generator=rng())
    step = trainer.forward(real, random_masks(image), images, ratio=2, rng=rng())
    backward(trainer.accelerator, *trainer.losses_with_parameters(step))
    for parameters in (trainer.generator_parameters, trainer.discriminator_parameters):
        assert all(parameter.grad.isfinite().all() for parameter in parameters)
    step_and_zero_grad(trainer.accelerator, *trainer.optimizers.values())


# -- transforms ------------------------------------------------------------------------------------


def scene(image: Size, size: Size) -> tuple[Tensor, Tensor]:
    """Draw masks (B, H, W) of classes 1 to 5 in large blocks, and features that show the class."""
    coarse = torch.randint(1, 6, (40, 2, 2), generator=rng(5))
    classes = nearest_pixels(coarse, size)
    masks = fill_cells(classes, image).to(torch.uint8)
    return classes[:, None].float(), masks


def certain(mask: np.ndarray, image: Size, size: Size) -> np.ndarray:
    """Find the class of each feature pixel whose mask pixels are all of it, else -1: (h, w).

    One mask pixel beyond each side counts too.
    """
    found = np.full(size, -1)
    for i in range(size[0]):
        for j in range(size[1]):
            (top, bottom), (left, right) = (
                (max(0, k * side // n - 1), -(-(k + 1) * side // n) + 1)
                for k, side, n in zip((i, j), image, size, strict=True)
            )
            values = np.unique(mask[top:bottom, left:right])
            if len(values) == 1:
                found[i, j] = values[0]
    return found


@each_size
@pytest.mark.parametrize("name", ["flip", "translation", "cutout", "copy_paste"])
def test_features_and_masks_move_together(stride: int, image: Size, size: Size, name: str) -> None:
    features, masks = scene(image, size)
    (moved_features,), moved = augment([features], masks, [name], rng(1), ((1, 1),))
    assert not torch.equal(moved, masks)
    known = 0
    for feature, mask in zip(moved_features[:, 0].numpy(), moved.numpy(), strict=True):
        expected = certain(mask, image, size)
        inside = expected >= 0
        np.testing.assert_array_equal(
            feature[inside], np.where(expected == 255, 0, expected)[inside]
        )
        known += inside.sum()
    assert known > 0.2 * moved_features.numel()


@each_size
def test_masks_shift_by_the_nearest_whole_pixel(stride: int, image: Size, size: Size) -> None:
    masks = random_masks(image, 20)
    features = torch.rand(20, 1, *size, generator=rng()) + 1
    (shifted,), moved = augment([features], masks, ["translation"], rng(2), ((1, 1),))
    uniform = torch.rand(20, 2, generator=rng(2))
    for sample in range(20):
        maps = (features[sample, 0], shifted[sample, 0], 0)
        pixels = (masks[sample], moved[sample], 255)
        shifts = []
        for axis, n in enumerate(size):
            most = int(n / 8 + 0.5)
            shifts.append(math.floor(float(uniform[sample, axis]) * (2 * most + 1)) - most)
        for before, after, fill in (maps, pixels):
            by = [
                math.floor(shift * side / n + 0.5)
                for shift, side, n in zip(shifts, before.shape, size, strict=True)
            ]
            padded = F.pad(before[None].float(), (80, 80, 80, 80), value=fill)[0]
            top, left = (80 - each for each in by)
            window = padded[top : top + before.shape[0], left : left + before.shape[1]]
            assert torch.equal(after.float(), window)


@each_size
def test_cutout_empties_exactly_the_cells_of_the_features(
    stride: int, image: Size, size: Size
) -> None:
    features = torch.ones(10, 2, *size)
    masks = torch.zeros(10, *image, dtype=torch.uint8)
    (cut,), holed = augment([features], masks, ["cutout"], rng(), ((2, 1),))
    assert torch.equal(fill_cells(cut[:, 0], image) == 0, holed == 255)
    assert (cut == 0).any()


# -- stores ----------------------------------------------------------------------------------------


def write_stores(root: Path, stride: int, image: Size, size: Size) -> Path:
    """Write stores of noisy features that tell the classes apart: 6 + 4 + 4 samples."""
    spec = dataclasses.replace(
        SPEC, feature_shape=(12, *size), mask_shape=image, output_stride=stride
    )
    draw = np.random.default_rng(0)
    centres = draw.random((3, 12)) * 3
    for split, count in (("train", 6), ("val", 4), ("test", 4)):
        with featurestore.create(root / split, spec, fingerprint=split) as writer:
            for number in range(count):
                labels = draw.integers(0, 3, size)
                values = centres[labels].transpose(2, 0, 1) + 0.3 * draw.random((12, *size))
                writer.append(
                    id=f"{split} {number}",
                    features=values.astype(np.float32),
                    mask=fill_cells(torch.from_numpy(labels)[None], image)[0].byte().numpy(),
                    image=draw.integers(0, 256, (*image, 3)).astype(np.uint8),
                )
    return root


def test_maps_are_those_of_the_store(features: Path) -> None:
    store = featurestore.open(features / "train")
    maps = gather_maps(store, [3, 0, 8])
    assert maps.dtype == torch.float32
    assert torch.equal(maps, torch.from_numpy(store.gather("features", [3, 0, 8])).float())


@pytest.mark.medium
@pytest.mark.parametrize(("stride", "image", "size"), SIZES[1:2] + SIZES[3:5])
def test_trainings_on_maps_of_this_size(
    stride: int, image: Size, size: Size, tmp_path: Path
) -> None:
    """Generator, image encoder, joint and frozen variants, class swaps, ISDA, noise and flows."""
    features = write_stores(tmp_path / "features", stride, image, size)
    run_gan(features, tmp_path, frozen_epochs=1, prior="class-means", image_encoder=True)
    made = load_generator(tmp_path / "gan").generate(torch.zeros(2, *image, dtype=torch.uint8))
    assert made.shape == (2, 12, *size)
    for name in ("featuregan-1x", "edited", "combined"):
        scores = run_decoder(features, tmp_path, VARIANTS[name], name=name, epochs=1)
        assert 0 <= scores.miou <= 1
    run_gan(features, tmp_path / "flow", family="flow", flow_components=4, frozen_epochs=1)
    varied = {"augmenter": "featuregan", "generator": "frozen", "vary": 0.5}
    run_decoder(features, tmp_path / "flow", varied, name="varied", epochs=1)


@pytest.mark.parametrize(
    ("size", "stride", "least"),
    [((56, 64), 8, 64), ((512, 98), 14, 112), ((112, 256), 16, 128), ((224, 1024), 32, 256)],
)
def test_maps_below_8_x_8_are_refused_with_the_size_that_is_needed(
    size: Size, stride: int, least: int
) -> None:
    message = f"extract.input_size: .* at stride {stride}, .* use {least} x {least} pixels or more"
    with pytest.raises(ConfigError, match=message):
        check_input_size(size, stride)
    check_input_size((least, least), stride)


def test_a_side_that_the_stride_does_not_divide_has_one_row_more() -> None:
    check_input_size((225, 360), 32)  # 8 x 12
    with pytest.raises(ConfigError, match="features of 7 x 12"):
        check_input_size((224, 360), 32)


def test_parameters_take_sizes_that_are_not_multiples_of_32() -> None:
    assert "input_size: [72, 104]" in tiny_params({"extract.input_size": [72, 104]})
