"""The second approach: SPADE's generator of images, behind a frozen backbone, in every stage."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import featurestore
from featurestore import SpecMismatchError
from featurestore.dataset import gather_maps
from stages.backbones.map_network import MapNetwork, load_map_network
from stages.common.errors import ConfigError, DataError
from stages.common.runtime import make_accelerator
from stages.gan.image_trainer import ImageTrainer, JointImageTrainer
from stages.gan.networks import build_networks
from stages.gan.objective import Objective
from stages.models.discriminator import Discriminator
from stages.models.image_discriminator import ImageDiscriminator
from stages.models.image_generator import (
    ImageFeatureGenerator,
    ImageGenerator,
    as_pixels,
    from_pixels,
)
from stages.reporting.curves import read_curves
from stages.train_gan import TrainGanConfig
from stages.training.models import load_gan, load_generator, load_training_state
from stages.use import generate
from tests.factories import (
    GAN,
    IMAGE_GAN,
    VARIANTS,
    call,
    extracted_photos,
    files,
    run,
    run_decoder,
    run_gan,
    stop_after,
    tiny_params,
    with_gan,
)
from tests.imports import ROOT

CHANNELS, FOLDS = 4 * 24 + 40, ((24, 2), (40, 1))
UNWATCHED = {"every": 0}  # the monitor's probe takes longer than these trainings
SWAPPED = {**VARIANTS["frozen"], "new_masks": ["swap"], "class_swap": True}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of two layers of Lite0 in one map, of 8 + 4 + 4 drawn photographs."""
    root = tmp_path_factory.mktemp("photos")
    layers = ["blocks.1", "blocks.2"]  # 24 x 16 x 16, folded, and 40 x 8 x 8
    return extracted_photos(root, {"train": 8, "val": 4, "test": 4}, layers=layers)


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pretrained generator of images, two steps."""
    root = tmp_path_factory.mktemp("trained")
    run_gan(photos, root, frozen_epochs=1, init_gain=0.5, **IMAGE_GAN)
    return root


def image_generator(**changes) -> ImageGenerator:
    settings = {"num_classes": 5, "image_size": (64, 96), "z_dim": 7, "ngf": 1, "spade_hidden": 8}
    return ImageGenerator(**{**settings, **changes})


def random_masks(batch: int, height: int = 64, width: int = 96) -> Tensor:
    masks = torch.randint(0, 5, (batch, height, width), dtype=torch.uint8)
    masks[:, :9] = 255
    return masks


# -- networks --------------------------------------------------------------------------------------


def spade_shapes(labels: int, start: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Tabulate the shapes of SPADE's generator, ngf 64, z of 256, ``labels`` mask channels."""
    table: dict[str, tuple[int, ...]] = {
        "fc.weight": (1024 * start[0] * start[1], 256),
        "fc.bias": (1024 * start[0] * start[1],),
        "conv_img.weight": (3, 64, 3, 3),
        "conv_img.bias": (3,),
    }
    for block, before, after in (
        ("head_0", 1024, 1024),
        ("G_middle_0", 1024, 1024),
        ("G_middle_1", 1024, 1024),
        ("up_0", 1024, 512),
        ("up_1", 512, 256),
        ("up_2", 256, 128),
        ("up_3", 128, 64),
    ):
        norms = {"norm_0": before, "norm_1": after}
        table |= {
            f"{block}.conv_0.weight": (after, before, 3, 3),
            f"{block}.conv_0.bias": (after,),
            f"{block}.conv_1.weight": (after, after, 3, 3),
            f"{block}.conv_1.bias": (after,),
        }
        if before != after:  # the shortcut is learned
            norms["norm_s"] = before
            table[f"{block}.conv_s.weight"] = (after, before, 1, 1)
        for norm, channels in norms.items():
            table |= {
                f"{block}.{norm}.mlp_shared.weight": (128, labels, 3, 3),
                f"{block}.{norm}.mlp_shared.bias": (128,),
                f"{block}.{norm}.mlp_gamma.weight": (channels, 128, 3, 3),
                f"{block}.{norm}.mlp_gamma.bias": (channels,),
                f"{block}.{norm}.mlp_beta.weight": (channels, 128, 3, 3),
                f"{block}.{norm}.mlp_beta.bias": (channels,),
            }
    return table


