"""A backbone and the assembly of its layers: images in, the map that decoders read out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from featurestore import StoreSpec
from featurestore.dataset import assemble
from stages.backbones.backbone import Backbone, BackboneError
from stages.backbones.build import build_backbone
from stages.common.errors import ConfigError, DataError


class MapNetwork(nn.Module):
    """A backbone and the assembly of its layers.

    Parameters
    ----------
    backbone
        The network.
    spec
        Spec of the features that the decoder was trained on.

    Attributes
    ----------
    any_size
        Whether images of any size can be read.
    """

    def __init__(self, backbone: Backbone, spec: StoreSpec) -> None:
        super().__init__()
        self.backbone, self.spec = backbone, spec
        # Several layers fit each other only where the strides divide the image.
        self.any_size = backbone.any_size and [factor for _, factor in spec.folds] == [1]

    def forward(self, images: Tensor) -> Tensor:
        """Compute the map of images.

        Parameters
        ----------
        images
            (B, 3, H, W) RGB, uint8 or float in 0..255. Gradients reach them, and a backbone that
            is not frozen.

        Returns
        -------
        Tensor
            (B, C, h, w) features.
        """
        return assemble(self.backbone.maps(images), self.spec)


def build_map_network(spec: StoreSpec, weights: str | None) -> MapNetwork:
    """Build the network of a spec's features; its weights need not be those of the features.

    Parameters
    ----------
    spec
        Spec that names backbone, layers and size of the images.
    weights
        As of :func:`stages.backbones.build.build_backbone`; None: random ones.

    Raises
    ------
    BackboneError
        See :func:`stages.backbones.build.build_backbone`.
    """
    backbone = build_backbone(
        name=spec.backbone,
        weights=weights,
        layers=spec.layer_names,
        dilate=not spec.native_strides,
        size=spec.mask_shape,
    )
    return MapNetwork(backbone, spec)


def load_map_network(
    spec: StoreSpec, weights: str, *, key: str = "--backbone-weights"
) -> MapNetwork:
    """Load the network that made the features of a spec.

    Parameters
    ----------
    spec
        Spec that names the backbone and the sha256 of its weights.
    weights
        Value of ``extract.weights``: ``default``, or the path of a state dict.
    key
        Option or key of params.yaml that gave ``weights``, for messages.

    Raises
    ------
    ConfigError
        When the default weights are not available, or did not make the features.
    DataError
        When weights from a file cannot be read, or did not make the features.
    """
    wrong: Callable[..., ConfigError | DataError] = (
        partial(ConfigError, key) if weights == "default" else partial(DataError, weights)
    )
    remedy = f"give {key} the file that extract.weights named"
    if key == "extract.weights":
        remedy = "run the extract stage again"
    try:
        network = build_map_network(spec, weights)
    except BackboneError as error:
        reason = str(error).removeprefix(f"{weights}: ").split(";")[0]
        raise wrong(f"{reason}; {remedy}", expected=spec.weights_digest) from error
    if (actual := network.backbone.digest()) != spec.weights_digest:
        raise wrong(
            f"these are other {spec.backbone} weights than those that the decoder's features were"
            f" made with (sha256 {actual[:12]}..., expected {spec.weights_digest[:12]}...);"
            f" {remedy}",
            expected=spec.weights_digest,
            actual=actual,
        )
    return network
