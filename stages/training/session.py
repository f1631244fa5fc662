"""What both training loops share: accelerator, resumable state, progress, history, collapse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import featurestore
from featurestore import FeatureStore
from featurestore.dataset import Batch, FeatureLoader, PairedLoader
from stages.common.errors import CollapseError, ConfigError
from stages.common.runtime import (
    Machine,
    allow_tf32,
    check_batch_divides,
    load_scaler_state,
    make_accelerator,
    progress,
    scaler_state,
)
from stages.common.sources import imports_digest
from stages.common.tracking import TRACKERS, History, Means
from stages.common.windows import TILE, positions_of_rank
from stages.gan.monitor import Monitor, MonitorConfig
from stages.models.feature_generator import FeatureGenerator
from stages.training.checkpoint import Checkpoint


class Stateful(Protocol):
    """What a resumed run restores: networks, optimizers, trainers, augmenters."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, of tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Restore a state that :meth:`state_dict` returned."""


class TrainingConfig(Protocol):
    """Keys that the sections of both training stages have."""

    @property
    def batch_size(self) -> int:
        """Samples of a step, of all processes."""

    @property
    def repeats(self) -> int:
        """Times that an epoch reads every sample."""

    @property
    def mixed_precision(self) -> str:
        """Precision of the networks: ``no`` (float32), ``tf32``, ``bf16`` or ``fp16``."""

    @property
    def gradient_accumulation(self) -> int:
        """Micro-batches of a batch."""


