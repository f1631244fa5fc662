"""Exported files compute PyTorch's logits in torchvision, torch.export and ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import Conv2dSame
from torch import Tensor, nn

import featurestore
import pipeline
from featurestore import StoreSpec
from featurestore.dataset import assemble
from featurestore.layers import map_shape
from stages.backbones.backbone import Backbone
from stages.backbones.build import build_backbone
from stages.backbones.map_network import MapNetwork, load_map_network
from stages.common.errors import ConfigError, DataError
from stages.models.decoder import Decoder
from stages.training.models import load_decoder, read_spec, save_weights
from stages.use import export, export_formats
from stages.use.export_formats import METADATA, EndToEnd, Metadata, Model, _SameConv2d, trace

CLASSES, PALETTE = ("belt", "Größe", "纸"), ((0, 0, 0), (10, 20, 30), (255, 0, 7))


def spec_of(backbone: Backbone, size: tuple[int, int] = (64, 64)) -> StoreSpec:
    layers = backbone.stored_layers(size)
    named = layers if len(layers) > 1 else []
    shape = map_shape(layers, size)
    return StoreSpec(
        feature_shape=shape,
        mask_shape=size,
        layer_names=tuple(layer.name for layer in named),
        layer_shapes=tuple(layer.shape for layer in named),
        class_names=CLASSES,
        palette=PALETTE,
        backbone=backbone.name,
        weights_digest=backbone.digest(),
        output_stride=round(size[0] / shape[1]),
        normalization_mean=backbone.mean,
        normalization_std=backbone.std,
        resize="stretch",
        compute="fp32",
        nonnegative=backbone.nonnegative,
        feature_dtype="float32",
    )


def write_decoder(
    folder: Path, backbone: Backbone, size: tuple[int, int] = (64, 64), **changes
) -> Path:
    """Write a folder as train-decoder does, with random weights and running statistics."""
    architecture = {
        "head": "deeplab",
        "in_channels": spec_of(backbone, size).feature_shape[0],
        "num_classes": 3,
        "width": 16,
        "atrous_rates": [2, 3],
        **changes,
    }
    folder.mkdir()
    for seed, name in enumerate(("decoder", "decoder-best")):
        torch.manual_seed(seed)
        decoder = Decoder(**{**architecture, "atrous_rates": tuple(architecture["atrous_rates"])})
        for module in decoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        save_weights(decoder.state_dict(), folder / f"{name}.safetensors")
    described = {
        "architecture": architecture,
        "variant": "baseline",
        "seed": 0,
        "features": spec_of(backbone, size).to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def images_of(count: int, height: int, width: int) -> Tensor:
    return torch.randint(
        0,
        256,
        (count, 3, height, width),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(height),
    )


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Backbone]:
    """A ResNet-50 with random weights: their file, and the network."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("resnet") / "resnet50.pth"
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), path)
    return path, build_backbone(name="resnet50", weights=str(path))


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return build_backbone(name="efficientnet_lite0", weights="default")


@pytest.fixture(scope="module")
def lite0_decoder(lite0: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("lite0") / "decoder", lite0)


