"""Real features of mirrored photographs, extracted beside the others: the cheap real alternative to generated ones."""

from __future__ import annotations

from typing import Literal

import torch

from featurestore import SpecMismatchError
from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, Part, SourceConfig


class HflipViewsConfig(SourceConfig):
    """Variant ``hflip-views``."""

    augmenter: Literal["hflip-views"]


class HflipViews(Augmenter):
    """The mirrored view of each photograph of the batch."""

    def __init__(self, config: HflipViewsConfig, context: Context) -> None:
        super().__init__(config, context)
        self.store, self.weight = context.store, config.weight
        ids = context.store.ids
        by_id = {ids[position]: position for position, view in enumerate(context.store.views) if view == "hflip"}
        missing = [ids[position] for position in context.positions if ids[position] not in by_id]
        if missing:
            message = f"there is no mirrored view of {missing[0]}; set extract.views to [identity, hflip] for this variant"
            raise SpecMismatchError(message, path=context.store.path)
        self.mirrored = [by_id.get(id, -1) for id in ids]  # by position

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """Read them."""
        chosen = [self.mirrored[position] for position in batch.positions.tolist()]
        device = batch.features.device
        features = torch.from_numpy(self.store.gather("features", chosen)).to(device).float()
        masks = torch.from_numpy(self.store.gather("masks", chosen)).to(device)
        return Augmented([Part(features, [(masks, 1.0)], self.weight)])
