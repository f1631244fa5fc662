"""torchvision's ResNet-50 and ResNet-101, dilated: 2048 channels at stride 8."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from stages.backbones.backbone import Backbone
from stages.backbones.weights import State, download, fit, read_state

RESNETS = ("resnet50", "resnet101")
HEAD = ("avgpool", "fc")


def create(name: str) -> nn.Module:
    """Make the network with random weights; its tensors keep torchvision's names."""
    import torchvision  # takes a second, which only this family of backbones should cost

    resnet = torchvision.models.get_model(
        name, weights=None, replace_stride_with_dilation=[False, True, True]
    )
    return nn.Sequential(
        OrderedDict(child for child in resnet.named_children() if child[0] not in HEAD)
    )


def build(name: str, weights: str) -> Backbone:
    """Make the backbone with its weights; see ``build_backbone``."""
    network = create(name)
    state = _default_state(name) if weights == "default" else read_state(weights)
    fit(network, state, weights, head=("fc.",))
    return Backbone(name=name, network=network, channels=2048, nonnegative=True)


def _default_state(name: str) -> State:
    import torchvision

    # IMAGENET1K_V1 are the weights that torchvision's deeplabv3_resnet* start from.
    default = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    return download(name, default.url, lambda: default.get_state_dict(progress=False))
