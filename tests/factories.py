"""What test modules share: small projects, stores, data sets, parameters, and calls of the stages.

Heavy modules (PyTorch, the stages) are imported inside functions: child processes of the tests
import this file too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

import featurestore
from featurestore import StoreSpec
from tests.imports import ROOT

if TYPE_CHECKING:
    from click.testing import Result
    from torch import Tensor

    from stages.augment.base import Labelled
    from stages.common.runtime import Machine
    from stages.extract import ExtractConfig
    from stages.prepare import PrepareConfig
    from stages.segmentation.metrics import Scores

# -- projects --------------------------------------------------------------------------------------


TINY = {
    "prepare.dataset": "folder",
    "prepare.root": "photos",
    "extract.input_size": 64,
    "extract.layers": [],
    "extract.dilate": True,
    "train_gan.frozen_epochs": 2,
    "train_gan.batch_size": 4,
    "train_gan.spade_hidden": 8,
    "train_gan.ngf": 1,
    "train_gan.ndf": 4,
    "train_gan.z_dim": 8,
    "train_gan.repeats": 1,
    "train_decoder.epochs": 2,
    "train_decoder.repeats": 1,
    "train_decoder.decoder": "deeplab",
    "train_decoder.lr": 5e-4,
    "train_decoder.lr_schedule": "constant",
    "train_decoder.batch_size": 4,
    "train_decoder.width": 8,
    "compare.gan_variants": ["featuregan-1x", "featuregan-2x"],
    "compare.seeds": [0],
    "report.umap_points": 60,
    "report.grid_samples": 3,
    "report.grid_channels": 4,
}
LAYERED = {  # of the project in which DVC has run
    "extract.layers": ["blocks.1", "blocks.2", "blocks.4", "blocks.6"],  # the quickstart's
    "extract.dilate": False,
}


def tiny_params(changes: Mapping[str, object] | None = None) -> str:
    """Return the quickstart's parameters, reduced for tests, with ``section.key`` changes."""
    from stages.commands.options import load_preset
    from stages.commands.params import PARAMS, as_yaml
    from stages.common.config import parse, with_settings

    plain = with_settings(load_preset("quickstart").plain(), {**TINY, **(changes or {})})
    return as_yaml(parse(PARAMS, plain), "# the quickstart, reduced to sizes for tests")


def flat(values: dict[str, object], before: str = "") -> dict[str, object]:
    """Nested values by their dotted keys."""
    keys: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            keys |= flat(value, f"{before}{key}.")
        else:
            keys[f"{before}{key}"] = value
    return keys


def write_photos(root: Path, counts: dict[str, int], size: int = 64) -> None:
    """Write a data set ``folder`` of drawn scenes: images/SPLIT/*.jpg, masks/SPLIT/*.png."""
    from stages.datasets import wastesim

    abundances = wastesim.read_abundances(ROOT / "data" / "wastesim")
    for split, count in counts.items():
        for number in range(count):
            image, mask = wastesim.draw_scene(
                np.random.default_rng([len(split), number]), abundances, size, (3, 5)
            )
            for folder, name, pixels in (
                ("images", f"{number}.jpg", image),
                ("masks", f"{number}.png", mask),
            ):
                path = root / folder / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    colours = (
        f"{name},{red},{green},{blue}"
        for name, (red, green, blue) in zip(
            wastesim.CLASSES.names, wastesim.CLASSES.palette, strict=True
        )
    )
    (root / "classes.csv").write_text("\n".join(["name,red,green,blue", *colours]) + "\n")


