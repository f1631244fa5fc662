"""File formats of exported models: how to write each, and how to run what was written.

Runners take images (B, 3, H, W) uint8 RGB and return logits (B, K, H, W).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.transforms.functional import normalize

from featurestore import StoreSpec
from stages.backbones.map_network import MapNetwork
from stages.backbones.resnet import RESNETS
from stages.common.errors import ConfigError
from stages.models.decoder import Decoder

METADATA = "metadata.json"  # name of the extra file in a .pt2
MIN_SIDE = 32  # pixels; smaller images leave nearly empty feature maps
TORCHVISION = {"width": 256, "atrous_rates": [12, 24, 36]}  # of torchvision's deeplabv3_resnet*
ONNX_BYTES = 2**31  # maximum of a protobuf file

Size = tuple[int, int]  # (H, W)
Runner = Callable[[Tensor], Tensor]
Metadata = dict[str, object]


@dataclass(frozen=True)
class Model:
    """A trained decoder and its backbone.

    Attributes
    ----------
    backbone, decoder
        Networks in evaluation mode.
    spec
        Spec of the features.
    architecture
        The decoder's constructor arguments.
    size
        (H, W) of the images; None: any size.
    """

    backbone: MapNetwork
    decoder: Decoder
    spec: StoreSpec
    architecture: Mapping[str, object]
    size: Size | None


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes
    ----------
    suffixes
        Suffixes of its files.
    write
        Writes a model and its metadata to a path.
    open
        Returns a runner of the file at a path, which holds a given model.
    libraries
        Modules of the extra ``export`` that the format needs.
    """

    suffixes: tuple[str, ...]
    write: Callable[[Model, Path, Metadata], None]
    open: Callable[[Path, Model], Runner]
    libraries: tuple[str, ...] = ()


# -- torchvision ----------------------------------------------------------------------------------


def torchvision_name(spec: StoreSpec, architecture: Mapping[str, object]) -> str:
    """Return the name of torchvision's model of an architecture.

    Raises
    ------
    ConfigError
        When torchvision has no such model; the text names the difference and the remedy.
    """
    key = "--format torchvision"
    if spec.backbone not in RESNETS:
        message = (
            f"torchvision has models on {' and '.join(RESNETS)}, not on {spec.backbone}; "
            "use torch-export or onnx"
        )
        raise ConfigError(key, message, expected=RESNETS, actual=spec.backbone)
    if spec.layer_names or spec.native_strides:
        message = "torchvision's models read the last, dilated layer; use torch-export or onnx"
        raise ConfigError(key, message, actual=spec.layer_names)
    head = architecture["head"]
    if head not in ("deeplab", "fcn"):
        message = f"torchvision has no {head} head; use torch-export or onnx"
        raise ConfigError(key, message, expected=("deeplab", "fcn"), actual=head)
    if head == "fcn":
        return f"fcn_{spec.backbone}"
    for name, expected in TORCHVISION.items():
        if (actual := architecture[name]) != expected:
            message = (
                f"torchvision's deeplabv3 has {name} {expected}, this decoder {actual}; "
                "use torch-export or onnx"
            )
            raise ConfigError(key, message, expected=expected, actual=actual)
    return f"deeplabv3_{spec.backbone}"


def write_torchvision(model: Model, path: Path, metadata: Metadata) -> None:
    """Write the state dict of torchvision's model; ``.pth`` files hold no metadata."""
    networks = {"backbone": model.backbone.backbone.network, "classifier": model.decoder.head}
    state = {
        f"{prefix}.{name}": tensor.contiguous()
        for prefix, network in networks.items()
        for name, tensor in network.state_dict().items()
    }
    if path.suffix == ".safetensors":
        save_file(state, path, metadata=_texts(metadata))
    else:
        torch.save(state, path)


def open_torchvision(path: Path, model: Model) -> Runner:
    """Load the file into torchvision's model, behind the normalisation that callers have to do."""
    network = torchvision.models.get_model(
        torchvision_name(model.spec, model.architecture),
        weights=None,
        weights_backbone=None,
        num_classes=model.spec.num_classes,
        aux_loss=None,
    )
    safe = path.suffix == ".safetensors"
    state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(state, strict=True)
    network.eval()
    mean, std = list(model.spec.normalization_mean), list(model.spec.normalization_std)
    return lambda images: network(normalize(images.float() / 255, mean, std))["out"]


# -- traced programs ------------------------------------------------------------------------------


