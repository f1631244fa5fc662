"""Studies: experiments of many runs that survive any interruption, one small result file a run.

A study is a YAML file: a preset, what it changes of it, and experiments, each a list of variants trained with several
seeds. Every run is a decoder, trained by the same stages as `dvc repro` trains it, in a working folder of its own;
runs with the same data share features, and with the same GAN settings the GAN. A run whose result file is there and was made
with the same settings is not run again, so a study goes on where it stopped, on any machine that has the files.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
from pydantic import Field, field_validator
from ruamel.yaml import YAML

import featurestore
import stages
from featurestore.files import file_sha256
from stages.config import Config, Seed
from stages.errors import ConfigError, DataError
from stages.metrics import IMAGES_NAME
from stages.runtime import source_digest, write_json

Labels = dict[str, str]  # what a row is called -> its variant in section ``variants``


class ExperimentConfig(Config):
    """Rows that are compared with each other, under settings of their own."""

    set: dict[str, Any] = Field(default_factory=dict)  # ``section.key: value`` of the parameters
    variants: Annotated[Labels, Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...] | None, Field(strict=False)] = None  # default: the study's

    @field_validator("variants", mode="before")
    @classmethod
    def _named(cls, variants: Any) -> Any:
        if not isinstance(variants, list):
            return variants
        if not all(isinstance(name, str) for name in variants):
            raise ValueError("a list holds names of variants; rows of other names are a mapping of label: variant")
        return {name: name for name in variants}


class StudyConfig(Config):
    """A study file."""

    preset: str
    set: dict[str, Any] = Field(default_factory=dict)
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)]
    gan: Literal["once", "per-seed"]  # pretrained once, with its own seed, or once for each seed of the decoders
    experiments: Annotated[dict[str, ExperimentConfig], Field(min_length=1)]


def with_settings(params: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with ``section.key: value`` changed.

    Raises
    ------
    ConfigError
        For a key that is not there.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(params))
    for key, value in changes.items():
        *way, last = key.split(".")
        place: Any = changed
        for part in way:
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict) or (last not in place and way[:1] != ["variants"]):
            raise ConfigError(key, "there is no such parameter; a study sets parameters that its preset has")
        place[last] = value
    return changed


@dataclass(frozen=True)
class Run:
    """One decoder to train.

    Attributes
    ----------
    experiment, label, variant, seed
        Where it belongs, what its row is called, and what it trains.
    params
        All parameters, plain.
    protocol
        Digest of what must be equal for two runs to be compared: data, features, the decoder's training.
    digests
        Of what the features, the GAN and the result depend on, by ``data``, ``gan`` and ``run``.
    """

    experiment: str
    label: str
    variant: str
    seed: int
    params: dict[str, Any]
    protocol: str
    digests: dict[str, str]
    needs_gan: bool

    def result(self, results: Path) -> Path:
        """Where its result file belongs."""
        return results / self.experiment / f"{self.label}-{self.seed}.json"

    def is_done(self, results: Path) -> bool:
        """Whether that file is there, of a run with the same settings.

        Raises
        ------
        DataError
            When the file is no result.
        """
        path = self.result(results)
        try:
            return bool(json.loads(path.read_text(encoding="utf-8"))["digest"] == self.digests["run"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(path, f"is no result of a study ({error!r}); remove it, and its run is repeated") from error


def plan(config: StudyConfig, preset: Mapping[str, Any], overrides: Mapping[str, Any], check: Any) -> list[Run]:
    """All runs of a study: seed by seed, so that a study cut short has whole comparisons.

    Parameters
    ----------
    preset
        Plain parameters.
    overrides
        Settings of this machine, such as ``prepare.root``; results do not depend on them.
    check
        Turns plain parameters into typed sections, or raises :class:`ConfigError`.
    """
    runs = []
    for experiment, settings in config.experiments.items():
        params = with_settings(preset, {**config.set, **settings.set, **overrides})
        for variant in settings.variants.values():
            if variant not in params["variants"]:
                known = ", ".join(params["variants"])
                raise ConfigError(f"study.experiments.{experiment}.variants", f"{variant!r} is not described in variants ({known})")
        params["prepare"]["root"] = str(Path(params["prepare"]["root"]).resolve())  # stages run in folders of their own
        weights = params["extract"]["weights"]
        if weights != "default":
            if not Path(weights).is_file():
                raise ConfigError("extract.weights", f"there is no file {weights}", found=weights)
            params["extract"]["weights"] = str(Path(weights).resolve())
        params["compare"] = {"variants": sorted(set(settings.variants.values())), "seeds": list(settings.seeds or config.seeds)}
        sections = check(params, f"experiment {experiment}")
        for seed in settings.seeds or config.seeds:
            if config.gan == "per-seed":
                params = with_settings(params, {"train_gan.seed": seed})
            plain = {name: sections[name].model_dump(mode="json") for name in ("prepare", "extract", "train_decoder")}
            plain["prepare"].pop("root")  # where files lie does not matter; which data they are is in the result's protocol
            if weights != "default":
                plain["extract"]["weights"] = file_sha256(Path(params["extract"]["weights"]))
            gan = {**sections["train_gan"].model_dump(mode="json"), "seed": params["train_gan"]["seed"]}
            digests = {"data": _digest(plain["prepare"], plain["extract"])}
            digests["gan"] = _digest(digests["data"], gan)
            for label, variant in settings.variants.items():
                chosen = sections["variants"][variant]
                described = chosen.model_dump(mode="json", exclude_defaults=True)  # a key that is added with a default changes nothing
                of_run = _digest(plain, described, seed, gan if chosen.needs_gan else None)
                where = (experiment, label, variant, seed)
                runs.append(Run(*where, params, _digest(plain), {**digests, "run": of_run}, chosen.needs_gan))
    same = Counter(run.digests["run"] for run in runs)
    for run in runs:
        if same[run.digests["run"]] > 1:
            message = f"{run.label!r} with seed {run.seed} is the same run as another experiment's; leave it out of one of them"
            raise ConfigError(f"study.experiments.{run.experiment}.variants", message)
    order = {seed: number for number, seed in enumerate(config.seeds)}
    return sorted(runs, key=lambda run: order.get(run.seed, len(order)))


def _digest(*values: Any) -> str:
    return featurestore.fingerprint(values=values)[:16]


@dataclass
class Workshop:
    """Working folders under ``root``, and the stages run in them.

    Attributes
    ----------
    root
        Folder of features, GANs and decoders in the making; it may be removed between two calls.
    results
        Folder of the result files.
    threads
        CPU threads of each stage.
    lock
        Descriptor of the lock on ``root``, which stages keep open: one that outlives a killed study still holds it.
    """

    root: Path
    results: Path
    threads: int
    lock: int
    _locks: dict[str, threading.Lock] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, root: Path, results: Path, threads: int) -> Workshop:
        """A workshop that no other study works in.

        Raises
        ------
        DataError
            When one does.
        """
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            message = "another study works here, or a stage of one that was killed; wait for it, stop it, or choose another --scratch"
            raise DataError(root, message) from None
        return cls(root, results, threads, lock)

    def run(self, run: Run) -> Path:
        """Train one decoder, after what it needs, and write its result file.

        Raises
        ------
        DataError
            When a stage fails; its output is in the working folder's ``log.txt``.
        """
        data = self._data(run)
        linked = {"dataset": data / "dataset", "features": data / "features"}
        if run.needs_gan:
            gan = self._once(f"gan-{run.digests['gan']}-{data.name.split('-')[-1]}", self._pretrain, run)
            linked["models/gan"] = gan / "models" / "gan"
        folder = self._folder(f"run-{run.digests['run']}", run, linked)
        start = time.perf_counter()
        self._stage(folder, "train-decoder", "--variant", run.variant, "--seed", str(run.seed))
        seconds = time.perf_counter() - start
        measured = folder / "metrics" / f"{run.variant}-{run.seed}"
        test = json.loads((measured / "test.json").read_text(encoding="utf-8"))
        stores = {split: featurestore.open(data / "features" / split) for split in ("train", "test")}
        result = {
            "experiment": run.experiment,
            **test,
            "variant": run.label,
            "digest": run.digests["run"],
            "protocol": _digest(run.protocol, [store.fingerprint for store in stores.values()]),
            "train_images": len(set(stores["train"].ids)),
            "settings": _settings(run),
            "made_with": {
                "sources": source_digest(stages, featurestore)[:16],
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "threads": self.threads,
                "seconds": round(seconds, 1),
            },
            "images": json.loads((measured / IMAGES_NAME).read_text(encoding="utf-8")),
        }
        target = run.result(self.results)
        if run.needs_gan:
            result["gan"] = _gan_curves(gan / "metrics" / "train-gan")
        unfinished = target.with_suffix(".partial")
        write_json(unfinished, result, indent=None)
        os.replace(unfinished, target)
        shutil.rmtree(folder)
        return target

    def _once(self, name: str, make: Any, run: Run) -> Path:
        """A folder that several runs share: the first to come makes it, the others wait."""
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            done = self.root / name / "done"
            if not done.exists():
                make(name, run)
                done.touch()
        return (self.root / name).resolve()

    def _data(self, run: Run) -> Path:
        """Features, of the photographs at the run's root."""
        return self._once(f"data-{run.digests['data']}-{_digest(run.params['prepare']['root'])[:8]}", self._extract, run)

    def _extract(self, name: str, run: Run) -> None:
        folder = self._folder(name, run, {})
        self._stage(folder, "prepare")
        self._stage(folder, "extract")

    def _pretrain(self, name: str, run: Run) -> None:
        data = self._data(run)
        self._stage(self._folder(name, run, {"dataset": data / "dataset", "features": data / "features"}), "train-gan")

    def _folder(self, name: str, run: Run, linked: Mapping[str, Path]) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        YAML().dump(run.params, folder / "params.yaml")
        for link, target in linked.items():
            place = folder / link
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.symlink_to(target)
        return folder

    def _stage(self, folder: Path, *arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "NUMBA_NUM_THREADS": str(self.threads)}
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            # Not from the environment: this run's own parameters, and unfinished work that no other run shares.
            command = [sys.executable, "-m", "pipeline", *arguments, "--params", "params.yaml", "--scratch", "scratch"]
            process = subprocess.run(
                command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False, pass_fds=(self.lock,)
            )
            code = process.returncode
        if code:
            lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            reason = next((line for line in reversed(lines) if line.strip()), "no output")
            raise DataError(folder / "log.txt", f"{arguments[0]} failed with exit code {code}: {reason}")


def _gan_curves(live: Path) -> dict[str, list[float | None]]:
    """The GAN's losses by epoch, and its measures where they were taken; not those of each class."""
    from stages.analysis.figures import read_curves  # and with it matplotlib

    table = pd.DataFrame({name: curve for name, curve in read_curves(live).items() if "class_consistency" not in name})
    rounded = table.round(4).astype(object)
    return {str(name): column.tolist() for name, column in rounded.where(table.notna(), None).items()}


def _settings(run: Run) -> dict[str, Any]:
    """The parameters that a result depends on, as they stand in the file."""
    names = ("prepare", "extract", "train_decoder", *(("train_gan",) if run.needs_gan else ()))
    settings = {name: dict(run.params[name]) for name in names}
    settings["prepare"].pop("root")
    return {**settings, "variant": run.params["variants"][run.variant]}
