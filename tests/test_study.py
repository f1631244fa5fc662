"""A study writes one result file a run, resumes, and shares features and GANs between runs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pydantic import TypeAdapter

import featurestore
import pipeline
from stages.commands.options import load_preset
from stages.commands.params import PARAMS
from stages.common.config import parse, read_params, with_settings
from stages.common.errors import ConfigError, DataError
from stages.data.manifest import SPLITS, Entry, write_manifest
from stages.studies.plan import Run, StudyConfig, plan
from stages.studies.runner import Runner, data_content
from tests.factories import SPEC, flat, run, write_curve, write_photos
from tests.imports import ROOT

STUDY = """
preset: quickstart
set:
  prepare.dataset: folder
  extract.input_size: 64
  train_gan.frozen_epochs: 1
  train_gan.ngf: 1
  train_gan.spade_hidden: 8
  train_gan.ndf: 4
  train_gan.z_dim: 8
  train_gan.batch_size: 4
  train_decoder.epochs: 1
  train_decoder.batch_size: 4
  train_decoder.width: 8
  monitor.every: 0
seeds: [0, 1]
gan: once
experiments:
  all:
    seeds: [0]
    variants: [baseline, featuregan-frozen]
  half:
    set: {prepare.train_fraction: 0.5}
    seeds: [0]
    variants: {plain: baseline}
"""


STUDIES = sorted((ROOT / "studies").glob("*.yaml"))
PLANNED = json.loads((ROOT / "tests/data/studies.json").read_text())


def runs_of(file: Path, **overrides: object) -> list[Run]:
    """Plan a study file."""
    config = parse(TypeAdapter(StudyConfig), read_params(file), "study")
    return plan(config, load_preset(config.preset).plain(), overrides, partial(parse, PARAMS))


def planned(text: str, tmp_path: Path, **overrides: object) -> list[Run]:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    return runs_of(file, **overrides)


ARGUMENTS = ["study", "tiny.yaml", "--set", "prepare.root=photos", "--jobs", "2"]


def study_folder(folder: Path) -> Path:
    """Write a small study and its images."""
    write_photos(folder / "photos", {"train": 8, "val": 4, "test": 4})
    (folder / "tiny.yaml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Run the small study; return its folder, which one test changes, and its result files."""
    folder = study_folder(tmp_path_factory.mktemp("study"))
    (folder / "other.yaml").write_text("")
    command = (sys.executable, "-m", "pipeline", *ARGUMENTS)
    run(
        *command, cwd=folder, PYTHONPATH=str(ROOT), FEATUREGAN_PARAMS=str(folder / "other.yaml")
    )  # is not read by runs
    return folder, result_files(folder / "results" / "tiny")


def result_files(results: Path) -> dict[str, bytes]:
    return {
        path.relative_to(results).as_posix(): path.read_bytes() for path in results.rglob("*.json")
    }


