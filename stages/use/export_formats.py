"""Three ways to write a network down for other programs, each with the way to run what was written.

A runner takes pictures (B, 3, H, W) uint8 and gives scores (B, K, H, W).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.transforms.functional import normalize

from featurestore import StoreSpec
from stages.backbones.backbone import Backbone
from stages.common.errors import ConfigError
from stages.models.decoder import Decoder

METADATA = "metadata.json"  # name of the extra file in a .pt2
SMALLEST = 32  # pixels a side: below, a feature map has next to nothing left

Runner = Callable[[Tensor], Tensor]
Shapes = dict[int, Any]  # which axes of the pictures may have any length


# -- torchvision --------------------------------------------------------------------------------------


def write_torchvision(
    backbone: Backbone, decoder: Decoder, path: Path, metadata: dict[str, Any], *, safetensors: bool
) -> None:
    """The state dict of torchvision's ``deeplabv3_resnet*`` or ``fcn_resnet*``; a ``.pth`` has no room for the metadata."""
    state = {f"backbone.{name}": tensor for name, tensor in backbone.network.state_dict().items()}
    state |= {f"classifier.{name}": tensor for name, tensor in decoder.head.state_dict().items()}
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if safetensors:
        save_file(state, path, metadata=_as_text(metadata))
    else:
        torch.save(state, path)


def open_torchvision(path: Path, model: str, spec: StoreSpec, *, safetensors: bool) -> Runner:
    """torchvision's model with the file's weights, and the normalisation that it leaves to its caller."""
    network = torchvision.models.get_model(
        model, weights=None, weights_backbone=None, num_classes=spec.num_classes, aux_loss=None
    )
    state = (
        load_file(path) if safetensors else torch.load(path, map_location="cpu", weights_only=True)
    )
    network.load_state_dict(state, strict=True)
    network.eval()
    mean, std = list(spec.normalization_mean), list(spec.normalization_std)
    return lambda images: network(normalize(images.float() / 255, mean, std))["out"]


# -- torch.export -------------------------------------------------------------------------------------


def dynamic_shapes(*, fixed: bool) -> Shapes:
    """Any number of pictures and, unless ``fixed``, any height and width."""
    shapes = {0: Dim("batch", min=1)}
    return (
        shapes
        if fixed
        else {**shapes, 2: Dim("height", min=SMALLEST), 3: Dim("width", min=SMALLEST)}
    )


def trace(network: nn.Module, shapes: Shapes, size: tuple[int, int], name: str) -> ExportedProgram:
    """A network from pictures to scores as a graph.

    Parameters
    ----------
    network
        The network, in evaluation mode.
    shapes
        As :func:`dynamic_shapes` gives them.
    size
        (H, W) of the pictures where it is fixed.
    name
        What an error calls the network.

    Raises
    ------
    ConfigError
        When PyTorch cannot trace it.
    """
    fixed = 2 not in shapes
    # Two pictures with unequal sides: a tracer takes a length of 1, or equal lengths, for a rule.
    example = torch.zeros(
        2, 3, *(size if fixed else (2 * SMALLEST, 3 * SMALLEST)), dtype=torch.uint8
    )
    try:
        with torch.no_grad():
            program = torch.export.export(network, (example,), dynamic_shapes=(shapes,))
    except (
        Exception
    ) as error:  # torch.export has many errors of its own, and passes on those of the network
        reason = " ".join(str(error).split())[:200]
        if fixed:
            raise ConfigError(
                "--format",
                f"PyTorch cannot trace {name} ({reason}); there is no other way to write it",
            ) from error
        message = f"PyTorch cannot trace {name} for pictures of any size ({reason}); name the one you need with --size H W"
        raise ConfigError("--size", message) from error
    for node in program.graph.nodes:
        node.meta.pop(
            "stack_trace", None
        )  # where the code lies on this machine is nobody's business
    return program


def write_program(
    program: ExportedProgram, shapes: Shapes, path: Path, metadata: dict[str, Any]
) -> None:
    """A ``.pt2``; the metadata is its extra file ``metadata.json``."""
    with open(path, "wb") as file:
        torch.export.save(
            program,
            file,
            extra_files={METADATA: json.dumps(metadata, indent=1, ensure_ascii=False)},
        )


def open_program(path: Path) -> Runner:
    """What :func:`write_program` wrote."""
    with open(path, "rb") as file:
        return torch.export.load(file).module()


# -- ONNX ---------------------------------------------------------------------------------------------


def write_onnx(
    program: ExportedProgram, shapes: Shapes, path: Path, metadata: dict[str, Any]
) -> None:
    """An ONNX file; the metadata is in its ``metadata_props``, as JSON where it is no text."""
    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["scores"],
        dynamic_shapes=(shapes,),
        verbose=False,
    )
    assert written is not None
    written.model.metadata_props.update(_as_text(metadata))
    written.save(path, external_data=False)


def open_onnx(path: Path) -> Runner:
    """What :func:`write_onnx` wrote, in ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])


def _as_text(metadata: dict[str, Any]) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in metadata.items()
    }
