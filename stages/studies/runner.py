"""Runs of a study: stages in working folders, with features and GANs shared between runs.

Each run trains one decoder by the stages of `dvc repro`, in its own working folder. Runs with the
same data share features; runs that also have the same GAN settings share the GAN. File locks keep
processes that make single runs in one scratch folder from making a shared folder twice.
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

import pandas as pd
import torch
from ruamel.yaml import YAML

import featurestore
import stages
from featurestore import FeatureStore
from featurestore.lock import UNSUPPORTED
from stages.common.errors import DataError
from stages.common.runtime import on_cpu, source_digest, write_json
from stages.common.sources import commit
from stages.common.windows import image_name
from stages.data.manifest import SPLITS, read_manifest
from stages.reporting.curves import OF_A_GAN, read_curves
from stages.segmentation.metrics import IMAGES_NAME
from stages.studies.plan import Run, digest

CODE = Path(stages.__file__).resolve().parents[1]  # folder of this project's sources


@dataclass
class Runner:
    """Runs stages in working folders below ``root``.

    Attributes
    ----------
    root
        Folder of features, GANs and unfinished decoders; it may be removed between two calls.
    results
        Folder of the result files.
    threads
        CPU threads of each stage.
    lock
        File descriptor of the lock on ``root``. Stages inherit their locks: a stage that outlives
        a killed study still holds them.
    runs
        All runs of the study. All must have the images of earlier results.
    """

    root: Path
    results: Path
    threads: int
    lock: int
    runs: Sequence[Run] = ()
    _checked: set[str] = field(default_factory=set)  # shared folders made of the current images
    _checking: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)

    @classmethod
    @contextmanager
    def open(
        cls,
        root: Path,
        results: Path,
        threads: int,
        runs: Sequence[Run] = (),
        *,
        shared: bool = False,
    ) -> Iterator[Runner]:
        """Lock ``root`` until the block ends.

        ``shared``: exclude whole studies only; other processes may make other runs in ``root``.

        Raises
        ------
        DataError
            When a process holds a lock that excludes this one.
        """
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        message = (
            "another study works here, or a stage of one that was killed; wait for it,"
            " stop it, or choose another --scratch"
        )
        with _locked(root / "lock", kind, DataError(root, message)) as lock:
            yield cls(root, results, threads, lock, runs)

    def run_all(self, runs: Sequence[Run], jobs: int) -> Iterator[Future[Path]]:
        """Make runs, ``jobs`` at a time.

        Where several runs need the same missing folder, one of them makes it, and runs that do
        not need it go first.

        Yields
        ------
        Future
            In the order of completion: a result file or an error.
        """
        waiting, running = list(runs), dict[Future[Path], Run]()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        making = {name for run in running.values() for name in self._missing(run)}
                        free = (run for run in waiting if making.isdisjoint(self._missing(run)))
                        chosen = next(free, waiting[0])
                        waiting.remove(chosen)
                        running[pool.submit(self.run, chosen)] = chosen
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        del running[future]
                        yield future
            except BaseException:
                self._stopped.set()  # ends the waiting for shared folders
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def run(self, run: Run) -> Path:
        """Train one decoder, after what it needs, and write its result file.

        Raises
        ------
        DataError
            When a stage fails (its output is in the working folder's ``log.txt``), features or
            other results of the study were made of other images or masks, or another process
            makes this run.
        """
        name = f"run-{run.digests['run']}"
        message = (
            "another command makes this run, or a stage of one that was killed; wait for it or"
            " stop it"
        )
        busy = DataError(self.root / name, message)
        with _locked(self._lock_file(name), fcntl.LOCK_EX, busy) as lock:
            if run.is_done(self.results):  # another command has made it since
                return run.result(self.results)
            return self._run(run, name, lock)

    def _run(self, run: Run, name: str, lock: int) -> Path:
        names = self.shared_folders(run)
        sources, curves = {}, {}
        data, sources["features_sources"] = self._make_once(names[0], run, {}, "prepare", "extract")
        self._check_images(data, run, f"{name}/again", lock)
        stores = {split: featurestore.open(data / "features" / split) for split in SPLITS}
        protocol = digest(run.protocol, data_content(data / "dataset", stores))
        self._check_done(run, protocol)
        inputs = {"dataset": data / "dataset", "features": data / "features"}
        if run.needs_gan:
            gan, sources["gan_sources"] = self._make_once(names[-1], run, inputs, "train-gan")
            inputs = {**inputs, "models/gan": gan / "models" / "gan"}
            curves = {"gan": gan_curves(gan / "metrics" / "train-gan")}
        folder = self._prepare_folder(name, run, inputs)
        start, sources["sources"] = time.perf_counter(), _sources()
        command = ("train-decoder", "--variant", run.variant, "--seed", str(run.seed))
        self._run_stage(folder, lock, *command)
        seconds = time.perf_counter() - start
        metrics = folder / "metrics" / f"{run.variant}-{run.seed}"
        if joint := gan_curves(metrics):
            curves["gan_joint"] = joint
        device = os.environ.get("FEATUREGAN_DEVICE", "auto")  # as stages read it
        result = {
            "experiment": run.experiment,
            **json.loads((metrics / "test.json").read_text(encoding="utf-8")),
            "variant": run.label,
            "digest": run.digests["run"],
            "protocol": protocol,
            "train_images": len(set(_image_names(stores["train"]))),
            "settings": _settings(run),
            "made_with": {
                **sources,
                "commit": commit(),
                "torch": torch.__version__,
                "device": "cpu" if on_cpu(device) else torch.cuda.get_device_name(),
                "threads": self.threads,
                "seconds": round(seconds, 1),
            },
            "images": json.loads((metrics / IMAGES_NAME).read_text(encoding="utf-8")),
            **curves,
        }
        target = run.result(self.results)
        write_json(target, result, indent=None)
        shutil.rmtree(folder)
        return target

    @staticmethod
    def shared_folders(run: Run) -> list[str]:
        """Name the folders that the run shares: of features, and of the GAN if it needs one."""
        root = digest(run.params["prepare"]["root"])[:8]
        kinds = ("data", "gan") if run.needs_gan else ("data",)
        return [f"{kind}-{run.digests[kind]}-{root}" for kind in kinds]

    def _missing(self, run: Run) -> list[str]:
        return [
            name for name in self.shared_folders(run) if not (self.root / name / "done").exists()
        ]

    def _check_done(self, run: Run, protocol: str) -> None:
        """Refuse to add a result to those with the same settings but other images or masks."""
        comparable = (other for other in self.runs if other.protocol == run.protocol)
        done = (other for other in comparable if other.is_done(self.results))
        for path in (other.result(self.results) for other in done):
            if json.loads(path.read_text(encoding="utf-8"))["protocol"] != protocol:
                raise DataError(
                    path,
                    "was made of other images or masks than there are now; remove it, or name"
                    " another --results",
                )

    def _make_once(
        self, name: str, run: Run, inputs: Mapping[str, Path], *commands: str
    ) -> tuple[Path, str]:
        """Run stages in a shared folder, if they have not run; other runs that need it wait.

        Returns
        -------
        tuple
            The folder, and the digest of the code that made it.
        """
        folder = (self.root / name).resolve()
        with _locked(self._lock_file(name), fcntl.LOCK_EX, stopped=self._stopped) as lock:
            if not (folder / "done").exists():
                sources = _sources()
                self._prepare_folder(name, run, inputs)
                for command in commands:
                    self._run_stage(folder, lock, command)
                (folder / "done").write_text(sources, encoding="utf-8")
                self._checked.add(name)
        return folder, (folder / "done").read_text(encoding="utf-8") or "unknown"

    def _check_images(self, folder: Path, run: Run, name: str, lock: int) -> None:
        """Refuse features that another process or an earlier study made of other images.

        Prepares the images again in folder ``name``, once a process.
        """
        if folder.name in self._checked:
            return
        with self._checking:
            if folder.name not in self._checked:
                self._compare_images(folder, run, name, lock)
                self._checked.add(folder.name)

    def _compare_images(self, folder: Path, run: Run, name: str, lock: int) -> None:
        again = self._prepare_folder(name, run, {})
        self._run_stage(again, lock, "prepare")
        before, now = (
            {"the classes": classes, **{entry.id: entry for entry in entries}}
            for entries, classes in (read_manifest(place / "dataset") for place in (folder, again))
        )
        shutil.rmtree(again)
        other = [id for id in sorted(before.keys() | now) if before.get(id) != now.get(id)]
        if other:
            more = f" and {len(other) - 1} more" if len(other) > 1 else ""
            raise DataError(
                folder,
                f"these features are of other images or masks than {run.params['prepare']['root']}"
                f" has now ({other[0]}{more}); remove {self.root} to extract them anew",
            )

    def _lock_file(self, name: str) -> Path:
        return self.root / "locks" / name  # never removed: a lock on a removed file excludes nobody

    def _prepare_folder(self, name: str, run: Run, inputs: Mapping[str, Path]) -> Path:
        """Make a folder with the run's parameters and links to its inputs, by path inside it."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        YAML().dump(run.params, folder / "params.yaml")
        for link, target in inputs.items():
            place = folder / link
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.symlink_to(target)
        return folder

    def _run_stage(self, folder: Path, lock: int, *arguments: str) -> None:
        """Run a stage with this code, wherever another version is installed.

        The stage inherits ``lock``, that of its folder.
        """
        path = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(self.threads))
        workers = str(min(self.threads, 8))  # at most as many as by default
        # Options, as the environment may name other parameters and a scratch folder of all runs.
        options = ("--params", "params.yaml", "--scratch", "scratch")
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            process = subprocess.run(
                [sys.executable, "-m", "pipeline", *arguments, *options],
                cwd=folder,
                env={"FEATUREGAN_WORKERS": workers, **os.environ, "PYTHONPATH": path, **threads},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
                pass_fds=(self.lock, lock),
            )
        if process.returncode:
            lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            reason = next((line for line in reversed(lines) if line.strip()), "no output")
            raise DataError(
                folder / "log.txt",
                f"{arguments[0]} failed with exit code {process.returncode}: {reason}",
            )