def test_the_generator_has_the_parameters_of_spades() -> None:
    with torch.device("meta"):
        network = ImageGenerator(num_classes=150, image_size=(256, 512))
        without_noise = ImageGenerator(num_classes=18, image_size=(256, 256), z_dim=0)
        discriminator = ImageDiscriminator(num_classes=18)
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in network.named_parameters():
        name = name.replace(".spade_", ".norm_").replace(".shared.", ".mlp_shared.")
        if ".gamma_beta." in name:  # one convolution here, two there
            for half, each in zip(("gamma", "beta"), tensor.chunk(2), strict=True):
                found[name.replace("gamma_beta", f"mlp_{half}")] = tuple(each.shape)
        else:
            found[name] = tuple(tensor.shape)
    assert found == spade_shapes(151, (8, 16))
    assert without_noise.fc.weight.shape == (1024, 19, 3, 3)
    # The authors' code logs these numbers for 19 mask channels.
    for each, millions in ((without_noise, 92.5), (discriminator, 5.6)):
        count = sum(parameter.numel() for parameter in each.parameters())
        assert round(count / 1e6, 1) == millions


def test_the_discriminator_has_the_parameters_of_spades() -> None:
    with torch.device("meta"):
        network = ImageDiscriminator(num_classes=150)
    shapes = [tuple(parameter.shape) for parameter in network.parameters()]
    one_scale = [
        *((64, 154, 4, 4), (64,)),
        *((128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4)),
        *((1, 512, 4, 4), (1,)),
    ]
    assert shapes == 2 * one_scale


@pytest.mark.parametrize("options", [{}, {"image_size": (75, 90)}, {"z_dim": 0}], ids=str)
def test_images_have_the_size_of_the_store_and_follow_mask_and_noise(options: dict) -> None:
    network = image_generator(init_gain=1.0, **options).eval()
    masks, z = random_masks(2, *network.image_size), torch.randn(4, network.z_dim)
    images = network(z, masks)
    assert images.shape == (4, 3, *network.image_size)
    assert -1 <= images.min() < images.max() <= 1
    torch.testing.assert_close(images[2:], network(z[2:], masks), rtol=1e-3, atol=1e-4)
    changed = masks.clone()
    changed[1] = (changed[1] + 1) % 5
    second = network(z, changed)
    torch.testing.assert_close(second[::2], images[::2])  # both draws of the first mask
    assert (second - images)[1::2].abs().mean() > 1e-3
    other = network(torch.randn(4, network.z_dim), masks)
    assert ((images - other).abs().mean() > 1e-3) == bool(network.z_dim)


def test_the_discriminator_judges_each_draw_of_a_mask_for_itself() -> None:
    network = ImageDiscriminator(num_classes=5, ndf=4, init_gain=0.5).eval()
    masks, real, fake = random_masks(2), torch.randn(2, 3, 64, 96), torch.randn(4, 3, 64, 96)
    of_real, of_fake = network([real, fake], masks)
    assert [scores.shape[1:] for scores in of_real.scores] == [(1, 11, 15), (1, 7, 9)]
    assert len(of_fake.layers) == 8
    for half in (slice(0, 2), slice(2, 4)):
        (alone,) = network([fake[half]], masks)
        for one, both in zip(
            [*alone.scores, *alone.layers], [*of_fake.scores, *of_fake.layers], strict=True
        ):
            torch.testing.assert_close(one, both[half], rtol=1e-4, atol=1e-5)
    (other,) = network([real], (masks + 1) % 5)
    assert not torch.allclose(other.scores[0], of_real.scores[0])


# -- behind the backbone ---------------------------------------------------------------------------


