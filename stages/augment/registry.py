"""All augmenters, by the key ``augmenter`` of a variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Union

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from typing_extensions import Self, override

from stages.augment.base import Augmenter, Context, VariantConfig
from stages.augment.calibration import Calibration, CalibrationConfig
from stages.augment.channel_dropout import ChannelDropout, ChannelDropoutConfig
from stages.augment.class_transfer import ClassTransfer, ClassTransferConfig
from stages.augment.combined import Combined
from stages.augment.cvae import CVAEAugmenter, CVAEConfig
from stages.augment.duplicate import Duplicate, DuplicateConfig
from stages.augment.extrapolate import Extrapolate, ExtrapolateConfig
from stages.augment.featuregan import FeatureGANConfig, featuregan
from stages.augment.hflip_views import HflipViews, HflipViewsConfig
from stages.augment.interpolate import Interpolate, InterpolateConfig
from stages.augment.isda import ISDA, ISDAConfig
from stages.augment.linear_delta import LinearDelta, LinearDeltaConfig
from stages.augment.mixup import Mixup, MixupConfig
from stages.augment.noise import Noise, NoiseConfig
from stages.augment.self_training import SelfTraining, SelfTrainingConfig
from stages.augment.upsample import Upsample, UpsampleConfig
from stages.common.config import Listed, reason
from stages.common.errors import ConfigError


class NoneConfig(VariantConfig):
    """No features are added: the baseline."""

    augmenter: Literal["none"]


AUGMENTERS: dict[type[VariantConfig], Callable[..., Augmenter]] = {
    NoneConfig: Augmenter,
    DuplicateConfig: Duplicate,
    NoiseConfig: Noise,
    ChannelDropoutConfig: ChannelDropout,
    LinearDeltaConfig: LinearDelta,
    ExtrapolateConfig: Extrapolate,
    InterpolateConfig: Interpolate,
    MixupConfig: Mixup,
    UpsampleConfig: Upsample,
    CVAEConfig: CVAEAugmenter,
    ISDAConfig: ISDA,
    CalibrationConfig: Calibration,
    ClassTransferConfig: ClassTransfer,
    HflipViewsConfig: HflipViews,
    FeatureGANConfig: featuregan,
    SelfTrainingConfig: SelfTraining,
}

_MEMBERS = tuple(kind for kind in AUGMENTERS if kind is not NoneConfig)
Member: Any = Annotated[Union[_MEMBERS], Field(discriminator="augmenter")]  # noqa: UP007


class CombinedConfig(VariantConfig):
    """Augmenters that are applied together."""

    augmenter: Literal["combined"]
    of: Annotated[tuple[Member, ...], Listed] = Field(
        min_length=2, description="augmenters, each with its own keys"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        shared = set(VariantConfig.model_fields) - {"augmenter"}
        for member in self.of:
            if misplaced := sorted(shared & member.model_fields_set):
                raise ValueError(
                    f"{misplaced[0]} of {member.augmenter} applies to all members; write it"
                    " beside augmenter: combined"
                )
            if getattr(member, "generator", None) == "joint":
                raise ValueError(
                    "combined variants cannot train a generator; set generator: frozen"
                )
            # What applies to all members must suit each of them.
            common = {"augment": self.augment, "view": self.view}
            try:
                type(member)(**member.model_dump(exclude_unset=True), **common)
            except ValidationError as error:
                problem = error.errors()[0]
                text = ": ".join([*map(str, problem["loc"]), reason(problem)])
                raise ValueError(f"{member.augmenter} cannot be combined here: {text}") from error
        if sum(member.augmenter == "isda" for member in self.of) > 1:
            raise ValueError("isda is listed twice; list it once and raise strength")
        return self

    @property
    @override
    def members(self) -> tuple[VariantConfig, ...]:
        return self.of


# One entry of section ``variants``: its key ``augmenter`` says which of these it is.
Variant: Any = Annotated[Union[(*AUGMENTERS, CombinedConfig)], Field(discriminator="augmenter")]
VARIANTS: TypeAdapter[dict[str, VariantConfig]] = TypeAdapter(dict[str, Variant])


def build_augmenter(config: VariantConfig, context: Context) -> Augmenter:
    """Build the augmenter that a variant describes.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        When the augmenter does not fit the store, or needs a GAN and there is no usable one.
    """
    if isinstance(config, CombinedConfig):
        return Combined(config, context, [build_augmenter(member, context) for member in config.of])
    return AUGMENTERS[type(config)](config, context)


def check_variant(variant: VariantConfig, name: str) -> None:
    """Refuse a variant that does not work with a trained backbone.

    Raises
    ------
    ConfigError
        When it reads stored features: a trained backbone makes others.
    """
    for key, reads in (
        ("augmenter", variant.needs_stored_features),
        ("view", variant.view == "random"),
    ):
        if reads:
            message = (
                f"{getattr(variant, key)} reads stored features, and a trained backbone makes"
                " others; set backbone to frozen"
            )
            raise ConfigError(f"variants.{name}.{key}", message)
