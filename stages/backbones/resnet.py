"""torchvision's ResNet-50 and ResNet-101: layer1 to layer4, of 256 to 2048 channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from stages.backbones.backbone import Backbone, BackboneLayer, choose_layers
from stages.backbones.weights import State, download, fit, read_state

RESNETS = ("resnet50", "resnet101")
LAYERS = {"layer1": (256, 4), "layer2": (512, 8), "layer3": (1024, 16), "layer4": (2048, 32)}
DILATED = 8  # stride of layer3 and layer4 when they are dilated


def build(name: str, weights: str | None, layers: Sequence[str], *, dilate: bool) -> Backbone:
    """Make the backbone; see ``build_backbone``. Its tensors keep torchvision's names."""
    import torchvision  # takes a second, which only this family of backbones should cost
    from torchvision.models._utils import IntermediateLayerGetter

    indices = choose_layers(name, list(LAYERS), layers)
    network: nn.Module = torchvision.models.get_model(
        name, weights=None, replace_stride_with_dilation=[False, dilate, dilate]
    )
    network = IntermediateLayerGetter(network, {layer: layer for layer in LAYERS})
    if weights is not None:
        state = _default_state(name) if weights == "default" else read_state(weights)
        fit(network, state, weights, head=("fc.",))
    chosen = [list(LAYERS)[index] for index in indices]
    return Backbone(
        name=name,
        network=IntermediateLayerGetter(network, {layer: layer for layer in chosen}),
        layers=[
            BackboneLayer(layer, channels, min(stride, DILATED) if dilate else stride)
            for layer, (channels, stride) in LAYERS.items()
            if layer in chosen
        ],
        nonnegative=True,
    )


def _default_state(name: str) -> State:
    import torchvision

    # IMAGENET1K_V1 are the weights that torchvision's deeplabv3_resnet* start from.
    default = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    return download(name, default.url, lambda: default.get_state_dict(progress=False))
