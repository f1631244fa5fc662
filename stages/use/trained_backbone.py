"""The backbone that a trained decoder belongs to."""

from __future__ import annotations

from featurestore import StoreSpec
from stages.backbones.backbone import Backbone, BackboneError
from stages.backbones.build import build_backbone
from stages.common.errors import ConfigError, DataError


def load_backbone(spec: StoreSpec, weights: str) -> Backbone:
    """The backbone that made the features of a spec.

    Parameters
    ----------
    weights
        What ``extract.weights`` was: ``default``, or the path of a state dict.

    Raises
    ------
    ConfigError, DataError
        When default weights, or those of a file, cannot be had or are others than those that made the features.
    """
    remedy = "give --backbone-weights the file that extract.weights named"

    def wrong(reason: str, found: str | None = None) -> ConfigError | DataError:
        if weights == "default":
            return ConfigError(
                "--backbone-weights",
                f"{reason}; {remedy}",
                expected=spec.weights_digest,
                actual=found,
            )
        return DataError(weights, f"{reason}; {remedy}", expected=spec.weights_digest, actual=found)

    try:
        backbone = build_backbone(name=spec.backbone, weights=weights)
    except BackboneError as error:
        raise wrong(str(error).removeprefix(f"{weights}: ").split(";")[0]) from error
    if (found := backbone.digest()) != spec.weights_digest:
        digests = f"sha256 {found[:12]}..., expected {spec.weights_digest[:12]}..."
        raise wrong(
            f"these are other {spec.backbone} weights than those that the decoder's features were made with ({digests})",
            found,
        )
    return backbone
