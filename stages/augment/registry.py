"""All augmenters by the name that a variant gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Union

from pydantic import Field

from stages.augment.base import Augmenter, Context, VariantConfig
from stages.augment.calibration import Calibration, CalibrationConfig
from stages.augment.channel_dropout import ChannelDropout, ChannelDropoutConfig
from stages.augment.class_transfer import ClassTransfer, ClassTransferConfig
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

# One entry of section ``variants``: its key ``augmenter`` says which of these it is.
Variant: Any = Annotated[Union[tuple(AUGMENTERS)], Field(discriminator="augmenter")]  # noqa: UP007


def build_augmenter(config: VariantConfig, context: Context) -> Augmenter:
    """The augmenter that a variant describes.

    Raises
    ------
    ConfigError, DataError, FeatureStoreError
        When it does not fit the store, or needs a GAN and there is no usable one.
    """
    return AUGMENTERS[type(config)](config, context)