def test_stored_images_reproduce_the_features_of_the_store(photos: Path, trained: Path) -> None:
    store, generator = featurestore.open(photos / "train"), load_generator(trained / "gan")
    assert isinstance(generator, ImageFeatureGenerator)
    stored = gather_maps(store, [0, 5])
    pixels = torch.from_numpy(store.gather("images", [0, 5])).permute(0, 3, 1, 2)
    torch.testing.assert_close(as_pixels(from_pixels(pixels)), pixels.float(), rtol=0, atol=1e-4)
    features = generator.features(from_pixels(pixels)) * generator.feature_scale
    torch.testing.assert_close(features, stored, rtol=2e-3, atol=2e-3)  # float16
    with torch.autocast("cpu", torch.bfloat16):  # the backbone keeps the store's precision
        again = generator.features(from_pixels(pixels)) * generator.feature_scale
    assert torch.equal(again, features)


def test_generated_features_are_the_backbones_of_the_generated_images(
    photos: Path, trained: Path
) -> None:
    generator = load_generator(trained / "gan")
    assert isinstance(generator, ImageFeatureGenerator)
    store = featurestore.open(photos / "val")
    backbone = load_map_network(store.spec, "default")
    masks = torch.from_numpy(store.gather("masks", [0, 1])).clone()
    z = torch.randn(4, generator.z_dim)
    with torch.no_grad():
        expected = backbone((generator.network(z, masks) + 1) * 127.5)
    torch.testing.assert_close(generator.generate(masks, z=z), expected, rtol=1e-3, atol=1e-3)
    new, real = (masks + 1) % 7, torch.rand_like(expected)
    moved = generator.generate(new, z=z) - generator.generate(masks, z=z)
    swapped = generator.swap_classes(real, masks, new, z=z)
    torch.testing.assert_close(swapped, real + moved, rtol=1e-3, atol=1e-3)
    assert moved.abs().max() > 1e-3


def test_gradients_reach_the_generator_of_images_through_the_frozen_backbone(
    trained: Path,
) -> None:
    networks, _ = load_gan(trained / "gan")
    generator = networks.generator.train()
    assert isinstance(generator, ImageFeatureGenerator)
    before = {name: tensor.clone() for name, tensor in generator.backbone.state_dict().items()}
    masks = torch.randint(0, 7, (2, 64, 64), dtype=torch.uint8)
    generator(torch.randn(2, generator.z_dim), masks).square().mean().backward()
    for name, parameter in generator.network.named_parameters():
        assert parameter.grad is not None, name
    assert float(generator.network.conv_img.weight.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in generator.backbone.parameters())
    after = generator.backbone.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_pretraining_sees_images_and_the_joint_training_features(trained: Path) -> None:
    description = json.loads((trained / "gan" / "config.json").read_text())["architecture"]
    assert isinstance(build_networks(description).discriminator, ImageDiscriminator)
    networks, config = load_gan(trained / "gan")
    store = config["features"]["feature_shape"]
    seen: list[Tensor] = []

    def judged(network: torch.nn.Module, inputs: tuple, output: object) -> None:
        seen.extend(inputs[0])

    settings = {"folds": FOLDS, "generator_lr": 1e-3, "discriminator_lr": 1e-3}
    settings |= {"betas": (0.0, 0.9)}
    features, images = torch.rand(2, *store), torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    masks = torch.randint(0, 7, (2, 64, 64), dtype=torch.uint8)
    for kind, shape in ((ImageTrainer, (2, 3, 64, 64)), (JointImageTrainer, (2, CHANNELS, 8, 8))):
        if kind is JointImageTrainer:
            networks.discriminator = Discriminator(num_classes=7, feature_channels=CHANNELS, ndf=4)
        trainer = kind(make_accelerator("cpu", "no"), networks, Objective(), **settings)
        assert networks.discriminator is not None
        networks.discriminator.register_forward_hook(judged)
        trainer.forward(features, masks, images, rng=torch.Generator().manual_seed(0))
        assert [tuple(group.shape) for group in seen] == [shape, shape]
        seen.clear()
        frozen = set(networks.generator.backbone.parameters())  # type: ignore[union-attr,arg-type]
        assert not frozen & set(trainer.generator_parameters)


# -- stages ----------------------------------------------------------------------------------------


