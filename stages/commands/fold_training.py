"""A decoder, or a GAN, trained without a fold of the training images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import featurestore
from featurestore import FeatureStore, SubsetStore
from stages import train_decoder, train_gan
from stages.augment.registry import VARIANTS
from stages.commands.params import Params
from stages.common.config import parse
from stages.common.runtime import Machine, write_json
from stages.common.sources import imports_digest
from stages.segmentation.metrics import IMAGES_NAME
from stages.studies.candidates import Candidate
from stages.studies.choose import Images


def divide(count: int, folds: int, *, seed: int, block_length: int) -> list[np.ndarray]:
    """Divide images into folds of equal size, at random, or in order where neighbours are alike.

    Parameters
    ----------
    count, folds
        Number of images, and of folds.
    seed
        Of the random order.
    block_length
        Above 1: consecutive images are frames of a video, and stay together.

    Returns
    -------
    list of numpy.ndarray
        Ascending numbers of each fold's images.
    """
    order = np.arange(count)
    if block_length == 1:
        order = np.random.default_rng(seed).permutation(count)
    return [np.sort(part) for part in np.array_split(order, folds)]


@dataclass
class FoldTraining:
    """Trains candidates on all folds but one; finished results are kept and found again.

    Attributes
    ----------
    params
        All parameters.
    machine
        How this machine computes; ``scratch`` holds results and unfinished trainings.
    stores
        ``train``, ``val`` and, where there are unlabelled images, ``unlabelled``. For trainings on
        all images also ``test``.
    folds
        Numbers of each fold's images, among the samples of view ``identity``.
    seconds
        What the kept results took.
    """

    params: Params
    machine: Machine
    stores: Mapping[str, FeatureStore]
    folds: Sequence[np.ndarray]
    seconds: float = field(default=0.0, init=False)
    _counted: set[Path] = field(default_factory=set, init=False)

    def test(
        self, candidate: Candidate, fold: int | None, *, epochs: int = 0
    ) -> tuple[Images, float]:
        """Train a candidate without a fold, and predict the fold's images.

        Parameters
        ----------
        fold
            None: train it on all images, and predict the test images.
        epochs
            In place of ``train_decoder.epochs``, to see how long one takes; 0: all.

        Returns
        -------
        Images, float
            Confusion matrix of each image, and the seconds that it took.
        """
        config = self.params.train_decoder
        config = config.model_copy(update={"epochs": epochs or config.epochs})
        variant = parse(VARIANTS, {"v": candidate.variant}, "variants")["v"]
        gan = self._gan(fold) if variant.needs_gan else Path()
        key = self._key("train_decoder", fold, config=config, variant=variant, gan=gan.name)
        folder = self.machine.scratch / "choose" / key

        def train() -> dict[str, Any]:
            train_decoder.run(
                config,
                variant,
                self.params.monitor,
                name=f"{'test' if fold is None else f'fold {fold + 1}'}, {candidate.name}",
                seed=self.params.compare.seeds[0],
                features=self._stores(fold, monitored=variant.needs_gan),
                gan=gan,
                out=folder / "decoder",
                metrics=folder / "metrics",
                logs=folder / "logs",
                machine=replace(self.machine, scratch=folder / "scratch"),
            )
            return {"images": json.loads((folder / "metrics" / IMAGES_NAME).read_text("utf-8"))}

        result = self._kept(folder, train)
        return result["images"], result["seconds"]

    def fit_gan(self, fold: int, *, epochs: int = 0) -> float:
        """Train FeatureGAN without a fold; return the seconds that it took."""
        folder = self._gan(fold, epochs)
        config = self._gan_config(epochs)

        def train() -> dict[str, Any]:
            train_gan.run(
                config,
                self.params.monitor,
                features=self._stores(fold, monitored=True),
                out=folder,
                metrics=folder.with_suffix(".metrics"),
                logs=folder.with_suffix(".logs"),
                machine=replace(self.machine, scratch=folder.with_suffix(".scratch")),
                backbone_weights=self.params.extract.weights,
            )
            return {}

        return float(self._kept(folder, train)["seconds"])

    def _gan_config(self, epochs: int) -> train_gan.TrainGanConfig:
        config = self.params.train_gan
        return config.model_copy(update={"frozen_epochs": epochs or config.frozen_epochs})

    def _gan(self, fold: int | None, epochs: int = 0) -> Path:
        key = self._key("train_gan", fold, config=self._gan_config(epochs))
        return self.machine.scratch / "choose" / f"gan-{key}"

    def _stores(self, fold: int | None, *, monitored: bool) -> Mapping[str, FeatureStore]:
        """Return the stores of a training: the fold is its test split; all views of it are out.

        Only the monitor of a GAN reads ``val``. Without it one sample is left: nothing here reads
        the scores on ``val`` that each epoch ends with.
        """
        val = self.stores["val"]
        stores = {**self.stores, "val": val if monitored else SubsetStore(val, [0])}
        if fold is None:
            return stores
        train = self.stores["train"]
        identity, ids = train.positions("identity"), train.ids
        tested = {ids[position] for position in identity[self.folds[fold]]}
        kept = [position for position, id in enumerate(ids) if id not in tested]
        return {
            **stores,
            "train": SubsetStore(train, kept),
            "test": SubsetStore(train, identity[self.folds[fold]]),
        }

    def _key(self, stage: str, fold: int | None, **settings: Any) -> str:
        """Return a name for all that a result depends on."""
        plain = {
            name: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
            for name, value in settings.items()
        }
        return featurestore.fingerprint(
            stores=[store.fingerprint for store in self.stores.values()],
            fold=None if fold is None else self.folds[fold].tolist(),
            seed=self.params.compare.seeds[0],
            code=imports_digest(f"stages.{stage}"),
            torch=torch.__version__,
            **plain,
        )[:16]

    def _kept(self, folder: Path, train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result kept for a folder, or make it; its time counts once."""
        file = folder.with_suffix(".json")
        if not file.exists():
            start = time.monotonic()
            result = train()
            write_json(file, {**result, "seconds": time.monotonic() - start}, indent=None)
        result = json.loads(file.read_text("utf-8"))
        if file not in self._counted:
            self._counted.add(file)
            self.seconds += result["seconds"]
        return dict(result)
