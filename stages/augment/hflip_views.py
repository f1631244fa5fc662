"""Real features of mirrored images, extracted beside the other features."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from typing_extensions import override

from stages.augment.base import Context, SampleAugmenter, SourceConfig, VariantConfig
from stages.augment.views import find_views


class HflipViewsConfig(SourceConfig):
    """Mirrored views from the store; real samples are of view ``identity``."""

    augmenter: Literal["hflip-views"]
    view: Literal["identity"] = "identity"  # the mirrored one is what it adds

    needs_stored_features: ClassVar[bool] = True
    needs_mirrored: ClassVar[bool] = True


class HflipViews(SampleAugmenter):
    """Adds the mirrored view of each image of the batch, read from the store."""

    config: HflipViewsConfig

    def __init__(self, config: VariantConfig, context: Context) -> None:
        super().__init__(config, context)
        views = find_views(self.store, context.positions, ["hflip"])[:, 0]
        self.extra_sources = views
        self.mirrored = dict(zip(context.positions.tolist(), views.tolist(), strict=True))

    @override
    def extra_positions(self, positions: list[int], rng: torch.Generator) -> list[int]:
        return [self.mirrored[number] for number in positions]