@pytest.mark.parametrize(
    ("head", "suffix"), [("deeplab", ".pth"), ("deeplab", ".safetensors"), ("fcn", ".pth")]
)
@pytest.mark.medium
def test_torchvision_loads_every_tensor_and_computes_equal_logits(
    resnet: tuple[Path, Backbone],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    head: str,
    suffix: str,
) -> None:
    weights, backbone = resnet
    folder = write_decoder(
        tmp_path / "decoder", backbone, head=head, width=256, atrous_rates=[12, 24, 36]
    )
    out = tmp_path / f"model{suffix}"
    done = export.run(folder, format="torchvision", out=out, backbone_weights=str(weights))

    make = (
        torchvision.models.segmentation.fcn_resnet50
        if head == "fcn"
        else torchvision.models.segmentation.deeplabv3_resnet50
    )
    model = make(weights=None, weights_backbone=None, num_classes=3, aux_loss=None)
    model.load_state_dict(
        load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True),
        strict=True,
    )
    images = images_of(2, 64, 64)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (backbone.mean, backbone.std))
    with torch.no_grad():
        logits = model.eval()((images / 255 - mean) / std)["out"]

    # The decoder's own way: features through a store.
    with featurestore.create(tmp_path / "features", spec_of(backbone)) as writer:
        for number, features in enumerate(backbone(images)[0].numpy()):
            writer.append(id=str(number), features=features, mask=np.zeros((64, 64), np.uint8))
    cached = featurestore.open(tmp_path / "features").gather("features", [0, 1])
    expected = load_decoder(folder)(torch.from_numpy(cached), size=(64, 64))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert done.difference <= 1e-4 * done.largest
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["decoder", "features", "model.md", out.name]
    )
    # The code of the model card; PNG keeps the pixels.
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    card = (tmp_path / "model.md").read_text("utf-8").replace("photo.jpg", "photo.png")
    names: dict[str, Tensor] = {}
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    torch.testing.assert_close(names["logits"], logits[:1], rtol=1e-4, atol=1e-4)
    if suffix == ".safetensors":
        with safe_open(out, "pt") as file:
            assert json.loads(file.metadata()["class_names"]) == list(CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize(("format", "suffix"), [("torch-export", ".pt2"), ("onnx", ".onnx")])
def test_programs_take_any_number_of_images_of_any_size(
    lite0: Backbone, lite0_decoder: Path, tmp_path: Path, format: str, suffix: str
) -> None:
    out = tmp_path / f"model{suffix}"
    done = export.run(lite0_decoder, format=format, out=out, weights="decoder-best")
    assert done.sizes == ((64, 64), (37, 73))
    assert done.difference <= 1e-4 * done.largest

    if format == "onnx":
        model = onnx.load(out)
        onnx.checker.check_model(model)
        axes = model.graph.input[0].type.tensor_type.shape.dim
        assert [axis.dim_param or axis.dim_value for axis in axes] == [
            "batch",
            3,
            "height",
            "width",
        ]
        found = {part.key: part.value for part in model.metadata_props}
        found |= {key: json.loads(found[key]) for key in ("class_names", "palette", "trained_size")}
        session = onnxruntime.InferenceSession(out)

        def logits_of(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    else:
        extra = {METADATA: ""}
        logits_of = torch.export.load(out, extra_files=extra).module()
        found = json.loads(extra[METADATA])
    decoder = load_decoder(lite0_decoder, weights="decoder-best")
    for count, height, width in ((1, 96, 64), (3, 67, 90)):
        images = images_of(count, height, width)
        torch.testing.assert_close(
            logits_of(images), decoder(lite0(images)[0], size=(height, width)), rtol=1e-4, atol=1e-4
        )
    assert found["class_names"] == list(CLASSES)
    assert found["palette"] == [list(colour) for colour in PALETTE]
    assert found["trained_size"] == [64, 64]
    assert found["backbone"] == "efficientnet_lite0"
    for path in (Path(export.__file__).parent.parent, Path(sys.prefix)):
        assert str(path).encode() not in out.read_bytes(), (
            "the file names folders of the machine it was made on"
        )


@pytest.mark.medium
def test_a_fixed_size(lite0: Backbone, lite0_decoder: Path, tmp_path: Path) -> None:
    done = export.run(
        lite0_decoder, format="torch-export", out=tmp_path / "model.pt2", size=(72, 64)
    )
    assert done.sizes == ((72, 64),)
    images = images_of(3, 72, 64)
    expected = load_decoder(lite0_decoder)(lite0(images)[0], size=(72, 64))
    program = torch.export.load(done.path).module()
    torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError, match="72"):
        program(images_of(1, 64, 64))


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (4, 4, 1), (3, 2, 2), (7, 3, 1)]
)
def test_padding_is_timms_at_every_size(kernel: int, stride: int, dilation: int) -> None:
    conv = Conv2dSame(2, 3, kernel, stride=stride, dilation=dilation)
    for size in range(20, 33):
        x = torch.rand(1, 2, size, 51 - size)
        torch.testing.assert_close(_SameConv2d(conv)(x), conv(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("format", "suffix"), [("torch-export", ".pt2"), ("onnx", ".onnx")])
@pytest.mark.parametrize("size", [(112, 112), (112, 140)], ids=["square", "wide"])
def test_a_vit_of_two_layers_is_written_for_one_size(
    size: tuple[int, int], format: str, suffix: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_dinov3_qkvb").state_dict(), weights)
    size = (size[0] // 7 * 8, size[1] // 7 * 8)  # 16 pixels a patch
    vit = build_backbone(
        name="timm/vit_tiny_patch16_dinov3_qkvb", weights=str(weights), layers=["2", "11"]
    )
    folder = write_decoder(tmp_path / "decoder", vit, size, head="linear")
    out = tmp_path / f"model{suffix}"
    done = export.run(folder, format=format, out=out, backbone_weights=str(weights))
    assert done.sizes == (size,)
    assert done.difference <= 1e-3 * done.largest
    with pytest.raises(ConfigError, match="--size: .* multiples of 16, found 100; use 96 or 112"):
        export.run(folder, format=format, out=out, backbone_weights=str(weights), size=(100, 128))


@pytest.mark.medium
def test_folded_layers_are_written_for_the_size_of_training(tmp_path: Path) -> None:
    layers = ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]
    native = build_backbone(
        name="efficientnet_lite0", weights="default", layers=layers, dilate=False
    )
    spec = dataclasses.replace(spec_of(native), native_strides=True)
    folder = write_decoder(tmp_path / "decoder", native, head="deeplabv3plus", folds=spec.folds)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "features": spec.to_dict()}))
    done = export.run(folder, format="torch-export", out=tmp_path / "model.pt2")
    assert done.sizes == ((64, 64),)
    images = images_of(2, 64, 64)
    program = torch.export.load(tmp_path / "model.pt2").module()
    features = assemble(native(images), spec)
    expected = load_decoder(folder)(features, size=(64, 64))
    torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-4)


