"""Watching a GAN in training: is what it generates near the real features, as varied, and of the right class?

Every measure compares the features of held-out images with features generated from their masks, at the same random
labelled pixels, in the scale that the GAN sees. Masks, pixels and noise are drawn once a run, so
that one epoch's figures can be compared with the next one's.
"""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from featurestore import VOID, FeatureStore
from stages.common.config import Config
from stages.common.distributed import agree
from stages.common.errors import CollapseError, ConfigError
from stages.gan.diversity import class_variances, draw_diversity, variance_ratios
from stages.gan.fidelity import (
    DIMENSIONS,
    coverage,
    frechet_distance,
    kernel_distance,
    two_sample_accuracy,
)
from stages.models.blocks import RandomProjection
from stages.models.feature_generator import FeatureGenerator
from stages.segmentation.metrics import confusion_matrix, score
from stages.segmentation.regions import labels_at

log = logging.getLogger(__name__)
MEASURED = {
    "every",
    "samples",
    "vectors",
}  # settings that the figures depend on; the others decide what is said about them
FEWEST_VECTORS = 50  # labelled pixels, on each side
PROBE_VECTORS = 4000  # real training vectors from which the probe learns the classes


class MonitorConfig(Config):
    """Section ``monitor`` of params.yaml."""

    every: int = Field(ge=0)  # epochs; 0: never
    samples: int = Field(ge=1)  # held-out masks
    vectors: int = Field(ge=200)  # of each side
    patience: int = Field(
        ge=0
    )  # epochs before a collapse is called one: an untrained generator looks like it
    on_collapse: Literal["warn", "stop"]
    least_variance_ratio: float = Field(ge=0, le=1)
    least_coverage: float = Field(ge=0, le=1)
    least_consistency: float = Field(ge=0, le=1)  # of that of real features
    most_frechet: float = Field(ge=1)  # times that at the start
    most_accuracy: float = Field(ge=0.5, le=1)