@contextmanager
def _locked(
    path: Path,
    kind: int,
    busy: DataError | None = None,
    *,
    stopped: threading.Event | None = None,
) -> Iterator[int]:
    """Lock a file, which is made where missing, until the block ends.

    Parameters
    ----------
    path
        The file.
    kind
        ``fcntl.LOCK_EX`` or ``fcntl.LOCK_SH``.
    busy
        Error to raise where another process or thread holds a lock that excludes this one;
        default: wait for it.
    stopped
        Ends the waiting.

    Yields
    ------
    int
        The file's descriptor.

    Raises
    ------
    DataError
        When the lock is held, or the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:  # NFS shares locks only on files that are open for reading
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if busy is not None:
                    raise busy from None
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                message = (
                    f"this file system has no locks ({error.strerror}); mount it with flock, or"
                    " choose another --scratch"
                )
                raise DataError(path, message) from error
            if stopped is not None and stopped.wait(1):
                raise DataError(path, "the study was stopped while this run waited; start it again")
        yield file.fileno()


def _sources() -> str:
    """Digest the code that a stage started now would run."""
    return source_digest(stages, featurestore)[:16]


def data_content(dataset: Path, stores: Mapping[str, FeatureStore]) -> list[object]:
    """List what a decoder learns from and is tested on: images, masks, classes.

    Images count by their bytes. Masks count by their pixels, as another library writes the same
    pixels to other PNG bytes. The code and file names do not count.
    """
    images = {entry.id: entry.image_sha256 for entry in read_manifest(dataset)[0]}
    content: list[object] = [list(stores["train"].spec.class_names)]
    for split, store in stores.items():
        samples = zip(store.ids, store.views, _image_names(store), strict=True)
        for position, (id, view, name) in enumerate(samples):
            mask = hashlib.sha256(store.gather("masks", [position]).tobytes()).hexdigest()
            content.append([split, id, view, images[name], mask])
    return content


def _image_names(store: FeatureStore) -> list[str]:
    """Name the image of every sample, in order."""
    return [image_name(id, store.spec.resize) for id in store.ids]


def gan_curves(live: Path) -> dict[str, list[float | None]]:
    """Read the losses and measures of a GAN by epoch, except those of single classes.

    ``live`` is the DVCLive folder of ``train-gan`` or of a decoder; of a decoder that does not
    train a GAN the result is empty.
    """
    curves = {name: curve for name, curve in read_curves(live).items() if name.startswith(OF_A_GAN)}
    table = pd.DataFrame(
        {name: curve for name, curve in curves.items() if "class_consistency" not in name}
    )
    rounded = table.round(4).astype(object).where(table.notna(), None)
    return {str(name): column.tolist() for name, column in rounded.items()}


def _settings(run: Run) -> dict[str, object]:
    """Select the parameters that a result depends on."""
    names = ("prepare", "extract", "train_decoder", *(("train_gan",) if run.needs_gan else ()))
    settings = {name: {**run.params[name]} for name in names}
    settings["prepare"].pop("root")
    return {**settings, "variant": run.params["variants"][run.variant]}