def test_end_to_end_leaves_its_networks_unchanged(lite0: Backbone) -> None:
    decoder = Decoder(head="deeplab", in_channels=320, num_classes=3, width=8, atrous_rates=(2, 3))
    segmenter = EndToEnd(backbone=MapNetwork(lite0, spec_of(lite0)), decoder=decoder)
    assert sum(isinstance(module, _SameConv2d) for module in segmenter.modules()) == 3
    assert not any(isinstance(module, _SameConv2d) for module in lite0.modules())
    assert decoder.training


class Fussy(nn.Module):
    """Does one thing for large pictures and another for small ones."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :1] * 2.0 if images.shape[-1] > 100 else images[:, :1] * 3.0


def test_a_network_that_depends_on_the_size_needs_size() -> None:
    with pytest.raises(
        ConfigError,
        match=r"--size: PyTorch cannot trace fussy for images of any size .*--size H W",
    ):
        trace(Fussy(), None, "fussy")
    program = trace(Fussy(), (64, 128), "fussy")
    assert (program.module()(images_of(1, 64, 128)) == 2.0 * images_of(1, 64, 128)[:, :1]).all()


@pytest.mark.parametrize("damage", [1.01, float("nan")])
@pytest.mark.medium
def test_a_file_with_other_logits_is_removed(
    resnet: tuple[Path, Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: float
) -> None:
    weights, backbone = resnet
    folder = write_decoder(tmp_path / "decoder", backbone, head="fcn")
    torchvision_format = export_formats.FORMATS["torchvision"]

    def damaged(model: Model, path: Path, metadata: Metadata) -> None:
        decoder = load_decoder(folder)
        decoder.last.weight.mul_(damage)
        torchvision_format.write(dataclasses.replace(model, decoder=decoder), path, metadata)

    changed = dataclasses.replace(torchvision_format, write=damaged)
    monkeypatch.setitem(export_formats.FORMATS, "torchvision", changed)
    with pytest.raises(
        DataError,
        match=r"model.pth: the exported logits differ by .* at 64 x 64; nothing was written",
    ):
        export.run(
            folder, format="torchvision", out=tmp_path / "model.pth", backbone_weights=str(weights)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["decoder"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(pipeline.main, [str(argument) for argument in arguments])


@pytest.mark.medium
def test_the_command_says_what_it_wrote_and_replaces_nothing_unasked(
    resnet: tuple[Path, Backbone], tmp_path: Path
) -> None:
    weights, backbone = resnet
    folder = write_decoder(tmp_path / "decoder", backbone, head="fcn")
    command = (
        "export",
        folder,
        "--format",
        "torchvision",
        "--out",
        tmp_path / "new" / "model.pth",
        "--backbone-weights",
        weights,
    )
    done = call(*command)
    assert done.exit_code == 0, done.output
    assert "differ from PyTorch's by" in done.output
    assert "64 x 64 and 37 x 73" in done.output
    before = (tmp_path / "new" / "model.pth").stat().st_mtime_ns
    refused = call(*command)
    assert refused.exit_code == 2
    assert "add --force" in refused.stderr
    assert (tmp_path / "new" / "model.pth").stat().st_mtime_ns == before
    assert call(*command, "--force", "--weights", "decoder-best").exit_code == 0


WRONG = {
    "a suffix of another format": (
        ("--format", "onnx", "--out", "model.pth"),
        2,
        "--out: onnx files end in .onnx, found 'model.pth'",
    ),
    "a backbone that torchvision lacks": (
        ("--format", "torchvision", "--out", "model.pth"),
        2,
        "not on efficientnet_lite0; use torch-export",
    ),
    "a size for torchvision": (
        ("--format", "torchvision", "--out", "m.pth", "--size", "64", "64"),
        2,
        "--size: torchvision's models take",
    ),
    "a size too small": (
        ("--format", "onnx", "--out", "m.onnx", "--size", "64", "8"),
        2,
        "--size: must be 32 or more, found 64 8",
    ),
    "weights that are not there": (
        ("--format", "onnx", "--out", "m.onnx", "--backbone-weights", "none.pth"),
        1,
        "none.pth: there is no such weights file; "
        "give --backbone-weights the file that extract.weights named",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line(
    lite0_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, code, words = WRONG[case]
    result = call("export", lite0_decoder, *arguments)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.medium
def test_other_models_and_other_weights_are_refused(
    resnet: tuple[Path, Backbone], lite0: Backbone, tmp_path: Path
) -> None:
    _, backbone = resnet
    out = tmp_path / "model.pth"
    narrow = write_decoder(tmp_path / "narrow", backbone, width=64)
    assert (
        "width 256, this decoder 64"
        in call("export", narrow, "--format", "torchvision", "--out", out).stderr
    )
    linear = write_decoder(tmp_path / "linear", backbone, head="linear")
    assert (
        "torchvision has no linear head; use torch-export or onnx"
        in call("export", linear, "--format", "torchvision", "--out", out).stderr
    )
    rates = write_decoder(tmp_path / "rates", backbone, width=256, atrous_rates=[3, 6, 9])
    assert (
        "atrous_rates [12, 24, 36], this decoder [3, 6, 9]"
        in call("export", rates, "--format", "torchvision", "--out", out).stderr
    )

    other = tmp_path / "other.pth"
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), other)
    refused = call(
        "export",
        narrow,
        "--format",
        "onnx",
        "--out",
        tmp_path / "m.onnx",
        "--backbone-weights",
        other,
    )
    assert refused.exit_code == 1
    assert (
        "other.pth: these are other resnet50 weights than those that the decoder's features were "
        "made with (sha256 " in refused.stderr
    )

    described = {
        "architecture": {"head": "fcn"},
        "features": {**spec_of(lite0).to_dict(), "weights_digest": "ab" * 32},
    }
    (tmp_path / "lite0").mkdir()
    (tmp_path / "lite0" / "config.json").write_text(json.dumps(described))
    with pytest.raises(
        ConfigError,
        match=r"--backbone-weights: these are other efficientnet_lite0 .* expected abababababab",
    ):
        load_map_network(read_spec(tmp_path / "lite0"), "default")

    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**config, "architecture": {"family": "gan"}}))
    assert (
        "no decoder; name a folder that train-decoder wrote"
        in call("export", narrow, "--format", "torchvision", "--out", out).stderr
    )
    nothing = call("export", tmp_path / "nothing", "--format", "torchvision", "--out", out)
    assert nothing.exit_code == 1
    assert "there is no trained model here" in nothing.stderr
    assert not out.exists()


def test_without_onnx_the_command_says_how_to_install_it(
    lite0_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    result = call("export", lite0_decoder, "--format", "onnx", "--out", tmp_path / "model.onnx")
    assert result.exit_code == 2
    assert (
        "--format onnx: needs onnxscript; install with pip install -e '.[export]'" in result.stderr
    )
