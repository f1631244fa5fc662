"""The batches of a decoder's training, with the samples that an augmenter needs beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from featurestore import FeatureStore
from featurestore.dataset import ExtraSamples, FeatureLoader, PairedLoader
from stages.augment.base import Augmenter, VariantConfig
from stages.augment.views import training_views
from stages.training.decoder_config import TrainDecoderConfig
from stages.training.feature_source import StoredFeatures
from stages.training.session import Session


def training_loader(
    session: Session,
    config: TrainDecoderConfig,
    stores: Mapping[str, FeatureStore],
    variant: VariantConfig,
    seed: int,
    augmenter: Augmenter,
    source: StoredFeatures,
) -> FeatureLoader | PairedLoader:
    """Read the training samples, and the augmenter's, in an order that depends on the seed."""
    store, epochs = stores["train"], variant.augmented_epochs(config.epochs)
    loader = session.loader(
        store,
        config.batch_size,
        seed=seed,
        drop_last=True,
        positions=training_views(store, variant.view),
        repeats=config.repeats,
        images=augmenter.needs_images or source.needs_images,
        extra=extra_samples(
            augmenter,
            seed,
            config.gradient_accumulation,
            lambda epoch: epoch % config.epochs < epochs,
        ),
    )
    if not variant.needs_unlabelled:
        return loader
    first_epoch = config.epochs if variant.teacher_rounds else 0
    return session.paired(
        loader,
        stores["unlabelled"],
        config.batch_size,
        seed=seed,
        drop_last=True,
        first_epoch=first_epoch,
    )


def extra_samples(
    augmenter: Augmenter, seed: int, micro_batches: int, needed: Callable[[int], bool]
) -> ExtraSamples | None:
    """Describe an augmenter's extra samples to the loader; None where it needs none.

    Parameters
    ----------
    augmenter
        Chooses them, for each micro-batch.
    seed
        Of the training.
    micro_batches
        Number of micro-batches of a batch.
    needed
        Whether extra samples are read in an epoch.
    """
    if not augmenter.extra_batches:
        return None
    cpu = torch.device("cpu")

    def choose(epoch: int, index: int, positions: list[int]) -> list[int]:
        size, chosen = len(positions) // micro_batches, []
        for number in range(micro_batches if needed(epoch) else 0):
            rng = augmenter.rng(cpu, seed, epoch, index, number)
            chunk = positions[number * size : (number + 1) * size]
            chosen += augmenter.extra_positions(chunk, rng)
        return chosen

    return ExtraSamples(augmenter.extra_sources, choose)
