"""Monitor of a GAN in training: are its features near real ones, as varied, of their class.

Every measure compares features of held-out images with features generated from their masks, at the
same random labelled pixels, in the scale that the GAN sees. Masks, pixels and noise are drawn once
a run: the measures of two epochs can be compared.
"""

from __future__ import annotations

import logging
import math
import warnings
from itertools import islice
from operator import gt, lt
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from featurestore import VOID, FeatureStore
from featurestore.dataset import gather_maps
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
MEASURED = {"every", "samples", "vectors"}  # settings that the measures depend on
FEWEST_VECTORS = 50  # labelled pixels, on each side
PROBE_VECTORS = 4000  # real training vectors from which the probe learns the classes
SAMPLES = 8  # generated at a time
# What is a collapse: a setting, how a measure compares with it, and what is said of the measure.
LIMITS = (
    (
        "max_accuracy",
        gt,
        "the discriminator is right about {:.1%} of real and of generated patches",
    ),
    (
        "min_variance_ratio",
        lt,
        "generated features of a class vary {:.3f} times as much as real ones",
    ),
    ("min_coverage", lt, "generated features come near {:.1%} of the real ones"),
    (
        "min_consistency",
        lt,
        "a probe recognises the classes of generated features {:.2f} times as well as those of real"
        " ones (mIoU)",
    ),
    (
        "max_frechet",
        gt,
        "generated features are {:.2f} times as far from real ones as at the start (Fréchet"
        " distance)",
    ),
)


class MonitorConfig(Config):
    """Section ``monitor`` of params.yaml."""

    every: int = Field(5, ge=0, description="epochs between two measurements; 0: never")
    samples: int = Field(64, ge=1, description="masks of val")
    vectors: int = Field(2000, ge=200, description="feature vectors of each side")
    patience: int = Field(
        5, ge=0, description="first epochs without a warning: an untrained GAN looks collapsed"
    )
    on_collapse: Literal["warn", "stop"] = Field("warn", description="what a collapse does")
    min_variance_ratio: float = Field(
        0.1, ge=0, le=1, description="collapse below: variance within classes, generated / real"
    )
    min_coverage: float = Field(
        0.02, ge=0, le=1, description="collapse below: fraction of real features covered"
    )
    min_consistency: float = Field(
        0.25, ge=0, le=1, description="collapse below: consistency with masks, generated / real"
    )
    max_frechet: float = Field(
        1.5, ge=1, description="collapse above: Fréchet distance / its initial value"
    )
    max_accuracy: float = Field(
        0.99, ge=0.5, le=1, description="collapse above: discriminator accuracy, real and fake"
    )