class Session:
    """One run of a training stage; an interrupted one resumes at its last saved step.

    Parameters
    ----------
    stage
        Module of the stage, such as ``stages.train_gan``: an edit of a source file that it imports
        discards the states of interrupted runs.
    name
        Name of the run in scratch folder and TensorBoard.
    machine
        How this machine computes.
    config
        Section of params.yaml: ``mixed_precision`` and ``gradient_accumulation`` apply.
    metrics, logs
        Folders of DVCLive's and TensorBoard's files.

    Attributes
    ----------
    accelerator
        Device, precision and processes.
    history
        Rows of the finished epochs.
    """

    def __init__(
        self,
        stage: str,
        name: str,
        machine: Machine,
        config: TrainingConfig,
        *,
        metrics: Path,
        logs: Path,
    ) -> None:
        self.stage, self.name, self.machine, self.metrics = stage, name, machine, metrics
        self.accelerator = make_accelerator(
            machine.device,
            config.mixed_precision,
            log_with=list(TRACKERS),
            project_dir=logs,
            gradient_accumulation_steps=config.gradient_accumulation,
        )
        allow_tf32(config.mixed_precision == "tf32")
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        self._monitor: Monitor | None = None
        self._stateful: Mapping[str, Stateful] = {}
        self._step = 0  # first step of the epoch; above 0 only in a resumed one
        self._means = Means()

    def loader(self, store: FeatureStore, batch_size: int, **options: Any) -> FeatureLoader:
        """Read a store in batches of all processes; for ``options`` see :class:`FeatureLoader`."""
        settings: dict[str, Any] = {
            "workers": self.machine.workers,
            "device": self.accelerator.device,
            "cache": self.machine.cache,
            "rank": self.accelerator.process_index,
            "ranks": self.accelerator.num_processes,
        }
        return FeatureLoader(store, batch_size, **{**settings, **options})

    def paired(
        self,
        loader: FeatureLoader,
        unlabelled: FeatureStore,
        batch_size: int,
        *,
        first_epoch: int = 0,
        **options: Any,
    ) -> PairedLoader:
        """Read as many batches of another store beside those of a loader, from an epoch on."""
        repeats = math.ceil(len(loader) * batch_size / len(unlabelled))
        others = self.loader(unlabelled, batch_size, repeats=repeats, **options)
        return PairedLoader(loader, others, first_epoch=first_epoch)

    def scoring_loader(self, store: FeatureStore, batch_size: int, **options: Any) -> FeatureLoader:
        """Read a store as :meth:`loader` does, all windows of an image in one process."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        if ranks == 1 or store.spec.resize != TILE:
            return self.loader(store, batch_size, **options)
        positions = positions_of_rank(store.ids, TILE, rank, ranks)
        options |= {"positions": positions, "rank": 0, "ranks": 1}
        return self.loader(store, batch_size // ranks, **options)

    def watch(
        self,
        config: MonitorConfig,
        generator: Callable[[], FeatureGenerator] | None,
        stores: Mapping[str, FeatureStore],
        *,
        seed: int,
        epochs: int,
    ) -> None:
        """Monitor a generator that learns in the first ``epochs`` epochs; None: there is none.

        Its measures before the training are what later ones are compared with.
        """
        if generator is None:
            return
        self._generator, self._watched = generator, epochs
        self._monitor = Monitor(
            config,
            self.accelerator,
            train=stores["train"],
            held_out=stores["val"],
            feature_scale=generator().feature_scale,
            seed=seed,
        )
        self._monitor.measure(generator())

    def resume(
        self,
        loader: FeatureLoader | PairedLoader,
        epochs: int,
        *,
        identity: Mapping[str, object],
        state: Mapping[str, Stateful],
    ) -> None:
        """Restore the last saved state of a run with the same identity, or start a new one.

        Parameters
        ----------
        loader, epochs
            Training samples, and how often they are read.
        identity
            Everything that the result depends on, JSON-ready; sources, PyTorch's version and the
            number of processes are added.
        state
            What is saved and restored, by name.

        Raises
        ------
        DataError
            When the saved state is damaged.
        CollapseError
            When the GAN had collapsed at the saved step and ``monitor.on_collapse`` is ``stop``.
        """
        accelerator, self._stateful = self.accelerator, state
        digest = featurestore.fingerprint(
            **identity,
            torch=torch.__version__,
            code=imports_digest(self.stage),
            ranks=accelerator.num_processes,
        )
        folder = self.machine.scratch / self.stage.split(".")[-1].replace("_", "-")
        self.checkpoint = Checkpoint(
            folder / f"{self.name}-{digest[:16]}",
            minutes=self.machine.checkpoint_minutes,
            main=accelerator.is_main_process,
        )
        saved = self.checkpoint.load() or {"step": 0, "sums": {}, "history": []}
        for key, target in state.items() if "states" in saved else ():
            target.load_state_dict(saved["states"][key])
        load_scaler_state(accelerator, saved.get("scaler", {}))
        self.history = History(accelerator, self.name, live=self.metrics, rows=saved["history"])
        self._step, self._means = saved["step"], Means(saved["sums"])
        self._loader, self._epochs = loader, epochs
        self._bar = progress((), self.name, epochs * len(loader), "step")
        self._bar.update(len(self.history.rows) * len(loader) + self._step)
        if self.history.rows and (collapse := self._collapse(self.history.rows[-1])):
            # The run stopped here before; it stops again unless on_collapse is warn.
            raise collapse

    # -- the loop --------------------------------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """Yield the numbers of the epochs that are left."""
        yield from range(len(self.history.rows), self._epochs)
        self._bar.close()

    def batches(self, epoch: int) -> Iterator[tuple[int, Batch]]:
        """Yield the batches that are left in an epoch, with their numbers."""
        first = self._step
        for number, batch in enumerate(self._loader.epoch(epoch, first), first):
            yield number, batch
            self._bar.update()

    def log(self, values: Mapping[str, Tensor]) -> None:
        """Add values of a micro-batch to the means of the epoch; nothing waits for the device.

        In fp16 the means leave out values that overflowed, because their step was skipped.
        ``fp16/overflows`` is the fraction of the micro-batches with one.
        """
        if self.accelerator.scaler is None:
            self._means.add(values)
        else:
            finite = torch.stack([value.detach().isfinite().all() for value in values.values()])
            self._means.add({**values, "fp16/overflows": ~finite.all()}, finite_only=True)

    def save_if_due(self, step: int) -> None:
        """Save after ``step`` steps of an epoch, if ``checkpoint_minutes`` have passed."""
        if step < len(self._loader) and self.checkpoint.due():
            self._save(step)

    def take_means(self) -> dict[str, float]:
        """Return the means of the logged values over steps and processes, and start new ones."""
        means, self._means = self._means, Means()
        return means.result(self.accelerator)

    def measure_if_due(self, epoch: int) -> dict[str, float]:
        """Measure the watched generator, after the epochs where it is due."""
        if (
            self._monitor is None
            or epoch >= self._watched
            or not self._monitor.due(epoch, self._watched)
        ):
            return {}
        return self._monitor.measure(self._generator())

    def end_epoch(self, row: dict[str, float]) -> None:
        """Log an epoch's row and save the state if it is due.

        Raises
        ------
        CollapseError
            When the GAN collapsed and ``monitor.on_collapse`` is ``stop``; the state is saved.
        """
        self.history.log(row)
        self._step = 0
        collapse = self._collapse(row)
        if self.checkpoint.due() or collapse:
            self._save(0)
        if collapse:
            raise collapse

    def finish(self) -> None:
        """End the trackers and remove the saved state; the main process has written the results."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        self.checkpoint.remove()

    def _collapse(self, row: dict[str, float]) -> CollapseError | None:
        """Check the row of the last finished epoch."""
        epoch, monitor = len(self.history.rows) - 1, self._monitor
        if monitor is None or epoch >= self._watched:
            return None
        return monitor.check(row, epoch)

    def _save(self, step: int) -> None:
        self.checkpoint.save(
            states={name: target.state_dict() for name, target in self._stateful.items()},
            scaler=scaler_state(self.accelerator),
            history=self.history.rows,
            step=step,
            sums=self._means.state(self.accelerator.device),
        )


def check_batch(config: TrainingConfig, store: FeatureStore, processes: int, section: str) -> None:
    """Refuse a batch that does not divide over the processes, or is larger than an epoch.

    Raises
    ------
    ConfigError
        The key is ``batch_size`` of the section.
    """
    key, size = f"{section}.batch_size", config.batch_size
    check_batch_divides(size, processes, config.gradient_accumulation, key)
    samples = config.repeats * len(store.positions("identity"))
    if samples < size:
        message = (
            f"{size} is more than the {samples} samples that an epoch takes from {store.path};"
            " lower it, or raise repeats"
        )
        raise ConfigError(key, message, expected=samples, actual=size)
