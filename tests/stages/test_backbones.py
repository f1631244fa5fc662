"""Backbones of several layers, at native strides, and transformers, against timm."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stages.backbones import timm_backbone
from stages.backbones.backbone import Backbone, BackboneError
from stages.backbones.build import ALIASES, KNOWN, build_backbone, known_backbone
from stages.use.export_formats import trace

# A model of each architecture, one layer that is not its last, and two sizes.
TRANSFORMERS = {
    "vit_small_patch14_reg4_dinov2": ("5", (112, 112), (112, 140)),
    "vit_tiny_patch16_dinov3_qkvb": ("5", (128, 128), (128, 160)),
    "vit_base_patch16_siglip_256": ("3", (128, 128), (128, 160)),
    "beitv2_base_patch16_224": ("3", (128, 128), (128, 160)),
    "samvit_base_patch16": ("3", (128, 128), (128, 160)),
    "eva02_tiny_patch14_224": ("3", (112, 112), (112, 140)),
    "swin_tiny_patch4_window7_224": ("layers.1", (224, 224), (256, 320)),
    "hiera_tiny_224": ("blocks.2", (224, 224), (256, 320)),
}
CNNS = {"convnext_atto": "stages.1", "resnet18": "layer2", "tf_efficientnet_lite0": "blocks.2"}
FIXED = ("beitv2_base_patch16_224", "swin_tiny_patch4_window7_224", "hiera_tiny_224")  # in size
LITE0 = "4420b984b30287516029d8a9f61c8896f5d7073cae1569e551eabdb350ae7067"


def images_of(size: tuple[int, int]) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, *size), generator=rng, dtype=torch.uint8)


def normalised(backbone: Backbone, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
    return (images / 255 - mean) / std


@pytest.mark.medium
@pytest.mark.parametrize("number", [0, 1], ids=["square", "wide"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_gives_what_timm_gives(name: str, number: int, tmp_path: Path) -> None:
    layer, *sizes = TRANSFORMERS[name]
    size, options = sizes[number], {}
    options = {"img_size": size} if name in FIXED else {"dynamic_img_size": True}
    if name.startswith("samvit"):  # takes any size with the position embeddings of its release
        options = {}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    names = [str(n) for n in range(12)]
    if "layers" in layer or "blocks" in layer:
        names = [info["module"] for info in model.feature_info]
    backbone = build_backbone(
        name=f"timm/{name}",
        weights=str(tmp_path / "weights.pth"),
        layers=[names[-1], layer],
        dilate=False,
        size=size,
    )
    assert [each.name for each in backbone.layers] == [layer, names[-1]]
    images = images_of(size)
    with torch.no_grad():
        expected = model.forward_intermediates(
            normalised(backbone, images),
            indices=[names.index(layer), len(names) - 1],
            norm=name != "hiera_tiny_224",
            output_fmt="NCHW",
            intermediates_only=True,
        )
    for each, features, reference in zip(backbone.layers, backbone(images), expected, strict=True):
        assert features.shape == (2, each.channels, size[0] // each.stride, size[1] // each.stride)
        torch.testing.assert_close(features, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.medium
@pytest.mark.parametrize("dilate", [True, False])
@pytest.mark.parametrize("name", CNNS)
def test_a_cnn_gives_what_timm_gives(name: str, dilate: bool, tmp_path: Path) -> None:
    options = {"output_stride": 8} if dilate else {}
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, **options).eval()
    torch.save(timm.create_model(name).state_dict() | model.state_dict(), tmp_path / "weights.pth")
    names = model.feature_info.module_name()
    backbone = build_backbone(
        name=f"timm/{name}",
        weights=str(tmp_path / "weights.pth"),
        layers=[CNNS[name], names[-1]],
        dilate=dilate,
    )
    for size in ((64, 64), (64, 96)):
        images = images_of(size)
        with torch.no_grad():
            maps = model(normalised(backbone, images))
        first, last = backbone(images)
        torch.testing.assert_close(first, maps[names.index(CNNS[name])], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last, maps[-1], rtol=1e-4, atol=1e-4)
        assert backbone.layers[-1].stride == 64 // last.shape[2] == (8 if dilate else 32)
    assert backbone.multiple == backbone.layers[0].stride == 8


@pytest.mark.medium
def test_a_resnet_has_its_stages_as_layers() -> None:
    torch.manual_seed(0)
    whole = build_backbone(name="resnet50", weights=None, layers=["layer1", "layer3", "layer4"])
    assert [(x.name, x.channels, x.stride) for x in whole.layers] == [
        ("layer1", 256, 4), ("layer3", 1024, 8), ("layer4", 2048, 8)
    ]  # fmt: skip
    native = build_backbone(name="resnet50", weights=None, layers=["layer2"], dilate=False)
    assert [tuple(x.shape) for x in native(images_of((64, 96)))] == [(2, 512, 8, 12)]
    assert not any(name.startswith("layer3") for name in native.network.state_dict())
    assert whole.nonnegative


def dinov2_release(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors of timm's DINOv2 as its authors do, and add those that timm leaves out."""
    renamed = {name.replace("reg_token", "register_tokens"): x for name, x in state.items()}
    width = state["norm.weight"].shape[0]
    # The release has an embedding of the position of the class token, which timm adds to the token.
    place = torch.randn(1, 1, width)
    renamed["pos_embed"] = torch.cat([place, state["pos_embed"]], 1)
    renamed["cls_token"] = state["cls_token"] - place
    return {**renamed, "mask_token": torch.zeros(1, width)}