@dataclass
class _Pixels:
    """Random labelled feature pixels of some samples: where, and their classes.

    Attributes
    ----------
    samples
        Positions in the store.
    masks
        (S, H, W) uint8.
    labels
        (S, h, w) uint8 at the features' resolution.
    chosen
        For each sample the flat indices of its pixels.
    """

    samples: list[int]
    masks: Tensor
    labels: Tensor
    chosen: list[Tensor]

    @classmethod
    def draw(
        cls, store: FeatureStore, samples: int, vectors: int, rng: np.random.Generator
    ) -> _Pixels:
        _, height, width = store.spec.feature_shape

        def is_labelled(position: int) -> bool:
            return bool(
                (
                    labels_at(torch.from_numpy(store.gather("masks", [position])), (height, width))
                    != VOID
                ).any()
            )

        labelled = filter(is_labelled, rng.permutation(len(store)).tolist())
        if not (positions := sorted(islice(labelled, samples))):
            message = "the masks have no label at the features' resolution, by which the GAN could be watched; set it to 0, or label more"
            raise ConfigError("monitor.every", f"{store.path}: {message}")
        masks = torch.from_numpy(store.gather("masks", positions))
        labels = labels_at(masks, (height, width))
        each = -(-vectors // len(positions))
        chosen = [np.flatnonzero(label.numpy().ravel() != VOID) for label in labels]
        return cls(
            positions,
            masks,
            labels,
            [torch.from_numpy(rng.permutation(places)[:each]) for places in chosen],
        )

    def classes(self) -> Tensor:
        """(n,) int64 class of each chosen pixel."""
        return torch.cat(
            [
                label.flatten()[places]
                for label, places in zip(self.labels, self.chosen, strict=True)
            ]
        )


def _vectors(features: Tensor, chosen: list[Tensor]) -> Tensor:
    """(S, C, h, w) at each sample's chosen pixels -> (n, C) float32 on the CPU."""
    parts = [
        sample.flatten(1)[:, places.to(sample.device)].T
        for sample, places in zip(features, chosen, strict=True)
    ]
    return torch.cat(parts).float().cpu()


class Monitor:
    """Measures a generator against held-out images.

    Parameters
    ----------
    config
        How often, on how much, and what counts as a collapse.
    train, held_out
        Stores: from the first one's features a linear probe learns the classes; the second one's are compared with.
    feature_scale
        (1, C, 1, 1) by which features are divided.
    seed
        Of masks, pixels and noise.
    """

    def __init__(
        self,
        config: MonitorConfig,
        accelerator: Accelerator,
        *,
        train: FeatureStore,
        held_out: FeatureStore,
        feature_scale: Tensor,
        seed: int,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.class_names = held_out.spec.class_names
        self._warned = False
        self._seed = seed
        self._measures = bool(config.every) and accelerator.is_main_process
        if not self._measures:
            return
        rng = np.random.default_rng([seed, 0])
        scale = feature_scale.flatten().cpu()
        pixels = self._pixels = _Pixels.draw(held_out, config.samples, config.vectors, rng)
        learned = _Pixels.draw(train, 2 * config.samples, max(PROBE_VECTORS, config.vectors), rng)
        for store, count in ((held_out, len(pixels.classes())), (train, len(learned.classes()))):
            if count < FEWEST_VECTORS:
                message = f"{count} labelled feature pixels are too few to watch the GAN by; raise it, label more, or set monitor.every to 0"
                raise ConfigError(
                    "monitor.samples",
                    f"{store.path}: {message}",
                    expected=FEWEST_VECTORS,
                    actual=count,
                )

        def read(store: FeatureStore, some: _Pixels) -> Tensor:
            parts = []
            for position, chosen in zip(some.samples, some.chosen, strict=True):
                parts.append(
                    _vectors(torch.from_numpy(store.features(position).copy())[None], [chosen])
                )
            return torch.cat(parts) / scale

        self._real, self._labels = read(held_out, pixels), pixels.classes()
        others, other_labels = read(train, learned), learned.classes()
        self._real_variances = class_variances(self._real, self._labels, len(self.class_names))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            channels = len(scale)
            self._mix = RandomProjection(channels, min(channels, DIMENSIONS)).weight.flatten(
                1
            )  # (P, C)
        # What two sets of real features measure: no generator can be expected below it.
        floor = others[torch.from_numpy(rng.permutation(len(others))[: len(self._real)])]
        self._floors = {
            "monitor/frechet_floor": frechet_distance(
                self._real @ self._mix.T, floor @ self._mix.T
            ),
            "monitor/kernel_floor": kernel_distance(self._real @ self._mix.T, floor @ self._mix.T),
        }
        self._learn_probe(others, other_labels)
        real_scores = confusion_matrix(self._probe(self._real), self._labels, len(self.class_names))
        self._floors["monitor/consistency_real"] = score(real_scores, self.class_names).miou

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether to measure after this epoch: every so many, and after the last."""
        return bool(self.config.every) and (
            (epoch + 1) % self.config.every == 0 or epoch + 1 == epochs
        )

    @torch.no_grad()
    def measure(self, generator: FeatureGenerator) -> dict[str, float]:
        """All measures of a generator, by their names in the logs; of several processes the main one measures."""
        if not self._measures:
            return {}
        was_training = generator.training
        generator.eval()
        device, pixels = self.accelerator.device, self._pixels
        rng = torch.Generator(device).manual_seed(self._seed)
        draws: list[list[Tensor]] = [[], []]
        confusion = torch.zeros(len(self.class_names), len(self.class_names), dtype=torch.int64)
        for start in range(0, len(pixels.samples), 8):
            part = slice(start, start + 8)
            masks = pixels.masks[part].to(device)
            z = torch.randn(2 * len(masks), generator.z_dim, generator=rng, device=device)
            with self.accelerator.autocast():
                both = generator(z, masks).float().chunk(2)
            for vectors, features in zip(draws, both, strict=True):
                vectors.append(_vectors(features, pixels.chosen[part]))
            predicted = self._probe(
                both[0].permute(0, 2, 3, 1).flatten(0, 2).cpu()
            )  # (S, C, h, w) -> (S*h*w, C)
            confusion += confusion_matrix(
                predicted, pixels.labels[part].flatten(), len(self.class_names)
            )
        generator.train(was_training)
        fake, again = (torch.cat(vectors) for vectors in draws)
        if not fake.isfinite().all():  # no other measure takes such features
            return {"monitor/frechet": math.inf, **self._floors}
        real_mixed, fake_mixed = self._real @ self._mix.T, fake @ self._mix.T
        consistency = score(confusion, self.class_names)
        ratios = variance_ratios(self._real, fake, self._labels, len(self.class_names))
        values = {
            "frechet": frechet_distance(real_mixed, fake_mixed),
            "kernel": kernel_distance(real_mixed, fake_mixed),
            **coverage(real_mixed, fake_mixed),
            "two_sample_accuracy": two_sample_accuracy(self._real, fake),
            "variance_ratio": float(ratios[~ratios.isnan()].mean()),
            "diversity": draw_diversity(fake, again, self._labels, self._real_variances),
            "consistency": consistency.miou,
            **{
                f"class_consistency/{name.replace(' ', '_')}": iou
                for name, iou in consistency.iou.items()
                if iou is not None
            },
        }
        row = {**{f"monitor/{name}": value for name, value in values.items()}, **self._floors}
        self._floors.setdefault(
            "monitor/frechet_start", row["monitor/frechet"]
        )  # the first generator measured is the one at the start
        return {**row, **self._floors}

    def check(self, row: dict[str, float], epoch: int) -> CollapseError | None:
        """Say so, once, when an epoch's figures are those of a collapse.

        Returns
        -------
        CollapseError or None
            Where ``on_collapse`` is ``stop``, what is to be raised once the state is saved.
        """
        if self._warned or epoch + 1 <= self.config.patience:
            return None
        reason = agree(
            self.collapse(row)
        )  # the main process alone has measured, and all must stop or go on
        if reason is None:
            return None
        self._warned = True
        message = f"epoch {epoch + 1}: the GAN collapses: {reason}"
        if self.config.on_collapse == "stop":
            return CollapseError(
                f"{message}; train with other settings, or set monitor.on_collapse to warn"
            )
        if self.accelerator.is_main_process:
            log.warning(message)
        return None

    def collapse(self, row: dict[str, float]) -> str | None:
        """What is wrong, with the figure, or None."""
        config = self.config
        right = min(
            row.get("discriminator/accuracy_real", 0.0), row.get("discriminator/accuracy_fake", 0.0)
        )  # a flow has none
        if right > config.most_accuracy:
            what = f"the discriminator is right about {right:.1%} of real and of generated patches"
            return f"{what} (monitor.most_accuracy is {config.most_accuracy})"
        if "monitor/frechet" not in row:  # not measured after this epoch
            return None
        if math.isinf(row["monitor/frechet"]):
            return "generated features are no finite numbers"
        ratio, covered = row["monitor/variance_ratio"], row["monitor/coverage"]
        right_class = row["monitor/consistency"] / max(row["monitor/consistency_real"], 1e-12)
        further = row["monitor/frechet"] / max(row["monitor/frechet_start"], 1e-12)
        if ratio < config.least_variance_ratio:
            what = f"generated features of a class vary {ratio:.3f} times as much as real ones"
            return f"{what} (monitor.least_variance_ratio is {config.least_variance_ratio})"
        if covered < config.least_coverage:
            return f"generated features come near {covered:.1%} of the real ones (monitor.least_coverage is {config.least_coverage})"
        if right_class < config.least_consistency:
            what = f"generated features are of their mask's class {right_class:.2f} times as well as real ones (by mIoU)"
            return f"{what} (monitor.least_consistency is {config.least_consistency})"
        if further > config.most_frechet:
            what = f"generated features are {further:.2f} times as far from real ones as at the start (Fréchet distance)"
            return f"{what} (monitor.most_frechet is {config.most_frechet})"
        return None

    # -- the probe ---------------------------------------------------------------------------------

    def _learn_probe(self, vectors: Tensor, labels: Tensor) -> None:
        """A linear classifier of real vectors: the cheapest decoder that has never seen a generated one."""
        from sklearn.exceptions import (
            ConvergenceWarning,  # a second to import, which only a training that is watched pays for
        )
        from sklearn.linear_model import LogisticRegression

        if len(labels.unique()) < 2:  # nothing to tell apart
            self._weight, self._bias = (
                torch.zeros(len(self.class_names), vectors.shape[1]),
                torch.zeros(len(self.class_names)),
            )
            self._bias[labels[:1]] = 1
            return
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # a hundred steps are enough to tell classes apart
            classifier = LogisticRegression(C=0.1, max_iter=100).fit(
                vectors.numpy(), labels.numpy()
            )
        weight, bias = (
            torch.from_numpy(part).float() for part in (classifier.coef_, classifier.intercept_)
        )
        if len(classifier.classes_) == 2:  # scikit-learn keeps one row for two classes
            weight, bias = torch.cat([-weight, weight]), torch.cat([-bias, bias])
        classes = torch.from_numpy(classifier.classes_)
        self._weight = torch.zeros(len(self.class_names), vectors.shape[1])
        self._bias = torch.full((len(self.class_names),), -torch.inf)
        self._weight[classes], self._bias[classes] = weight, bias

    def _probe(self, vectors: Tensor) -> Tensor:
        """(n, C) -> (n,) predicted classes."""
        return torch.addmm(self._bias, vectors, self._weight.T).argmax(1)