@pytest.mark.slow
def test_listed_commands_write_the_results_of_the_study_side_by_side(
    finished: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    folder = study_folder(tmp_path)
    listing = (sys.executable, "-m", "pipeline", *ARGUMENTS, "--results=listed", "--list")
    commands = run(*listing, cwd=folder, PYTHONPATH=str(ROOT)).stdout.splitlines()
    assert len(commands) == 3
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    started = [  # two share features that neither has, and the last one the first one's experiment
        subprocess.Popen(["sh", "-c", command], cwd=folder, env=environment)
        for command in reversed(commands)
    ]
    assert [process.wait() for process in started] == [0, 0, 0]
    expected, found = finished[1], result_files(folder / "listed" / "tiny")
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        one, other = json.loads(content), json.loads(found[name])
        for result in (one, other):
            result["made_with"].pop("seconds")
        assert one == other
    assert run(*listing, cwd=folder, PYTHONPATH=str(ROOT)).stdout == ""
    logs = (folder / "scratch" / "study").glob("data-*/log.txt")
    extracted = [log.read_text().count("features/train: 8 samples") for log in logs]
    assert sum(extracted) == 1  # of the two runs with all images, one


@pytest.mark.slow
def test_a_study_resumes_from_its_result_files(
    finished: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path, files), arguments = finished, ARGUMENTS
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results" / "tiny"
    assert set(files) == {
        "all/baseline-0.json",
        "all/featuregan-frozen-0.json",
        "half/plain-0.json",
    }
    full, half = (json.loads(files[name]) for name in ("all/baseline-0.json", "half/plain-0.json"))
    assert (full["train_images"], half["train_images"]) == (8, 4)
    assert len(full["images"]) == 4
    assert (
        json.loads(files["all/featuregan-frozen-0.json"])["protocol"]
        == full["protocol"]
        != half["protocol"]
    )
    assert len(json.loads(files["all/featuregan-frozen-0.json"])["gan"]["discriminator/real"]) == 1
    assert "gan" not in full
    for name, kinds in (
        ("baseline", ["features_sources"]),
        ("featuregan-frozen", ["features_sources", "gan_sources"]),
    ):
        made_with = json.loads(files[f"all/{name}-0.json"])["made_with"]
        assert sorted(key for key in made_with if key.endswith("_sources")) == kinds
        assert {made_with[kind] for kind in kinds} == {made_with["sources"]}
        assert (
            made_with["commit"].removesuffix("-dirty")
            == run("git", "rev-parse", "HEAD", cwd=ROOT, check=False).stdout.strip()
        )
    assert (
        str(tmp_path) not in files["all/baseline-0.json"].decode()
    )  # any machine can go on from it
    working = {path.name.split("-")[0] for path in (tmp_path / "scratch" / "study").iterdir()}
    assert working == {"data", "gan", "lock", "locks"}  # the runs' own folders are gone

    here = CliRunner()  # spares the study, not its stages, a process of its own
    (results / "half" / "plain-0.json").unlink()
    assert "3 runs, 2 done" in here.invoke(pipeline.main, arguments).output
    again = json.loads((results / "half" / "plain-0.json").read_text())
    assert {**again, "made_with": half["made_with"]} == half  # the same run, to the last digit
    assert (results / "all" / "baseline-0.json").read_bytes() == files["all/baseline-0.json"]

    (results / "half" / "plain-0.json").unlink()
    assert (
        "2 runs, 2 done" in here.invoke(pipeline.main, [*arguments, "--experiment", "all"]).output
    )
    unknown = here.invoke(pipeline.main, [*arguments, "--experiment", "quarter"])
    assert "there is no experiment 'quarter'; choose from all, half" in unknown.output
    (results / "half" / "plain-0.json").write_bytes(files["half/plain-0.json"])

    table = here.invoke(pipeline.main, ["compare", "results"]).output
    assert "all: 8 training images" in table
    assert "featuregan-frozen" in table

    mask = tmp_path / "photos" / "masks" / "train" / "0.png"
    Image.fromarray(1 - np.asarray(Image.open(mask)).clip(0, 1)).save(mask)  # somebody corrects it
    (results / "half" / "plain-0.json").unlink()
    (results / "all" / "featuregan-frozen-0.json").unlink()
    refused = here.invoke(pipeline.main, arguments)
    assert "are of other images or masks than" in refused.stderr
    assert "has now (train/0); remove" in refused.stderr
    assert not (results / "half" / "plain-0.json").exists()
    refused = here.invoke(
        pipeline.main, [*arguments, "--experiment", "all", "--scratch", "another"]
    )
    assert "baseline-0.json: was made of other images or masks than there are now" in refused.output
    assert "1 of 1 runs failed" in refused.output

    (tmp_path / "photos" / "images" / "train" / "0.jpg").write_bytes(b"")
    (tmp_path / "tiny.yaml").write_text(STUDY.replace("input_size: 64", "input_size: 96"))
    refused = here.invoke(pipeline.main, arguments)
    assert refused.exit_code == 2
    assert "was made with other settings" in refused.output
    failed = here.invoke(pipeline.main, [*arguments, "--force"])
    assert failed.exit_code == 1
    assert "3 of 3 runs failed" in failed.stderr  # each is tried
    assert "prepare failed with exit code 1" in failed.stderr


@pytest.mark.medium
def test_stages_run_the_code_of_the_study_not_the_installed_one(tmp_path: Path) -> None:
    for name in ("featurestore", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pipeline.py", tmp_path)
    with (tmp_path / "stages" / "prepare.py").open("a") as code:
        code.write('\n\ndef run(*_, **__):\n    raise ConfigError("prepare", "this is the copy")\n')
    write_photos(tmp_path / "photos", {"train": 8, "val": 4, "test": 4})
    (tmp_path / "tiny.yaml").write_text(STUDY)
    command = (
        sys.executable,
        "-m",
        "pipeline",
        "study",
        "tiny.yaml",
        "--set",
        "prepare.root=photos",
        "--experiment",
        "half",
    )
    failed = run(*command, cwd=tmp_path, check=False, PYTHONPATH=".")
    assert failed.returncode == 1
    assert "this is the copy" in failed.stderr


def test_runs_are_ordered_by_seed_and_share_digests(tmp_path: Path) -> None:
    text = STUDY.replace("    seeds: [0]\n", "")
    runs = planned(text, tmp_path)
    assert [run.seed for run in runs] == [0, 0, 0, 1, 1, 1]
    by_row = {(run.experiment, run.label, run.seed): run for run in runs}
    assert len({run.digests["run"] for run in runs}) == 6
    assert by_row["all", "baseline", 0].protocol == by_row["all", "featuregan-frozen", 1].protocol
    assert by_row["all", "baseline", 0].protocol != by_row["half", "plain", 0].protocol
    assert (
        by_row["all", "featuregan-frozen", 0].digests["gan"]
        == by_row["all", "featuregan-frozen", 1].digests["gan"]
    )
    each = planned(text.replace("gan: once", "gan: per-seed"), tmp_path)
    assert len({run.digests["gan"] for run in each if run.needs_gan}) == 2
    assert {run.params["train_gan"]["seed"] for run in each} == {0, 1}
    # The folder of the data changes no digest; GAN settings change those of runs with a GAN.
    elsewhere = planned(text, tmp_path, **{"prepare.root": "elsewhere"})
    assert [run.digests for run in elsewhere] == [run.digests for run in runs]
    # Mask values are positions in the list of classes.
    names = [{"belt": [0, 0, 0]}, {"can": [9, 9, 9]}]
    orders = [
        planned(text, tmp_path, **{"prepare.classes": classes}) for classes in (names, names[::-1])
    ]
    assert orders[0][0].digests["data"] != orders[1][0].digests["data"]
    with pytest.raises(ConfigError, match="prepare.classes: must be a list"):
        planned(text, tmp_path, **{"prepare.classes": {"belt": [0, 0, 0]}})
    with pytest.raises(ConfigError, match="a class of classes is listed twice"):
        planned(text, tmp_path, **{"prepare.classes": [names[0], names[0]]})
    other_gan = planned(text, tmp_path, **{"train_gan.lambda_feat": 1.0})
    changed = {
        run.variant
        for run, before in zip(other_gan, runs, strict=True)
        if run.digests["run"] != before.digests["run"]
    }
    assert changed == {"featuregan-frozen"}


def test_results_of_other_settings_are_missing_and_damaged_ones_are_errors(
    tmp_path: Path,
) -> None:
    first = planned(STUDY, tmp_path)[0]
    path = first.result(tmp_path)
    assert not first.is_done(tmp_path)
    path.parent.mkdir()
    path.write_text('{"digest": "of other settings"}')
    assert not first.is_done(tmp_path)
    path.write_text(json.dumps({"digest": first.digests["run"]}))
    assert first.is_done(tmp_path)
    path.write_text("[]")
    with pytest.raises(DataError, match="is no result of a study"):
        first.is_done(tmp_path)


@pytest.mark.parametrize("study", PLANNED)
def test_a_study_plans_the_runs_that_it_planned_before(study: str) -> None:
    """The snapshot was taken when presets described all variants; newer studies are not in it."""
    kept, file = PLANNED[study], ROOT / "studies" / f"{study}.yaml"
    preset = flat(load_preset(read_params(file)["preset"]).plain())
    expected = {
        (experiment, label, seed): (changes["changes"], kept["variants"][number])
        for experiment, changes in kept["experiments"].items()
        for label, number in changes["variants"].items()
        for seed in changes["seeds"]
    }
    found = {}
    for each in runs_of(file):
        params = parse(PARAMS, each.params)
        sections = params.model_dump(mode="json", exclude={"variants", "compare", "report"})
        del sections["prepare"]["root"]
        changes = {key: value for key, value in flat(sections).items() if value != preset[key]}
        variant = params.variants[each.variant]
        found[each.experiment, each.label, each.seed] = (
            changes,
            variant.model_dump(mode="json", exclude_none=True),
        )
    assert found == expected


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_committed_result_counts_as_done(file: Path) -> None:
    folder = ROOT / "results" / file.stem
    done = {each.result(folder) for each in runs_of(file) if each.is_done(folder)}
    assert done == set(folder.rglob("*.json"))


def test_committed_results_pair_where_their_settings_do() -> None:
    """Data are those of the settings, so each protocol of a plan is one protocol of files."""
    pairs, files = set(), 0
    for file in STUDIES:
        folder = ROOT / "results" / file.stem
        for each in runs_of(file):
            if (path := each.result(folder)).exists():
                pairs.add((each.protocol, json.loads(path.read_text())["protocol"]))
                files += 1
    assert files == len(list((ROOT / "results").rglob("*.json")))
    assert len(pairs) == len({planned for planned, _ in pairs}) == len({kept for _, kept in pairs})
    assert len(pairs) > 8


def test_a_later_key_with_a_default_changes_no_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = planned(STUDY, tmp_path)[0]
    explicit = {"train_gan.r1_gamma": 0.0, "train_decoder.class_weight_cap": 1.0}
    assert planned(STUDY, tmp_path, **explicit)[0].digests == before.digests
    changed = planned(STUDY, tmp_path, **{"train_decoder.class_weight_cap": 5.0})[0]
    assert changed.digests["run"] != before.digests["run"]
    assert changed.digests["data"] == before.digests["data"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("train_gan.ngf: 1", "train_gan.nfg: 1", "train_gan.nfg: there is no such parameter"),
        ("train_gan.ngf: 1", "train_gan.ngf: 0", "train_gan.ngf: input should be greater"),
        (
            "variants: [baseline, featuregan-frozen]",
            "variants: [baseline, featuregan-9x]",
            "'featuregan-9x' is not described",
        ),
        (
            "variants: [baseline, featuregan-frozen]",
            "variants: [baseline, {x: y}]",
            "a list holds names of variants",
        ),
        (
            "    set: {prepare.train_fraction: 0.5}\n",
            "",
            "'baseline' with seed 0 is the same run as another experiment's",
        ),
        ("extract.input_size: 64", "extract.weights: none.pth", "there is no file none.pth"),
        ("gan: once", "gan: twice", "study.gan"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "study.seeds: 0 is listed twice"),
        ("gan: once", "gan: once\nruns: 3", "study.runs: unknown key"),
    ],
)
def test_mistakes_in_a_study_are_found_before_it_runs(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        planned(STUDY.replace(before, after), tmp_path)


def store_of(path: Path, seed: int, label: int) -> featurestore.FeatureStore:
    """Two samples, with random features and one label."""
    rng = np.random.default_rng(seed)
    spec = replace(SPEC, has_images=False)
    with featurestore.create(path, spec, fingerprint=f"sources {seed}", overwrite=True) as writer:
        for number in range(2):
            features = rng.random(spec.feature_shape).astype(np.float16)
            writer.append(
                id=f"{path.name} {number}",
                features=features,
                mask=np.full(spec.mask_shape, label, np.uint8),
            )
    return featurestore.open(path)


def test_the_protocol_depends_on_images_and_masks_not_on_features(
    tmp_path: Path,
) -> None:
    entries = [
        Entry(f"{split} {number}", "0.jpg", "0.png", split, 9, 9, "ab", "cd")
        for split in SPLITS
        for number in range(2)
    ]
    write_manifest(
        tmp_path,
        entries,
        {"classes": list(SPEC.class_names), "palette": SPEC.palette, "void_index": 255},
    )
    stores = {split: store_of(tmp_path / split, seed=0, label=1) for split in SPLITS}
    before = data_content(tmp_path, stores)
    stores["train"] = store_of(tmp_path / "train", seed=1, label=1)
    assert data_content(tmp_path, stores) == before
    assert (
        data_content(tmp_path, {**stores, "test": store_of(tmp_path / "test", seed=0, label=2)})
        != before
    )
    entries[-1] = replace(entries[-1], image_sha256="ef")
    write_manifest(
        tmp_path,
        entries,
        {"classes": list(SPEC.class_names), "palette": SPEC.palette, "void_index": 255},
    )
    assert data_content(tmp_path, stores) != before


class Recorded(Runner):
    """Stages that write what the result file of a run is made of, without a training."""

    def _run_stage(self, folder: Path, lock: int, *arguments: str) -> None:
        stage = arguments[0]
        if stage == "prepare":
            entries = [
                Entry(f"{split} {number}", "0.jpg", "0.png", split, 9, 9, "ab", "cd")
                for split in SPLITS
                for number in range(2)
            ]
            classes = {"classes": [*SPEC.class_names], "palette": SPEC.palette, "void_index": 255}
            (folder / "dataset").mkdir()
            write_manifest(folder / "dataset", entries, classes)
        elif stage == "extract":
            for split in SPLITS:
                store_of(folder / "features" / split, seed=0, label=1)
        elif stage == "train-gan":
            write_curve(folder / "metrics" / "train-gan", "generator/adversarial", [3.0, 2.0])
        else:
            variant, seed = arguments[2], arguments[4]
            metrics = folder / "metrics" / f"{variant}-{seed}"
            curves = ["val/miou"]
            if variant == "featuregan-1x":  # it trains the GAN further
                curves += ["generator/adversarial", "monitor/class_consistency/belt"]
            for name in curves:
                write_curve(metrics, name, [1.0, 0.5])
            for name in ("test.json", "images.json"):
                (metrics / name).write_text("{}")


def test_a_result_has_the_joint_phase_of_the_gan_that_its_decoder_trained(tmp_path: Path) -> None:
    rows = "variants: [baseline, featuregan-frozen, featuregan-1x]"
    text = STUDY.replace("variants: [baseline, featuregan-frozen]", rows)
    runs = [run for run in planned(text, tmp_path) if run.experiment == "all"]
    with Recorded.open(tmp_path / "work", tmp_path / "results", 1, runs) as runner:
        found = {run.label: json.loads(runner.run(run).read_text()) for run in runs}
    gan, joint = ({"generator/adversarial": losses} for losses in ([3.0, 2.0], [1.0, 0.5]))
    kept = {
        label: {key: result[key] for key in ("gan", "gan_joint") if key in result}
        for label, result in found.items()
    }
    assert kept == {
        "baseline": {},
        "featuregan-frozen": {"gan": gan},
        "featuregan-1x": {"gan": gan, "gan_joint": joint},
    }


def test_runs_that_need_no_gan_go_before_those_that_wait_for_one(tmp_path: Path) -> None:
    rows = "variants: {a: featuregan-frozen, b: featuregan-1x, c: baseline}"
    runs = planned(STUDY.replace("variants: [baseline, featuregan-frozen]", rows), tmp_path)
    gan, started, others = Runner.shared_folders(runs[0])[1], [], threading.Semaphore(0)
    for folder in {Runner.shared_folders(each)[0] for each in runs}:  # features are there
        (tmp_path / "work" / folder).mkdir(parents=True)
        (tmp_path / "work" / folder / "done").touch()

    class Recording(Runner):
        def run(self, run):
            started.append(run.label)
            if run.label == "a":  # its GAN takes as long as two runs without one
                others.acquire(), others.acquire()
                (self.root / gan).mkdir()
                (self.root / gan / "done").touch()
            elif not run.needs_gan:
                others.release()
            return self.root

    with Recording.open(tmp_path / "work", tmp_path / "results", 1) as runner:
        assert [future.result() for future in runner.run_all(runs, 2)] == [runner.root] * 4
    assert started == ["a", "c", "plain", "b"]


def test_parallel_runs_divide_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a SLURM job or a container, not the machine's."""
    (tmp_path / "study.yaml").write_text(STUDY)
    command = [
        "study",
        str(tmp_path / "study.yaml"),
        "--set",
        "prepare.root=photos",
        "--results",
        str(tmp_path),
        "--scratch",
        str(tmp_path),
    ]
    found: list[int] = []

    def opened(work: Path, results: Path, threads: int, *_: object, **__: object) -> Runner:
        found.append(threads)
        raise DataError(work, "enough")

    monkeypatch.setattr(Runner, "open", opened)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    for jobs in ("1", "2", "8"):
        assert CliRunner().invoke(pipeline.main, [*command, "--jobs", jobs]).exit_code == 1
    assert found == [6, 3, 1]


def test_two_studies_cannot_share_a_scratch_folder(tmp_path: Path) -> None:
    with (
        Runner.open(tmp_path, tmp_path / "results", 1),
        pytest.raises(DataError, match="another study works here"),
        Runner.open(tmp_path, tmp_path / "results", 1),
    ):
        pass
    with Runner.open(tmp_path, tmp_path / "results", 1):
        pass


def test_single_runs_share_a_scratch_folder_but_not_with_a_study(tmp_path: Path) -> None:
    arguments = (tmp_path, tmp_path / "results", 1)
    with (
        Runner.open(*arguments, shared=True),
        Runner.open(*arguments, shared=True),
        pytest.raises(DataError, match="another study works here"),
        Runner.open(*arguments),
    ):
        pass
    with (
        Runner.open(*arguments),
        pytest.raises(DataError, match="another study works here"),
        Runner.open(*arguments, shared=True),
    ):
        pass


def test_of_several_processes_one_makes_a_shared_folder_and_the_others_wait(
    tmp_path: Path,
) -> None:
    """File locks belong to open files, so two runners of one process exclude each other, too."""
    planned_run, made, started = planned(STUDY, tmp_path)[0], [], threading.Event()

    class Recording(Runner):
        def _run_stage(self, folder: Path, lock: int, *arguments: str) -> None:
            made.append(arguments[0])
            started.set()
            time.sleep(0.1)  # a second one would start meanwhile

    def make(runner: Runner) -> Path:
        return runner._make_once("data-0", planned_run, {}, "prepare", "extract")[0]

    arguments = (tmp_path / "work", tmp_path / "results", 1)
    with (
        Recording.open(*arguments, shared=True) as one,
        Recording.open(*arguments, shared=True) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(make, one)
        assert started.wait(10)
        second = pool.submit(make, other)
        assert first.result() == second.result() == (tmp_path / "work" / "data-0").resolve()
    assert made == ["prepare", "extract"]


def test_one_run_is_made_by_one_process_only(tmp_path: Path) -> None:
    planned_run = planned(STUDY, tmp_path)[0]

    class Nested(Runner):
        def _run(self, run: Run, name: str, lock: int) -> Path:
            with (
                Runner.open(*arguments, shared=True) as other,
                pytest.raises(DataError, match="another command makes this run"),
            ):
                other.run(run)
            return self.root

    arguments = (tmp_path / "work", tmp_path / "results", 1)
    with Nested.open(*arguments, shared=True) as runner:
        assert runner.run(planned_run) == runner.root


def test_a_list_has_a_complete_command_for_each_run_that_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my study.yaml").write_text(STUDY)
    options = ["--set", "prepare.root=my photos", "--set", "extract.views=[identity, hflip]"]
    options += ["--results", "my results", "--scratch", "/tmp/my scratch", "--jobs", "3"]
    command = ["study", "my study.yaml", *options]
    listed = CliRunner().invoke(pipeline.main, [*command, "--list"])
    assert listed.stderr == "my study.yaml: 3 runs, 0 done\n"
    words = [shlex.split(line) for line in listed.stdout.splitlines()]
    runs = ["all/baseline-0", "all/featuregan-frozen-0", "half/plain-0"]
    for found, name in zip(words, runs, strict=True):
        assert found[:4] == [sys.executable, str(ROOT / "pipeline.py"), "study", "my study.yaml"]
        assert found[4:] == [
            f"--run={name}",
            "--results=my results",
            "--scratch=/tmp/my scratch",
            "--jobs=3",
            "--set=prepare.root=my photos",
            "--set=extract.views=[identity, hflip]",
        ]
    first = planned(STUDY, tmp_path, **{"extract.views": ["identity", "hflip"]})[0]
    path = first.result(tmp_path / "my results" / "my study")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"digest": first.digests["run"]}))
    rest = CliRunner().invoke(pipeline.main, [*command, "--list"]).stdout
    assert rest == "".join(listed.stdout.splitlines(keepends=True)[1:])
    only = CliRunner().invoke(pipeline.main, [*command, "--run", "half/plain-0", "--list"]).stdout
    assert only.splitlines() == listed.stdout.splitlines()[2:]
    done = CliRunner().invoke(pipeline.main, [*command, "--run", "all/baseline-0"])
    assert (done.exit_code, done.stdout) == (0, "my study.yaml: 1 runs, 1 done\n")

    path.write_text('{"digest": "of other settings"}')
    refused = CliRunner().invoke(pipeline.main, [*command, "--list"])
    assert refused.exit_code == 2
    assert "was made with other settings" in refused.stderr
    forced = CliRunner().invoke(pipeline.main, [*command, "--force", "--list"]).stdout.splitlines()
    assert len(forced) == 3
    assert all(line.endswith(" --force") for line in forced)
    unknown = CliRunner().invoke(pipeline.main, [*command, "--run", "half/plain-1"])
    assert "there is no run 'half/plain-1'; choose from all/baseline-0, all/f" in unknown.stderr


def test_with_settings_changes_a_copy() -> None:
    params = {"a": {"b": 1, "c": 2}, "variants": {}}
    changed = with_settings(params, {"a.b": 5, "variants.new": {"augmenter": "none"}})
    assert changed == {"a": {"b": 5, "c": 2}, "variants": {"new": {"augmenter": "none"}}}
    assert params["a"]["b"] == 1