def run(
    *command: str, cwd: Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment (python, dvc, git) and return its outcome."""
    program = shutil.which(
        command[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert program is not None, f"{command[0]} is not installed"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [program, *command[1:]],
        cwd=cwd,
        text=True,
        capture_output=True,
        env={**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert not check or result.returncode == 0, (
        f"{command}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    )
    return result


def copy_project(target: Path) -> None:
    """Make a git repository of the project with tiny parameters and drawn images, not yet run."""
    target.mkdir(parents=True)
    for name in (
        "featurestore",
        "stages",
        "data",
        "notebooks",
        "pipeline.py",
        "dvc.yaml",
        ".dvcignore",
        ".gitignore",
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target / name)
    (target / "params.yaml").write_text(tiny_params(LAYERED))
    write_photos(target / "photos", {"train": 10, "val": 4, "test": 4})
    (target / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", target / ".dvc" / "config")
    run("git", "init", "-q", cwd=target)
    run("git", "config", "user.email", "test@example.org", cwd=target)
    run("git", "config", "user.name", "test", cwd=target)
    run("git", "add", "-A", cwd=target)
    run("git", "commit", "-qm", "start", cwd=target)


# -- the command line ------------------------------------------------------------------------------


def call(*arguments: str) -> Result:
    """Run ``python pipeline.py ARGUMENTS`` in this process."""
    from click.testing import CliRunner

    import pipeline

    return CliRunner().invoke(pipeline.main, arguments)


def one_line(result: Result) -> str:
    """Return the single line that a failed command printed."""
    assert not isinstance(result.exception, Exception), result.exception
    lines = [
        line
        for line in result.stderr.splitlines()
        if line and not line.startswith(("Usage:", "Try "))
    ]
    assert len(lines) == 1, result.stderr
    return lines[0]


# -- stores ----------------------------------------------------------------------------------------


SPEC = StoreSpec(
    feature_shape=(6, 4, 5),
    mask_shape=(32, 40),
    class_names=("belt", "Größe", "纸"),
    palette=((0, 0, 0), (10, 20, 30), (255, 0, 7)),
    backbone="resnet50",
    weights_digest="ab" * 32,
    output_stride=8,
    normalization_mean=(0.485, 0.456, 0.406),
    normalization_std=(0.229, 0.224, 0.225),
    resize="stretch",
    compute="fp32",
    nonnegative=True,
    has_images=True,
)


def sample(number: int, spec: StoreSpec = SPEC) -> dict:
    rng = np.random.default_rng(number)
    mask = rng.integers(0, spec.num_classes, spec.mask_shape).astype(np.uint8)
    mask[0, :3] = 255
    image = (
        rng.integers(0, 256, (*spec.mask_shape, 3)).astype(np.uint8) if spec.has_images else None
    )
    features = rng.random(spec.feature_shape).astype(spec.feature_dtype)
    return {
        "id": f"photo {number} é",
        "features": features,
        "mask": mask,
        "image": image,
        "view": "hflip" if number % 3 == 2 else "identity",
    }


def write(
    path: Path, count: int = 7, spec: StoreSpec = SPEC, **options
) -> featurestore.FeatureStore:
    with featurestore.create(path, spec, samples_per_shard=3, **options) as writer:
        for number in range(count):
            writer.append(**sample(number, spec))
    return featurestore.open(path)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def interrupted(path: Path, scratch: Path, stop_after: int, fingerprint: str = "f") -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        featurestore.create(
            path, SPEC, scratch=scratch, fingerprint=fingerprint, samples_per_shard=3
        ) as writer,
    ):
        for number in range(stop_after):
            writer.append(**sample(number))
        raise KeyboardInterrupt


# -- prepare and extract ---------------------------------------------------------------------------


SCENES = {
    "train": 2,
    "val": 1,
    "test": 1,
    "size": 64,
    "min_objects": 2,
    "max_objects": 4,
    "seed": 0,
}


def prepare_config(root: Path, **changes) -> PrepareConfig:
    from stages.prepare import PrepareConfig

    settings = {
        "dataset": "folder",
        "root": str(root),
        "split": "official",
        "ratios": [0.7, 0.15, 0.15],
        "split_seed": 0,
        "train_fraction": 1.0,
        "classes": [],
        "void_index": 255,
        "wastesim": SCENES,
    }
    return PrepareConfig(**{**settings, **changes})


def prepare(settings: PrepareConfig, tmp_path: Path, download: bool = False) -> dict:
    from stages.prepare import run as run_stage

    return run_stage(
        settings,
        out=tmp_path / "dataset",
        scratch=tmp_path / "scratch",
        workers=2,
        download=download,
    )


def extract_config(**changes) -> ExtractConfig:
    from stages.extract import ExtractConfig

    settings = {
        "backbone": "efficientnet_lite0",
        "weights": "default",
        "input_size": 64,
        "resize": "stretch",
        "views": ["identity"],
        "compute": "fp32",
        "batch_size": 2,
        "feature_dtype": "float16",
        "compression": "none",
        "store_images": True,
    }
    return ExtractConfig(**{**settings, **changes})


def extracted_photos(tmp_path: Path, counts: dict[str, int], **changes) -> Path:
    """Extract drawn photographs of 64 x 64 pixels; return the folder of the stores."""
    write_photos(tmp_path / "photos", counts)
    prepare(prepare_config(tmp_path / "photos"), tmp_path)
    extract(extract_config(**changes), tmp_path)
    return tmp_path / "features"


def extract(
    settings: ExtractConfig, tmp_path: Path, *, workers: int = 0, out: str = "features"
) -> dict[str, featurestore.FeatureStore]:
    from stages import extract as stage

    return stage.run(
        settings,
        dataset=tmp_path / "dataset",
        out=tmp_path / out,
        scratch=tmp_path / "scratch",
        device="cpu",
        workers=workers,
    )


def digests(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.*"))
    }


# -- a miniature of Pascal VOC ---------------------------------------------------------------------


SIDE = 64  # pixels: what extract resizes to, so that its masks are those of prepare


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def photo(path: Path) -> None:
    """Write an image whose pixels depend on the file name."""
    save(
        path,
        np.random.default_rng(list(path.name.encode()))
        .integers(0, 256, (SIDE, SIDE, 3))
        .astype(np.uint8),
    )


def stripes(*values: int | tuple[int, int, int]) -> np.ndarray:
    """Return a mask of equally high stripes: (SIDE, SIDE), or (SIDE, SIDE, 3) from RGB values."""
    rows = np.array(values, np.uint8)[np.arange(SIDE) * len(values) // SIDE]
    return np.repeat(rows[:, None], SIDE, axis=1)


def save_sbd(path: Path, mask: np.ndarray) -> None:
    fields = {
        "Boundaries": np.zeros((20, 1)),
        "Segmentation": mask,
        "CategoriesPresent": np.unique(mask[mask > 0]),
    }
    from scipy.io import savemat

    savemat(path, {"GTcls": fields})


def make_voc(root: Path) -> None:
    """Write VOC with 2 training and 2 validation images, and SBD with these four and two more."""
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, ids in (
        ("train", ["a", "b"]),
        ("val", ["c", "d"]),
        ("trainval", ["a", "b", "c", "d"]),
    ):
        (lists / f"{name}.txt").write_text("\n".join(ids) + "\n")
        for id in ids:
            photo(root / "JPEGImages" / f"{id}.jpg")
            save(root / "SegmentationClass" / f"{id}.png", stripes(0, 1, 255))
    sbd = root / "benchmark_RELEASE" / "dataset"
    for folder in ("cls", "img"):
        (sbd / folder).mkdir(parents=True)
    (sbd / "train.txt").write_text("a\nc\ne\n")
    (sbd / "val.txt").write_text("b\nd\nf\n")
    for id in "abcdef":
        photo(sbd / "img" / f"{id}.jpg")
        save_sbd(sbd / "cls" / f"{id}.mat", stripes(0, 20, 7))


# -- training --------------------------------------------------------------------------------------


GAN = {
    "family": "gan",
    "flow_components": 6,
    "flow_width": 8,
    "flow_steps": 4,
    "frozen_epochs": 3,
    "repeats": 1,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "z_dim": 6,
    "noise": "vector",
    "prior": "none",
    "ngf": 1,
    "spade_hidden": 8,
    "norm": "batch",
    "ndf": 4,
    "discriminator_layers": 3,
    "discriminator_scales": 1,
    "projection_channels": 0,
    "image_encoder": False,
    "nef": 2,
    "init_gain": 0.02,
    "feature_scale": "channel",
    "adversarial_loss": "hinge",
    "lambda_feat": 7.0,
    "lambda_kld": 0.05,
    "lambda_rec": 0.0,
    "r1_gamma": 0.0,
    "diffaugment": [],
    "ema_decay": 0.0,
    "generator_lr": 2e-4,
    "discriminator_lr": 8e-4,
    "betas": [0.0, 0.9],
    "mixed_precision": "no",
    "seed": 0,
}


# A generator of images reads no key of a flow.
IMAGE_GAN = {"family": "image", "flow_components": 64, "flow_width": 64, "flow_steps": 16}


DECODER = {
    "epochs": 3,
    "repeats": 1,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "decoder": "deeplab",
    "width": 8,
    "atrous_rates": [2, 3],
    "lr": 5e-3,
    "lr_schedule": "constant",
    "betas": [0.9, 0.999],
    "mixed_precision": "no",
}


MONITOR = {
    "every": 2,
    "samples": 4,
    "vectors": 200,
    "patience": 0,
    "on_collapse": "warn",
    "min_variance_ratio": 0.0,
    "min_coverage": 0.0,
    "min_consistency": 0.0,
    "max_frechet": 1e9,
    "max_accuracy": 1.0,
}


VARIANTS = {
    "baseline": {"augmenter": "none"},
    "featuregan-1x": {"augmenter": "featuregan"},
    "featuregan-2x": {"augmenter": "featuregan", "ratio": 2},
    "frozen": {"augmenter": "featuregan", "generator": "frozen"},
    "new-masks": {
        "augmenter": "featuregan",
        "generator": "frozen",
        "new_masks": ["flip", "paste"],
        "augment": ["flip", "cutout"],
    },
    "edited": {
        "augmenter": "featuregan",
        "generator": "frozen",
        "new_masks": ["swap"],
        "class_swap": True,
    },
    "isda": {"augmenter": "isda"},
    "cvae": {"augmenter": "cvae", "fit_steps": 5},
    "mixup": {"augmenter": "mixup", "augment": ["translation"]},
    "upsample": {"augmenter": "upsample"},
    "combined": {
        "augmenter": "combined",
        "of": [
            {"augmenter": "isda"},
            {"augmenter": "featuregan", "generator": "frozen"},
            {"augmenter": "noise"},
        ],
        "augment": ["flip"],
    },
}


def cpu_machine(root: Path, workers: int = 0) -> Machine:
    """Describe a CPU that saves the state of a training after every step."""
    from stages.common.runtime import Machine

    return Machine(device="cpu", workers=workers, checkpoint_minutes=0, scratch=root / "scratch")


def run_gan(
    features: Path,
    root: Path,
    monitor: dict | None = None,
    *,
    backbone_weights: str = "default",
    **changes,
) -> dict[str, float]:
    from stages import train_gan
    from stages.gan.monitor import MonitorConfig

    return train_gan.run(
        train_gan.TrainGanConfig(**{**GAN, **changes}),
        MonitorConfig(**{**MONITOR, **(monitor or {})}),
        features=features,
        out=root / "gan",
        metrics=root / "metrics" / "train-gan",
        logs=root / "logs",
        machine=cpu_machine(root),
        backbone_weights=backbone_weights,
    )


def run_decoder(
    features: Path,
    root: Path,
    variant: dict,
    *,
    name: str,
    seed: int = 0,
    workers: int = 0,
    monitor: dict | None = None,
    **changes,
) -> Scores:
    from pydantic import TypeAdapter

    from stages import train_decoder
    from stages.augment.registry import Variant
    from stages.gan.monitor import MonitorConfig

    return train_decoder.run(
        train_decoder.TrainDecoderConfig(**{**DECODER, **changes}),
        TypeAdapter(Variant).validate_python(variant),
        MonitorConfig(**{**MONITOR, **(monitor or {})}),
        name=name,
        seed=seed,
        features=features,
        gan=root / "gan",
        out=root / "decoders" / f"{name}-{seed}",
        metrics=root / "metrics" / f"{name}-{seed}",
        logs=root / "logs",
        machine=cpu_machine(root, workers),
    )


def write_curve(live: Path, name: str, values: Sequence[float]) -> None:
    """Write a curve into a folder, as DVCLive does."""
    file = live / "plots" / "metrics" / f"{name}.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{step}\t{value}" for step, value in enumerate(values)]
    file.write_text("\n".join([f"step\t{file.stem}", *rows]) + "\n")


def with_gan(trained: Path, root: Path) -> Path:
    shutil.copytree(trained / "gan", root / "gan")
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def stop_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Raise KeyboardInterrupt right after ``saves`` saved states; a state is saved every step."""
    from stages.training.checkpoint import Checkpoint

    saved = []
    save = Checkpoint.save

    def dying(self: Checkpoint, **state) -> None:
        save(self, **state)
        saved.append(1)
        if len(saved) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", dying)


def added_by_a_frozen_generator(
    features: Path, folder: Path, changes: Sequence[str], **described
) -> tuple[list[Labelled], Tensor, Tensor, Tensor, Tensor]:
    """Augment a batch of three with a frozen generator, twice a mask by default.

    Returns the added batches, the real features, their masks, the masks asked for, and the noise.
    """
    import torch
    from pydantic import TypeAdapter

    from featurestore.dataset import Batch
    from stages.augment.base import Context
    from stages.augment.new_masks import NewMasks
    from stages.augment.registry import Variant, build_augmenter
    from stages.common.runtime import make_accelerator
    from stages.models.decoder import Decoder
    from stages.training.models import load_generator

    store = featurestore.open(features / "train")
    variant = {
        "augmenter": "featuregan",
        "generator": "frozen",
        "new_masks": changes,
        "ratio": 2,
        **described,
    }
    ratio = variant["ratio"]
    decoder = Decoder(head="deeplab", in_channels=12, num_classes=3, width=8, atrous_rates=(2, 3))
    context = Context(
        "mine",
        make_accelerator("cpu", "no"),
        store,
        decoder,
        folder / "gan",
        0,
        1,
        cpu_machine(folder),
    )
    augmenter = build_augmenter(TypeAdapter(Variant).validate_python(variant), context)
    real, masks = (
        torch.from_numpy(store.gather(name, [0, 1, 2])).clone() for name in ("features", "masks")
    )
    parts = augmenter.augment(
        Batch(torch.arange(3), real, masks, None), torch.Generator().manual_seed(3)
    ).batches
    rng = torch.Generator().manual_seed(3)
    share = described.get("fraction", 1.0)
    wanted = (
        NewMasks(changes, store, np.arange(len(store)), share)(masks, rng) if changes else masks
    )
    z = torch.randn(ratio * 3, load_generator(folder / "gan").z_dim, generator=rng)
    assert len(parts) == ratio
    assert torch.equal(wanted, masks) != bool(changes)
    assert all(torch.equal(part.targets[0][0], wanted) for part in parts)
    return parts, real, masks, wanted, z