@pytest.mark.medium
def test_from_images_to_decoders(photos: Path, trained: Path, tmp_path: Path) -> None:
    curves = read_curves(trained / "metrics" / "train-gan")
    assert curves["monitor/diversity"].iloc[-1] >= 0
    assert curves["monitor/frechet"].iloc[-1] > 0
    root = with_gan(trained, tmp_path)
    before, config = load_generator(root / "gan").state_dict(), (root / "gan" / "config.json")
    run_decoder(photos, root, VARIANTS["featuregan-1x"], name="joint", epochs=1, monitor=UNWATCHED)
    joint = root / "decoders" / "joint-0" / "gan"
    after = load_generator(joint).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith("backbone.") for name in changed)
    networks, _ = load_gan(joint)
    assert isinstance(networks.discriminator, Discriminator)
    untouched = json.loads(config.read_text())["architecture"]
    assert untouched["discriminates"] == "images"
    frozen = load_generator(root / "gan").state_dict()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in before.items())
    run_decoder(photos, root, VARIANTS["frozen"], name="frozen", epochs=1)
    run_decoder(photos, root, SWAPPED, name="swapped", epochs=1)
    for gan in (root / "gan", joint):
        store = generate.run(
            gan,
            photos / "val",
            out=tmp_path / "made" / gan.parent.name,
            per_mask=1,
            seed=0,
            scratch=tmp_path / "scratch",
            device="cpu",
            workers=0,
        )
        assert store.spec.generator.startswith("image ")
        assert store.spec.feature_shape == (CHANNELS, 8, 8)


