"""All augmenters by the name that a variant gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Union

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from typing_extensions import Self

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
from stages.augment.upsample import Upsample, UpsampleConfig
from stages.common.config import Listed


class NoneConfig(VariantConfig):
    """Variant ``baseline``."""

    augmenter: Literal["none"]


AUGMENTERS: dict[type[VariantConfig], Callable[[Any, Context], Augmenter]] = {
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
}

_MEMBERS = tuple(kind for kind in AUGMENTERS if kind is not NoneConfig)
Member: Any = Annotated[Union[_MEMBERS], Field(discriminator="augmenter")]  # noqa: UP007


class CombinedConfig(VariantConfig):
    """Variants of several augmenters."""

    augmenter: Literal["combined"]
    of: Annotated[tuple[Member, ...], Listed, Field(min_length=2)]

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        for member in self.of:
            if shared := sorted(
                (set(VariantConfig.model_fields) - {"augmenter"}) & member.model_fields_set
            ):
                raise ValueError(
                    f"{shared[0]} of {member.augmenter} is for all that are combined; write it where augmenter: combined stands"
                )
            if getattr(member, "generator", None) == "joint":
                raise ValueError(
                    "a joint generator learns with its own decoder alone; set generator: frozen"
                )
            try:  # what is for all must suit each
                type(member).model_validate(
                    {
                        **member.model_dump(exclude_unset=True),
                        "augment": self.augment,
                        "view": self.view,
                    }
                )
            except ValidationError as error:
                first = error.errors()[0]
                wrong = ": ".join(
                    [*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")]
                )
                raise ValueError(f"{member.augmenter} cannot be among them: {wrong}") from error
        if sum(member.augmenter == "isda" for member in self.of) > 1:
            raise ValueError("isda more than once is isda with another strength; name it once")
        return self

    @property
    def needs_gan(self) -> bool:
        """Where a member does."""
        return any(member.needs_gan for member in self.of)

    @property
    def added_batches(self) -> int:
        """Of all members."""
        return sum(member.added_batches for member in self.of)

    @property
    def added_weights(self) -> tuple[float, ...]:
        """Of all members'."""
        return tuple(weight for member in self.of for weight in member.added_weights)

    @property
    def needs_mirrored(self) -> bool:
        """Where a member does, or all read them."""
        return super().needs_mirrored or any(member.needs_mirrored for member in self.of)

    @property
    def needs_classes(self) -> int:
        """What the most demanding member does."""
        return max(member.needs_classes for member in self.of)

    @property
    def needs_family(self) -> str | None:
        """The members'; there is one generator."""
        return next((member.needs_family for member in self.of if member.needs_family), None)


# One entry of section ``variants``: its key ``augmenter`` says which of these it is.
Variant: Any = Annotated[Union[(*AUGMENTERS, CombinedConfig)], Field(discriminator="augmenter")]
VARIANTS: TypeAdapter[dict[str, VariantConfig]] = TypeAdapter(dict[str, Variant])


def build_augmenter(config: VariantConfig, context: Context) -> Augmenter:
    """The augmenter that a variant describes.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        When it does not fit the store, or needs a GAN and there is no usable one.
    """
    if isinstance(config, CombinedConfig):
        return Combined(config, context, [build_augmenter(member, context) for member in config.of])
    return AUGMENTERS[type(config)](config, context)