class EndToEnd(nn.Module):
    """Copies of a frozen backbone and a trained decoder as one network, in evaluation mode."""

    def __init__(self, *, backbone: MapNetwork, decoder: Decoder) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.decoder = copy.deepcopy(decoder)
        if backbone.spec.backbone not in RESNETS:
            _make_padding_traceable(self.backbone)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 RGB images -> (B, K, H, W) logits."""
        return self.decoder(self.backbone(images), size=(images.shape[-2], images.shape[-1]))


class _SameConv2d(nn.Module):
    """TensorFlow's ``SAME`` convolution: ceil(input pixels / stride) output pixels.

    The values are those of timm's ``Conv2dSame``. That class rounds in floating point and takes a
    maximum; a tracer carries both along in growing formulas of the image's size, which takes
    minutes and makes a slow graph.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))."""
        conv, pads = self.conv, []
        for axis in (1, 0):  # F.pad takes the width first
            size, stride = x.shape[2 + axis], conv.stride[axis]
            outputs = (size + stride - 1) // stride
            reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
            total = (outputs - 1) * stride + reach - size
            pads += [total // 2, total - total // 2]
        return F.conv2d(
            F.pad(x, pads), conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups
        )


def _make_padding_traceable(network: nn.Module) -> None:
    """Replace timm's ``SAME`` convolutions whose kernel covers their stride.

    Other convolutions have another padding than :class:`_SameConv2d`.
    """
    from timm.layers import Conv2dSame

    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv2dSame) and all(
                dilation * (kernel - 1) + 1 >= stride
                for kernel, dilation, stride in zip(
                    child.kernel_size, child.dilation, child.stride, strict=True
                )
            ):
                setattr(parent, name, _SameConv2d(child))


def dynamic_shapes(size: Size | None) -> dict[int, Dim]:
    """Return the axes of the images that may have any length: B and, without ``size``, H and W."""
    shapes = {0: Dim("batch", min=1)}
    if size is None:
        shapes |= {2: Dim("height", min=MIN_SIDE), 3: Dim("width", min=MIN_SIDE)}
    return shapes


def trace(network: nn.Module, size: Size | None, name: str) -> ExportedProgram:
    """Trace a network from images to logits.

    Parameters
    ----------
    network
        The network, in evaluation mode.
    size
        (H, W) of the images; None: any size.
    name
        Name of the network in error messages.

    Raises
    ------
    ConfigError
        When PyTorch cannot trace it.
    """
    # Two images with unequal sides: a tracer takes a length of 1, or equal lengths, for a rule.
    example = torch.zeros(2, 3, *(size or (2 * MIN_SIDE, 3 * MIN_SIDE)), dtype=torch.uint8)
    try:
        with torch.no_grad():
            program = torch.export.export(
                network, (example,), dynamic_shapes=(dynamic_shapes(size),)
            )
    except Exception as error:  # torch.export's many errors, and those of the network
        reason = " ".join(str(error).split())[:200]
        if size is not None:
            message = f"PyTorch cannot trace {name} ({reason}); there is no other way to write it"
            raise ConfigError("--format", message) from error
        message = (
            f"PyTorch cannot trace {name} for images of any size ({reason}); "
            "name the one you need with --size H W"
        )
        raise ConfigError("--size", message) from error
    for node in program.graph.nodes:  # stack traces name folders of this machine
        node.meta.pop("stack_trace", None)
    return program


def _trace_model(model: Model) -> ExportedProgram:
    network = EndToEnd(backbone=model.backbone, decoder=model.decoder)
    return trace(network, model.size, model.spec.backbone)


def write_program(model: Model, path: Path, metadata: Metadata) -> None:
    """Write a ``.pt2``; the metadata is its extra file ``metadata.json``."""
    text = json.dumps(metadata, indent=1, ensure_ascii=False)
    with open(path, "wb") as file:  # by path, PyTorch insists on the suffix .pt2
        torch.export.save(_trace_model(model), file, extra_files={METADATA: text})


def open_program(path: Path, model: Model) -> Runner:
    """Load what :func:`write_program` wrote."""
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def write_onnx(model: Model, path: Path, metadata: Metadata) -> None:
    """Write an ONNX file; its ``metadata_props`` are the metadata, as JSON where it is no text.

    Raises
    ------
    ConfigError
        When the weights are larger than an ONNX file may be.
    """
    networks = (model.backbone, model.decoder)
    size = sum(tensor.nbytes for net in networks for tensor in net.state_dict().values())
    if size >= ONNX_BYTES:
        raise ConfigError(
            "--format onnx",
            f"{size / 1e9:.1f} GB of weights are more than an ONNX file holds; use torch-export",
        )
    written = torch.onnx.export(
        _trace_model(model),
        dynamo=True,
        input_names=["images"],
        output_names=["scores"],
        dynamic_shapes=(dynamic_shapes(model.size),),
        verbose=False,
    )
    assert written is not None
    written.model.metadata_props.update(_texts(metadata))
    written.save(path, external_data=False)


def open_onnx(path: Path, model: Model) -> Runner:
    """Load what :func:`write_onnx` wrote into ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])


def _texts(metadata: Metadata) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in metadata.items()
    }


FORMATS = {
    "torchvision": Format((".pth", ".safetensors"), write_torchvision, open_torchvision),
    "torch-export": Format((".pt2",), write_program, open_program),
    "onnx": Format((".onnx",), write_onnx, open_onnx, ("onnx", "onnxscript", "onnxruntime")),
}
