"""Where a study's runs are made: stages in working folders that share what they have in common.

Every run is a decoder, trained by the same stages as `dvc repro` trains it, in a working folder of its own; runs with the
same data share features, and with the same GAN settings the GAN.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from ruamel.yaml import YAML
from typing_extensions import Self

import featurestore
import stages
from featurestore import FeatureStore
from stages.common.errors import DataError
from stages.common.runtime import source_digest, write_json
from stages.data.manifest import SPLITS, read_manifest
from stages.segmentation.metrics import IMAGES_NAME
from stages.studies.plan import Run, digest


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
    done
        Runs of the study that have their result; others are to learn from the same images.
    """

    root: Path
    results: Path
    threads: int
    lock: int
    done: Sequence[Run] = ()
    _current: set[str] = field(
        default_factory=set
    )  # shared folders of features whose images were looked at
    _locks: dict[str, threading.Lock] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    @contextmanager
    def open(
        cls, root: Path, results: Path, threads: int, done: Sequence[Run] = ()
    ) -> Iterator[Self]:
        """A workshop that no other study works in until the block ends.

        Raises
        ------
        DataError
            When one does.
        """
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = "another study works here, or a stage of one that was killed; wait for it, stop it, or choose another --scratch"
                raise DataError(root, message) from None
            yield cls(root, results, threads, lock, done)
        finally:
            os.close(lock)

    def work(self, runs: Sequence[Run], jobs: int) -> Iterator[Future[Path]]:
        """Make runs, ``jobs`` at a time; each comes as it is done, with its result file or its error.

        Of two runs that need a folder that is not there yet, one makes it, and the other lets those go first that need it not.
        """
        waiting, running = list(runs), dict[Future[Path], Run]()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        making = {name for run in running.values() for name in self._missing(run)}
                        chosen = next(
                            (run for run in waiting if making.isdisjoint(self._missing(run))),
                            waiting[0],
                        )
                        waiting.remove(chosen)
                        running[pool.submit(self.run, chosen)] = chosen
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        del running[future]
                        yield future
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def run(self, run: Run) -> Path:
        """Train one decoder, after what it needs, and write its result file.

        Raises
        ------
        DataError
            When a stage fails; its output is in the working folder's ``log.txt``. When the images or masks are not
            those that features, or results of the study, were made of.
        """
        data = self._data(run)
        stores = {split: featurestore.open(data / "features" / split) for split in SPLITS}
        protocol = digest(run.protocol, data_content(data / "dataset", stores))
        self._check_done(run, protocol)
        linked = {"dataset": data / "dataset", "features": data / "features"}
        sources = {"features_sources": _made_by(data)}
        if run.needs_gan:
            gan = self._once(self.shared(run)[-1], self._pretrain, run)
            linked["models/gan"] = gan / "models" / "gan"
            sources["gan_sources"] = _made_by(gan)
        folder = self._folder(f"run-{run.digests['run']}", run, linked)
        start, sources["sources"] = time.perf_counter(), _sources()
        self._stage(folder, "train-decoder", "--variant", run.variant, "--seed", str(run.seed))
        seconds = time.perf_counter() - start
        measured = folder / "metrics" / f"{run.variant}-{run.seed}"
        test = json.loads((measured / "test.json").read_text(encoding="utf-8"))
        result = {
            "experiment": run.experiment,
            **test,
            "variant": run.label,
            "digest": run.digests["run"],
            "protocol": protocol,
            "train_images": len(set(stores["train"].ids)),
            "settings": _settings(run),
            "made_with": {
                **sources,
                "commit": _commit(),
                "torch": torch.__version__,
                "device": _device_name(),
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

    @staticmethod
    def shared(run: Run) -> list[str]:
        """Names of the folders that it shares with other runs: of the features, and of the GAN if it needs one."""
        root = digest(run.params["prepare"]["root"])[:8]
        return [
            f"{part}-{run.digests[part]}-{root}"
            for part in (("data", "gan") if run.needs_gan else ("data",))
        ]

    def _missing(self, run: Run) -> list[str]:
        return [name for name in self.shared(run) if not (self.root / name / "done").exists()]

    def _check_done(self, run: Run, protocol: str) -> None:
        """Refuse to add a result to others with the same settings that were made of other images or masks."""
        for other in self.done:
            if other.protocol == run.protocol:
                path = other.result(self.results)
                if json.loads(path.read_text(encoding="utf-8"))["protocol"] != protocol:
                    message = "was made of other images or masks than there are now; remove it, or name another --results"
                    raise DataError(path, message)

    def _once(self, name: str, make: Any, run: Run) -> Path:
        """A folder that several runs share: the first to come makes it, the others wait."""
        with self._making(name):
            done = self.root / name / "done"
            if not done.exists():
                sources = _sources()
                make(name, run)
                done.write_text(sources, encoding="utf-8")
        return (self.root / name).resolve()

    def _making(self, name: str) -> threading.Lock:
        with self._guard:
            return self._locks.setdefault(name, threading.Lock())

    def _data(self, run: Run) -> Path:
        """Features, of the images at the run's root as they are now."""
        name = self.shared(run)[0]
        folder = self._once(name, self._extract, run)
        with self._making(name):
            if name not in self._current:
                self._check_images(folder, run)
                self._current.add(name)
        return folder

    def _check_images(self, folder: Path, run: Run) -> None:
        """Prepare the images once more, and refuse features of an earlier study that were made of others."""
        again = self._folder(f"{folder.name}/again", run, {})
        self._stage(again, "prepare")
        (before, classes), (now, classes_now) = (
            read_manifest(place / "dataset") for place in (folder, again)
        )
        shutil.rmtree(again)
        by_id, by_id_now = ({entry.id: entry for entry in entries} for entries in (before, now))
        other = [
            id
            for id in sorted(by_id.keys() | by_id_now.keys())
            if by_id.get(id) != by_id_now.get(id)
        ]
        other += ["the classes"] if classes != classes_now else []
        if other:
            message = (
                f"these features are of other images or masks than {run.params['prepare']['root']} has now ({other[0]}"
                f"{f' and {len(other) - 1} more' if len(other) > 1 else ''}); remove {self.root} to extract them anew"
            )
            raise DataError(folder, message)

    def _extract(self, name: str, run: Run) -> None:
        folder = self._folder(name, run, {})
        self._stage(folder, "prepare")
        self._stage(folder, "extract")
        self._current.add(name)

    def _pretrain(self, name: str, run: Run) -> None:
        data = self._data(run)
        self._stage(
            self._folder(name, run, {"dataset": data / "dataset", "features": data / "features"}),
            "train-gan",
        )

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
        sources = str(
            Path(stages.__file__).resolve().parents[1]
        )  # this code, which the result file names, wherever another is installed
        found = os.pathsep.join(filter(None, [sources, os.environ.get("PYTHONPATH")]))
        threads = str(self.threads)
        environment = {
            **os.environ,
            "PYTHONPATH": found,
            "OMP_NUM_THREADS": threads,
            "NUMBA_NUM_THREADS": threads,
        }
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            # Not from the environment: this run's own parameters, and unfinished work that no other run shares.
            command = [
                sys.executable,
                "-m",
                "pipeline",
                *arguments,
                "--params",
                "params.yaml",
                "--scratch",
                "scratch",
            ]
            process = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
                pass_fds=(self.lock,),
            )
            code = process.returncode
        if code:
            lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            reason = next((line for line in reversed(lines) if line.strip()), "no output")
            raise DataError(
                folder / "log.txt", f"{arguments[0]} failed with exit code {code}: {reason}"
            )


def _device_name() -> str:
    """Where stages compute: they read the same variable."""
    on_gpu = torch.cuda.is_available() and os.environ.get("FEATUREGAN_DEVICE", "auto") != "cpu"
    return torch.cuda.get_device_name() if on_gpu else "cpu"


def _sources() -> str:
    """The digest of the code that a stage started now would run."""
    return source_digest(stages, featurestore)[:16]


def _commit() -> str:
    """The commit of this code, ending in ``-dirty`` where it was changed since; empty where it is no checkout."""
    root = Path(stages.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: a repository around it is another project's
        return ""
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _made_by(shared: Path) -> str:
    """The digest of the code that made a shared folder; later code takes it over as it is."""
    return (shared / "done").read_text(encoding="utf-8") or "unknown"


def data_content(dataset: Path, stores: Mapping[str, FeatureStore]) -> list[Any]:
    """What a decoder learns from and is tested on: images, masks, classes; not the code or the files that they came by.

    Images count by their bytes, masks by their pixels: the same pixels become other PNG bytes with another library.
    """
    images = {entry.id: entry.image_sha256 for entry in read_manifest(dataset)[0]}
    content: list[Any] = [list(stores["train"].spec.class_names)]
    for split, store in stores.items():
        for position, (id, view) in enumerate(zip(store.ids, store.views, strict=True)):
            mask = hashlib.sha256(store.gather("masks", [position]).tobytes()).hexdigest()
            content.append([split, id, view, images[id], mask])
    return content


def _gan_curves(live: Path) -> dict[str, list[float | None]]:
    """The GAN's losses by epoch, and its measures where they were taken; not those of each class."""
    from stages.reporting.curves import read_curves

    table = pd.DataFrame(
        {
            name: curve
            for name, curve in read_curves(live).items()
            if "class_consistency" not in name
        }
    )
    rounded = table.round(4).astype(object)
    return {
        str(name): column.tolist() for name, column in rounded.where(table.notna(), None).items()
    }


def _settings(run: Run) -> dict[str, Any]:
    """The parameters that a result depends on, as they stand in the file."""
    names = ("prepare", "extract", "train_decoder", *(("train_gan",) if run.needs_gan else ()))
    settings = {name: dict(run.params[name]) for name in names}
    settings["prepare"].pop("root")
    return {**settings, "variant": run.params["variants"][run.variant]}
