"""Any timm model ``timm/NAME`` that takes ``features_only`` and ``output_stride=8``."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from stages.backbones.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OUTPUT_STRIDE,
    Backbone,
    BackboneError,
    Triple,
)
from stages.backbones.weights import State, download, fit, read_state

if TYPE_CHECKING:
    from timm.models import FeatureListNet

PREFIX = "timm/"
HEAD = ("fc.", "classifier.", "head.", "conv_head.", "bn2.", "norm_head.", "norm.")


def known(name: str) -> bool:
    """Whether timm's registry has the model."""
    import timm  # takes a second, which only this family of backbones should cost

    return timm.is_model(name.removeprefix(PREFIX))


def create(name: str) -> FeatureListNet:
    """Make the network with random weights.

    Raises
    ------
    BackboneError
        When the model cannot give dense features at stride 8.
    """
    try:
        network = _create(name, pretrained=False)
    except Exception as error:  # each family of timm refuses in its own way
        reason = str(error) or type(error).__name__
        raise BackboneError(
            f"{name} cannot give dense features at stride {OUTPUT_STRIDE} ({reason}); "
            "choose another"
        ) from error
    stride = network.feature_info.reduction()[-1]
    if stride != OUTPUT_STRIDE:
        raise BackboneError(f"{name} has stride {stride}, not {OUTPUT_STRIDE}; choose another")
    return network


def build(name: str, weights: str) -> Backbone:
    """Make the backbone with its weights; see ``build_backbone``."""
    network = create(name)
    settings = cast("dict[str, object]", network.pretrained_cfg)
    if weights == "default":
        source = f"https://huggingface.co/{settings.get('hf_hub_id') or 'timm'}"
        state = download(name, source, lambda: _create(name, pretrained=True).state_dict())
    else:
        state = _flattened(read_state(weights), network)
    fit(network, state, weights, head=HEAD)
    backbone = Backbone(
        name=name,
        network=network,
        channels=network.feature_info.channels()[-1],
        nonnegative=False,
        mean=cast("Triple", settings.get("mean", IMAGENET_MEAN)),
        std=cast("Triple", settings.get("std", IMAGENET_STD)),
    )
    # Only a network that ends in a ReLU has no negative feature on noise.
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, 3, 64, 64), generator=rng, dtype=torch.uint8)
    backbone.nonnegative = bool((backbone(noise) >= 0).all())
    return backbone


def _create(name: str, *, pretrained: bool) -> FeatureListNet:
    import timm

    network = timm.create_model(
        name.removeprefix(PREFIX),
        pretrained=pretrained,
        features_only=True,
        output_stride=OUTPUT_STRIDE,
    )
    return cast("FeatureListNet", network)


def _flattened(state: State, network: nn.Module) -> State:
    """Rename tensors as ``features_only`` flattens some networks: stages.0.x becomes stages_0.x."""
    names = {name.replace("_", "."): name for name in network.state_dict()}
    return {names.get(name.replace("_", "."), name): tensor for name, tensor in state.items()}