@pytest.mark.medium
def test_the_release_of_dinov2_loads_by_path(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0)
    state = model.state_dict()
    torch.save(dinov2_release(state), tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    backbone = build_backbone(
        name="dinov2_vits14", weights=str(tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    )
    loaded = backbone.network.state_dict()
    assert {name.removeprefix("model.") for name in loaded} == set(state)
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, state[name.removeprefix("model.")])


def dinov3_release(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors of timm's DINOv3 as its authors do, and add those that timm leaves out."""
    renamed, width = {}, state["norm.weight"].shape[0]
    for name, tensor in state.items():
        new = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        renamed[new.replace("reg_token", "storage_tokens")] = tensor
    for block in range(12):
        biases = [
            renamed.pop(f"blocks.{block}.attn.{part}_bias", torch.zeros(width)) for part in "qv"
        ]
        # The release has biases of keys too, which a mask turns off.
        renamed[f"blocks.{block}.attn.qkv.bias"] = torch.cat(
            [biases[0], torch.ones(width), biases[1]]
        )
        renamed[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(3 * width)
    return {**renamed, "mask_token": torch.zeros(1, width), "rope_embed.periods": torch.zeros(16)}


@pytest.mark.medium
@pytest.mark.parametrize("network", ["vit_small_patch16_dinov3", "vit_tiny_patch16_dinov3_qkvb"])
def test_the_release_of_dinov3_loads_by_path(
    network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    state = timm.create_model(network, num_classes=0).state_dict()
    state = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    torch.save(dinov3_release(state), tmp_path / "release.pth")
    backbone = build_backbone(name=f"timm/{network}", weights=str(tmp_path / "release.pth"))
    loaded = backbone.network.state_dict()
    assert {name.removeprefix("model.") for name in loaded} == set(state)
    assert all(torch.equal(x, state[name.removeprefix("model.")]) for name, x in loaded.items())
    assert capsys.readouterr().out == ""


@pytest.mark.medium
def test_biases_that_a_network_lacks_are_not_left_out(tmp_path: Path) -> None:
    state = timm.create_model("vit_small_patch16_dinov3_qkvb", num_classes=0).state_dict()
    state["blocks.3.attn.v_bias"][0] = 1
    torch.save(dinov3_release(state), tmp_path / "release.pth")
    with pytest.raises(BackboneError) as error:
        build_backbone(name="timm/vit_small_patch16_dinov3", weights=str(tmp_path / "release.pth"))
    assert error.value.key == "weights"
    assert str(error.value) == (
        f"{tmp_path / 'release.pth'}: has biases 'blocks.3.attn.qkv.bias', for which this backbone"
        " has no place; use timm's network that ends in _qkvb"
    )


@pytest.mark.medium
@pytest.mark.parametrize("weights", ["default", "a file"])
def test_hieras_position_embeddings_are_interpolated_to_the_size(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    state = timm.create_model("hiera_tiny_224").state_dict()
    if weights == "default":
        monkeypatch.setattr(timm_backbone, "download", lambda *_: state)
    else:
        weights = str(tmp_path / "hiera.pth")
        torch.save(state, weights)
    backbone = build_backbone(
        name="timm/hiera_tiny_224", weights=weights, dilate=False, size=(256, 320)
    )
    loaded = backbone.network.state_dict()
    table = state["pos_embed"].reshape(1, 56, 56, 96).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(64, 80), mode="bicubic", antialias=True)
    expected = table.permute(0, 2, 3, 1).reshape(1, 64 * 80, 96)
    torch.testing.assert_close(loaded["model.pos_embed"], expected)
    name = "blocks.11.mlp.fc2.weight"
    assert torch.equal(loaded[f"model.{name}"], state[name])


@pytest.mark.medium
@pytest.mark.parametrize(
    "name", ["timm/vit_tiny_patch16_dinov3_qkvb", "swin_tiny", "timm/hiera_tiny_224"]
)
def test_fake_tensors_have_the_shapes_of_the_features(name: str) -> None:
    """``estimate`` counts operations without computing anything."""
    settings = {"name": name, "weights": None, "dilate": False, "size": (256, 320)}
    real = build_backbone(**settings).stored_layers((256, 320))
    with FakeTensorMode():
        assert build_backbone(**settings).stored_layers((256, 320)) == real


@pytest.mark.slow
@pytest.mark.parametrize("size", [(112, 112), (112, 140)], ids=["square", "wide"])
def test_onnx_runtime_computes_what_a_vit_computes(size: tuple[int, int], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    backbone = build_backbone(name="dinov2_vits14", weights=None, layers=["2", "11"], size=size)
    images = images_of(size)
    program = trace(backbone, size, "dinov2_vits14")
    expected = backbone(images)
    torch.testing.assert_close(program.module()(images), expected)
    written = torch.onnx.export(program, dynamo=True, input_names=["images"], verbose=False)
    written.save(tmp_path / "vit.onnx", external_data=False)
    session = onnxruntime.InferenceSession(
        tmp_path / "vit.onnx", providers=["CPUExecutionProvider"]
    )
    computed = session.run(None, {"images": images.numpy()})
    for features, reference in zip(computed, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(features), reference, rtol=1e-3, atol=1e-4)


def test_the_digest_of_stored_features_stays() -> None:
    """Stores that exist name their backbone's weights by this digest."""
    assert build_backbone(name="efficientnet_lite0", weights="default").digest() == LITE0


@pytest.mark.medium
def test_the_release_of_dinov3s_convnext_loads_by_path(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = timm.create_model("convnext_tiny", num_classes=0).state_dict()
    renamed = {}
    for name, tensor in state.items():
        new = name.replace("stem.", "downsample_layers.0.")
        for stage in range(4):
            new = new.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
            new = new.replace(f"stages.{stage}.blocks.", f"stages.{stage}.")
        new = new.replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1")
        new = new.replace("mlp.fc2", "pwconv2").replace("head.norm.", "norm.")
        renamed[new] = tensor
    torch.save(renamed, tmp_path / "release.pth")
    backbone = build_backbone(name="dinov3_convnext_tiny", weights=str(tmp_path / "release.pth"))
    loaded = backbone.network.state_dict()
    assert torch.equal(loaded["stem_0.weight"], state["stem.0.weight"])
    name = "stages.2.blocks.3.mlp.fc1.weight"
    assert torch.equal(loaded[name.replace("stages.2", "stages_2")], state[name])


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_is_a_model_of_timm(name: str) -> None:
    assert known_backbone(name)
    assert timm.is_model(ALIASES[name])
    assert name in KNOWN


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        (
            {"name": "resnet50", "layers": ["layer5"]},
            "layers",
            "resnet50 has no layer 'layer5'; known are layer1, layer2, layer3, layer4",
        ),
        (
            {"name": "dinov2_vits14", "layers": ["12"]},
            "layers",
            "dinov2_vits14 has no layer '12'; known are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11",
        ),
        (
            {"name": "dinov2_vits14", "size": (256, 252)},
            "input_size",
            "dinov2_vits14 takes sides that are multiples of 14, found 256; use 252 or 266",
        ),
        (
            {"name": "dinov2_vits14", "size": (7, 14)},
            "input_size",
            "dinov2_vits14 takes sides that are multiples of 14, found 7; use 14 or 28",
        ),
        (
            {"name": "efficientnet_lite0", "size": (100, 128)},
            "input_size",
            "efficientnet_lite0 takes sides that are multiples of 8, found 100; use 96 or 104",
        ),
        (
            {"name": "swin_tiny"},
            "dilate",
            "swin_tiny cannot be dilated to stride 8; set it to false",
        ),
    ],
)
def test_what_a_backbone_cannot_do_is_one_line(
    settings: dict[str, object], key: str, message: str
) -> None:
    with pytest.raises(BackboneError) as error:
        build_backbone(**{"weights": None, **settings})
    assert (error.value.key, str(error.value)) == (key, message)


@pytest.mark.medium
def test_weights_of_another_model_are_one_line(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_dinov3_qkvb", num_classes=0).state_dict()
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(BackboneError, match=r"other.pth: does not fit this backbone"):
        build_backbone(name="dinov2_vits14", weights=str(tmp_path / "other.pth"))


@pytest.mark.medium
def test_a_size_that_only_the_forward_pass_refuses_is_one_line() -> None:
    backbone = build_backbone(name="timm/mvitv2_tiny", weights=None, dilate=False)
    with pytest.raises(BackboneError, match="cannot take images of 224 x 256") as error:
        backbone.stored_layers((224, 256))
    assert error.value.key == "input_size"