def test_a_saved_generator_loads_without_the_weights_of_its_backbone(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.backbones import efficientnet_lite0

    monkeypatch.setattr(efficientnet_lite0, "default_state", lambda: pytest.fail("downloaded"))
    generator = load_generator(trained / "gan")
    assert isinstance(generator, ImageFeatureGenerator)
    assert isinstance(generator.backbone, MapNetwork)
    digest = json.loads((trained / "gan" / "config.json").read_text())["features"]["weights_digest"]
    assert generator.backbone.backbone.digest() == digest


@pytest.mark.medium
@pytest.mark.parametrize(
    "changes",
    [
        {"image_encoder": True, "diffaugment": ["flip", "translation", "cutout"]},
        {"ema_decay": 0.9, "lambda_rec": 1.0, "gradient_accumulation": 2, "z_dim": 0},
    ],
    ids=str,
)
def test_killed_trainings_resume_to_the_same_bits(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    settings = {**IMAGE_GAN, "frozen_epochs": 1, **changes}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_gan(photos, whole, UNWATCHED, **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        run_gan(photos, killed, UNWATCHED, **settings)
    run_gan(photos, killed, UNWATCHED, **settings)
    ours, undisturbed = files(killed / "gan"), files(whole / "gan")
    assert ours.keys() == undisturbed.keys()
    assert {name for name in ours if ours[name] != undisturbed[name]} <= {"optimizers.pt"}
    joint = {"name": "joint", "epochs": 1, "monitor": UNWATCHED}
    expected = run_decoder(photos, whole, VARIANTS["featuregan-1x"], **joint)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        run_decoder(photos, killed, VARIANTS["featuregan-1x"], **joint)
    assert run_decoder(photos, killed, VARIANTS["featuregan-1x"], **joint) == expected
    ours, undisturbed = (
        (root / "decoders" / "joint-0" / "gan" / "discriminator.safetensors").read_bytes()
        for root in (killed, whole)
    )
    assert ours == undisturbed


def test_the_joint_training_continues_the_generators_optimizer_only(trained: Path) -> None:
    networks, _ = load_gan(trained / "gan")
    networks.discriminator = Discriminator(num_classes=7, feature_channels=CHANNELS, ndf=4)
    accelerator = make_accelerator("cpu", "no")
    settings = {"generator_lr": 1e-3, "discriminator_lr": 1e-3, "betas": (0.0, 0.9)}
    trainer = JointImageTrainer(accelerator, networks, Objective(), folds=FOLDS, **settings)
    state = load_training_state(trained / "gan")
    trainer.load_pretraining(state)
    assert trainer.steps == state["steps"] == 2
    assert trainer.optimizers["generator"].state_dict()["state"]
    assert not trainer.optimizers["discriminator"].state_dict()["state"]


@pytest.mark.slow
def test_two_processes_train_as_one(photos: Path, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    arguments = ("-m", "tests.stages.train_in_processes", "image,joint-image", str(photos))
    roots = {how: tmp_path / how for how in ("one", "two", "sharded")}
    for how, root in roots.items():
        launcher = () if how == "one" else torchrun
        gan = str(roots["one"] / "image")
        command = (sys.executable, *launcher, *arguments, str(root), gan)
        run(*command, cwd=ROOT, OMP_NUM_THREADS="1")
    for stage in ("image", "joint-image"):
        one, *others = (read_curves(root / "metrics" / stage) for root in roots.values())
        losses = [name for name in one if not name.startswith(("monitor", "val"))]
        assert len(losses) > 5
        for other in others:
            for loss in losses:
                expected = one[loss].iloc[0]
                assert other[loss].iloc[0] == pytest.approx(expected, rel=2e-2, abs=2e-3), loss
    for name in ("image", "joint-image/gan"):
        one, *others = (load_generator(root / name).state_dict() for root in roots.values())
        for other in others:
            for key, tensor in one.items():
                if key.startswith("backbone."):
                    assert torch.equal(tensor, other[key]), key


def test_the_command_passes_the_weights_of_the_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import train_gan
    from stages.commands.params import Params

    seen: dict[str, object] = {}
    changes = {
        "train_gan.family": "image",
        "train_gan.prior": "none",
        "extract.weights": "mine.pth",
    }
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(tiny_params(changes))
    monkeypatch.setattr(Params, "check_features", lambda *_: None)
    monkeypatch.setattr(train_gan, "run", lambda *_, **options: seen.update(options) or {})
    assert call("train-gan", "--device", "cpu").exit_code == 0
    assert seen["backbone_weights"] == "mine.pth"


# -- bad input -------------------------------------------------------------------------------------


def test_a_store_without_images_is_refused(tmp_path: Path) -> None:
    counts = {"train": 4, "val": 2, "test": 2}
    features = extracted_photos(tmp_path, counts, store_images=False)
    with pytest.raises(SpecMismatchError, match="train_gan.family image needs images; set extract"):
        run_gan(features, tmp_path, **IMAGE_GAN)


def test_other_weights_than_those_of_the_store_are_refused(photos: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = load_map_network(featurestore.open(photos / "train").spec, "default").backbone.network
    weights = {
        name: tensor + (tensor.dtype == torch.float32)
        for name, tensor in state.state_dict().items()
    }
    save_file(weights, tmp_path / "other.safetensors")
    other = str(tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="other efficientnet_lite0 weights.* run the extract stage"):
        run_gan(photos, tmp_path, backbone_weights=other, **IMAGE_GAN)
    assert not (tmp_path / "gan").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conditioning": "concat"}, "conditioning concat does not work with family image"),
        ({"prior": "class-means"}, "prior class-means does not work with family image; set it to"),
        (
            {"lambda_info": 1.0},
            "lambda_info 1.0 does not work with family image; set it to",
        ),
        ({"noise": "spatial"}, "noise spatial does not work with family image; set it to vector"),
        (
            {"flow_width": 8},
            "flow_width 8 does not work with family image; set it to 64, or",
        ),
        ({"adversarial_loss": "segmentation"}, "adversarial_loss segmentation needs a discrimin"),
    ],
)
def test_keys_of_other_generators_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainGanConfig(**{**GAN, **IMAGE_GAN, **changes})


def test_a_flow_is_needed_for_variations(photos: Path, trained: Path, tmp_path: Path) -> None:
    root = with_gan(trained, tmp_path)
    shutil.rmtree(root / "scratch", ignore_errors=True)
    with pytest.raises(ConfigError, match="works only with flow, and .* holds image; set it to"):
        run_decoder(photos, root, {**VARIANTS["frozen"], "vary": 0.5}, name="varied")