class _PixelSample:
    """Random labelled feature pixels of random samples of a store.

    Parameters
    ----------
    scale
        (C,) by which features are divided.
    samples, vectors
        Largest number of samples, and about how many pixels all of them have.

    Attributes
    ----------
    masks
        (S, H, W) uint8.
    labels
        (S, h, w) int64 at the features' resolution.
    pixels
        For each sample the flat indices of its chosen pixels.
    classes, vectors
        (n,) int64 and (n, C) float32 of the pixels.
    """

    def __init__(
        self,
        store: FeatureStore,
        scale: Tensor,
        samples: int,
        vectors: int,
        rng: np.random.Generator,
    ) -> None:
        def read_masks(positions: list[int]) -> tuple[Tensor, Tensor]:
            masks = torch.from_numpy(store.gather("masks", positions))
            return masks, labels_at(masks, store.spec.feature_shape[1:])

        drawn = rng.permutation(len(store)).tolist()
        labelled = (number for number in drawn if (read_masks([number])[1] != VOID).any())
        if not (positions := sorted(islice(labelled, samples))):
            message = (
                "the masks have no labelled pixel at the features' resolution; set it to 0, or"
                " label more pixels"
            )
            raise ConfigError("monitor.every", f"{store.path}: {message}")
        self.masks, self.labels = read_masks(positions)
        each = -(-vectors // len(positions))
        places = [np.flatnonzero(label.numpy() != VOID) for label in self.labels]
        self.pixels = [torch.from_numpy(rng.permutation(indices)[:each]) for indices in places]
        self.classes = _pick(self.labels[:, None], self.pixels)[:, 0]
        if (count := len(self.classes)) < FEWEST_VECTORS:
            message = (
                f"{store.path}: {count} labelled feature pixels are too few to watch the GAN by;"
                " raise it, label more, or set monitor.every to 0"
            )
            raise ConfigError("monitor.samples", message, expected=FEWEST_VECTORS, actual=count)
        maps = (gather_maps(store, [number]) for number in positions)
        vectors_of = [
            _pick(features, [pixels]) for features, pixels in zip(maps, self.pixels, strict=True)
        ]
        self.vectors = torch.cat(vectors_of) / scale

    def to(self, device: torch.device) -> None:
        """Move labels, vectors and their classes to a device."""
        self.labels = self.labels.to(device)
        self.classes, self.vectors = self.classes.to(device), self.vectors.to(device)


def _pick(maps: Tensor, pixels: list[Tensor]) -> Tensor:
    """Pick the pixels, flat indices a sample, of maps (S, C, h, w): (n, C)."""
    samples = zip(maps, pixels, strict=True)
    return torch.cat([sample.flatten(1)[:, index.to(maps.device)].T for sample, index in samples])


class _Probe:
    """A linear classifier of real vectors: the cheapest decoder that never saw a generated one.

    Parameters
    ----------
    vectors, labels
        Training samples (n, C) and (n,).
    num_classes
        K.
    """

    def __init__(self, vectors: Tensor, labels: Tensor, num_classes: int) -> None:
        self.weight = torch.zeros(num_classes, vectors.shape[1])
        self.bias = torch.full((num_classes,), -torch.inf)
        classes = labels.unique()
        self.bias[classes] = 0
        if len(classes) > 1:
            self.weight[classes], self.bias[classes] = self._fit(vectors, labels)

    @staticmethod
    def _fit(vectors: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Fit weights (T, C) and biases (T,) of the T > 1 classes in ``labels``."""
        # A second to import, and only a monitored training needs it.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        with warnings.catch_warnings():  # a hundred steps are enough to tell classes apart
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = LogisticRegression(C=0.1, max_iter=100).fit(vectors.numpy(), labels.numpy())
        weight, bias = (torch.from_numpy(x).float() for x in (fitted.coef_, fitted.intercept_))
        if len(bias) == 1:  # scikit-learn keeps one row for two classes
            return torch.cat([-weight, weight]), torch.cat([-bias, bias])
        return weight, bias

    def predict(self, vectors: Tensor) -> Tensor:
        """Predict the classes (n,) of vectors (n, C), on their device."""
        weight, bias = self.weight.to(vectors.device), self.bias.to(vectors.device)
        return torch.addmm(bias, vectors, weight.T).argmax(1)


class Monitor:
    """Measures a generator against held-out images.

    Parameters
    ----------
    config
        How often, on how many samples, and what is a collapse.
    train, held_out
        Stores. A linear probe learns the classes from features of ``train``; generated features are
        compared with features of ``held_out``.
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
        self.config, self.accelerator = config, accelerator
        self.class_names = held_out.spec.class_names
        self._seed, self._warned = seed, False
        self._measures = bool(config.every) and accelerator.is_main_process
        if self._measures:
            self._learn(train, held_out, feature_scale.flatten().cpu())

    def _learn(self, train: FeatureStore, held_out: FeatureStore, scale: Tensor) -> None:
        """Draw the pixels, fit the probe, and measure real features as the reference."""
        config, classes, channels = self.config, len(self.class_names), len(scale)
        rng = np.random.default_rng([self._seed, 0])
        real = _PixelSample(held_out, scale, config.samples, config.vectors, rng)
        count = max(PROBE_VECTORS, config.vectors)
        learned = _PixelSample(train, scale, 2 * config.samples, count, rng)
        self._real, self._probe = real, _Probe(learned.vectors, learned.classes, classes)
        for sample in (real, learned):  # on a GPU all measures but one are computed there
            sample.to(self.accelerator.device)
        self._real_variances = class_variances(real.vectors, real.classes, classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            projection = RandomProjection(channels, min(channels, DIMENSIONS))
        mixture = projection.weight.flatten(1).T  # (C, P)
        self._mixture = mixture.to(self.accelerator.device)
        # What two sets of real features measure: no generator can be expected below it.
        chosen = rng.permutation(len(learned.vectors))[: len(real.vectors)]
        mixed = [side @ self._mixture for side in (real.vectors, learned.vectors[chosen])]
        predicted = self._probe.predict(real.vectors)
        confusion = confusion_matrix(predicted, real.classes, classes)
        self._references = {
            "monitor/frechet_floor": frechet_distance(*mixed),
            "monitor/kernel_floor": kernel_distance(*mixed),
            "monitor/consistency_real": score(confusion, self.class_names).miou,
        }

    def due(self, epoch: int, epochs: int) -> bool:
        """Return whether to measure after this epoch: every N epochs, and after the last."""
        every = self.config.every
        return every > 0 and ((epoch + 1) % every == 0 or epoch + 1 == epochs)

    @torch.no_grad()
    def measure(self, generator: FeatureGenerator) -> dict[str, float]:
        """Compute all measures of a generator, by their names in the logs.

        Only the main process measures; the others return nothing.
        """
        if not self._measures:
            return {}
        was_training = generator.training
        fake, again, predicted = self._generate(generator.eval())
        generator.train(was_training)
        if not fake.isfinite().all():  # no other measure takes such features
            return {"monitor/frechet": math.inf, **self._references}
        real, classes = self._real, len(self.class_names)
        mixed = [side @ self._mixture for side in (real.vectors, fake)]
        confusion = confusion_matrix(predicted, real.labels.flatten(), classes)
        consistency = score(confusion, self.class_names)
        by_class = {name.replace(" ", "_"): iou for name, iou in consistency.iou.items()}
        ratios = variance_ratios(real.vectors, fake, real.classes, classes)
        values = {
            "frechet": frechet_distance(*mixed),
            "kernel": kernel_distance(*mixed),
            **coverage(*mixed),
            "two_sample_accuracy": two_sample_accuracy(real.vectors, fake),
            "variance_ratio": float(ratios[~ratios.isnan()].mean()),
            "diversity": draw_diversity(fake, again, real.classes, self._real_variances),
            "consistency": consistency.miou,
            **{f"class_consistency/{name}": iou for name, iou in by_class.items()},
        }
        row = {f"monitor/{name}": value for name, value in values.items() if value is not None}
        # The first generator that is measured is the one at the start.
        start = self._references.get("monitor/frechet_start", row["monitor/frechet"])
        self._references["monitor/frechet_start"] = start
        return {**row, **self._references}

    def _generate(self, generator: FeatureGenerator) -> tuple[Tensor, Tensor, Tensor]:
        """Generate features from the masks of the sample.

        Returns
        -------
        fake, again
            Two draws (n, C) at the sample's pixels.
        predicted
            (S*h*w,) the probe's classes of all pixels of the first draw.
        """
        device, sample = self.accelerator.device, self._real
        rng = torch.Generator(device).manual_seed(self._seed)
        chunks = []
        for start in range(0, len(sample.masks), SAMPLES):
            rows = slice(start, start + SAMPLES)
            masks = sample.masks[rows].to(device)
            z = torch.randn(2 * len(masks), generator.z_dim, generator=rng, device=device)
            with self.accelerator.autocast():
                draws = generator(z, masks).float().chunk(2)
            vectors = [_pick(draw, sample.pixels[rows]) for draw in draws]
            everywhere = draws[0].permute(0, 2, 3, 1).flatten(0, 2)  # (S, C, h, w) -> (S*h*w, C)
            chunks.append((*vectors, self._probe.predict(everywhere)))
        fake, again, predicted = (torch.cat(values) for values in zip(*chunks, strict=True))
        return fake, again, predicted

    def check(self, row: dict[str, float], epoch: int) -> CollapseError | None:
        """Report, once, that the measures of an epoch are those of a collapse.

        Returns
        -------
        CollapseError or None
            Where ``on_collapse`` is ``stop``, the error to raise after the state is saved.
        """
        if self._warned or epoch + 1 <= self.config.patience:
            return None
        # Only the main process has measured, and all processes must stop or continue together.
        if (reason := agree(self.collapse(row))) is None:
            return None
        self._warned = True
        message = f"epoch {epoch + 1}: the GAN collapses: {reason}"
        if self.config.on_collapse == "stop":
            remedy = "train with other settings, or set monitor.on_collapse to warn"
            return CollapseError(f"{message}; {remedy}")
        if self.accelerator.is_main_process:
            log.warning(message)
        return None

    def collapse(self, row: dict[str, float]) -> str | None:
        """Say what is wrong with the measures of an epoch, or None."""
        frechet = row.get("monitor/frechet")  # None: not measured after this epoch
        sides = ("discriminator/accuracy_real", "discriminator/accuracy_fake")
        measures = {"max_accuracy": min(row.get(side, 0.0) for side in sides)}  # a flow has none
        if frechet is not None and math.isfinite(frechet):
            real_consistency = max(row["monitor/consistency_real"], 1e-12)
            measures |= {
                "min_variance_ratio": row["monitor/variance_ratio"],
                "min_coverage": row["monitor/coverage"],
                "min_consistency": row["monitor/consistency"] / real_consistency,
                "max_frechet": frechet / max(row["monitor/frechet_start"], 1e-12),
            }
        for setting, exceeds, text in LIMITS:
            limit = getattr(self.config, setting)
            if setting in measures and exceeds(measures[setting], limit):
                return f"{text.format(measures[setting])} (monitor.{setting} is {limit})"
        return "generated features are no finite numbers" if frechet == math.inf else None
