"""The decoders between which `choose` decides: heads, augmentation, class swaps, unlabelled images.

A candidate is a variant of params.yaml and the simpler candidate that it extends. Their difference
is what one addition gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featurestore import StoreSpec
from stages.models.deeplabv3plus import has_pyramid
from stages.segmentation import transforms
from stages.training.decoder_config import TrainDecoderConfig

OF_AUGMENTERS = ("augmenter", "of")
# Rates that cross-validation chose on Pascal VOC and CamVid: docs/results.md.
RATES = {"linear": 4e-3, "deeplabv3plus": 2e-3, "deeplab": 5e-4}
Members = Sequence[Mapping[str, Any]]  # augmenters of a variant
SWAPS, SELF = {"augmenter": "class-transfer"}, {"augmenter": "self-training"}
ADDITIONS: Mapping[str, Members] = {
    "class swaps": [SWAPS],
    "self-training": [SELF],
    "self-training and class swaps": [SELF, SWAPS],
}
GENERATED = {"augmenter": "featuregan", "generator": "frozen"}
GAN: Mapping[str, Members] = {
    "FeatureGAN's class swaps": [{**GENERATED, "new_masks": ["swap"], "class_swap": True}],
    "FeatureGAN's features": [GENERATED],
}


@dataclass(frozen=True)
class Candidate:
    """A decoder with its training.

    Attributes
    ----------
    name
        Such as ``linear, augmented``.
    variant
        Entry of section ``variants``.
    extends
        Name of the candidate that it extends; empty: none.
    adds
        What it adds to that one, in words.
    """

    name: str
    variant: Mapping[str, Any]
    extends: str = ""
    adds: str = ""


def without_gan(
    config: TrainDecoderConfig, spec: StoreSpec, *, unlabelled: bool
) -> list[Candidate]:
    """List the candidates that read only features, the baseline first.

    Parameters
    ----------
    config
        Section ``train_decoder``: its decoder is the baseline.
    spec
        Of the stored features.
    unlabelled
        Whether there are unlabelled images.
    """
    strong = "deeplabv3plus" if has_pyramid(spec.folds) else "deeplab"
    candidates = []
    for head in dict.fromkeys([config.decoder, "linear", strong]):
        own = {"decoder": head, "lr": config.lr if head == config.decoder else RATES[head]}
        plain = Candidate(head, {"augmenter": "none", **own})
        augmented = Candidate(
            f"{head}, augmented",
            {**plain.variant, "augment": list(transforms.USUAL)},
            head,
            "Feature augmentation",
        )
        candidates += [plain, augmented]
        if head == "linear" and len(spec.layer_names) > 1:
            last = {**augmented.variant, "layers": [spec.layer_names[-1]]}
            name = f"{augmented.name}, last layer"
            candidates.append(Candidate(name, last, augmented.name, "Reading only the last layer"))
        candidates += [
            extended(augmented, what, members)
            for what, members in ADDITIONS.items()
            if (unlabelled or SELF not in members) and (_can_swap(spec) or SWAPS not in members)
        ]
    return candidates


def with_gan(best: Candidate, spec: StoreSpec) -> list[Candidate]:
    """List what FeatureGAN adds to the best candidate."""
    return [
        extended(best, what, members)
        for what, members in GAN.items()
        if _can_swap(spec) or "new_masks" not in members[0]
    ]


def extended(base: Candidate, what: str, members: Members) -> Candidate:
    """Add augmenters to a candidate."""
    shared = {key: value for key, value in base.variant.items() if key not in OF_AUGMENTERS}
    before = base.variant.get("of", [{"augmenter": base.variant["augmenter"]}])
    every = [*(each for each in before if each["augmenter"] != "none"), *members]
    if any(each["augmenter"] != "self-training" for each in every):
        shared["statistics"] = "real"  # changed features have other statistics than real ones
    added = every[0] if len(every) == 1 else {"augmenter": "combined", "of": every}
    name = f"{base.name} + {what}"
    return Candidate(name, {**shared, **added}, base.name, f"Adding {what}")


def _can_swap(spec: StoreSpec) -> bool:
    """Return whether there are two classes of objects beside the background."""
    return spec.num_classes > 2
