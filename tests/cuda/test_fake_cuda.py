"""Training steps and evaluation on a GPU without values: no step waits for it.

Losses are checked, and gradients are set to zero: back-propagation needs a real device.
``test_waits.py`` runs the steps on a GPU.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import featurestore
from featurestore.dataset import Batch, FeatureLoader
from stages import train_decoder as decoder_stage
from stages import train_gan as gan_stage
from stages.augment.registry import VARIANTS as VARIANT_TYPES
from stages.commands.options import load_preset, presets
from stages.common.config import parse, read_params, with_settings
from stages.models.decoder import Decoder
from stages.segmentation.evaluation import predict
from stages.segmentation.metrics import confusion_matrices, confusion_matrix
from stages.studies.plan import StudyConfig
from stages.training.session import Session
from stages.training.update import Loss
from tests.cuda.fake import CUDA, fake_batch, fake_cuda, to_cuda
from tests.cuda.on_device import GANS, VARIANTS, Folders, specs, train_decoder, train_gan
from tests.imports import ROOT

STEPS = 2
# Keys of a variant that change no operation of a step.
SAME_STEP = ("weight", "lr", "weight_decay", "dropout", "until", "statistics")
# Their losses back-propagate inside the forward computation, which fake tensors cannot.
WITH_PENALTY = ("wasserstein-gp", "non-saturating")
# Stored layers of the presets: the finest is twice as fine as the grid of 8 x 8.
LAYERS = {
    "blocks.1": (2, 16, 16),
    "blocks.2": (3, 8, 8),
    "blocks.4": (3, 4, 4),
    "blocks.6": (4, 2, 2),
}


class StepsTaken(Exception):
    """All steps of a test were taken."""


def variants_of_studies() -> dict[str, dict[str, Any]]:
    """List the variants of params.yaml, presets and studies that differ in a step, by a name.

    Without those that train the backbone: the stores of these tests come from none.
    """
    plains = [load_preset(name).plain() for name in presets()]
    plains.append(read_params(ROOT / "params.yaml"))
    for file in sorted((ROOT / "studies").glob("*.yaml")):
        if "experiments" not in (values := read_params(file)):
            continue  # a list of images
        study = StudyConfig.model_validate(values)
        preset = load_preset(study.preset).plain()
        for experiment in study.experiments.values():
            plains.append(with_settings(preset, {**study.set, **experiment.set}))
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for plain in plains:
        for name, variant in parse(VARIANT_TYPES, plain["variants"], "variants").items():
            if variant.backbone == "trained":
                continue
            values = variant.model_dump(exclude_defaults=True, mode="json")
            decoder = plain["train_decoder"].get("decoder", "deeplab")
            values = {"decoder": decoder, "augmenter": variant.augmenter, **values}
            computed = {key: each for key, each in values.items() if key not in SAME_STEP}
            found.setdefault(json.dumps(computed, sort_keys=True), (name, values))
    return {f"{number}-{name}": values for number, (name, values) in enumerate(found.values())}


@pytest.fixture(scope="session")
def of_presets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Stores with the layers of the presets, and folders of a GAN and a flow trained on them."""
    root = tmp_path_factory.mktemp("presets")
    spec = dataclasses.replace(
        specs()["single"],
        feature_shape=(2 * 4 + 3 + 3 + 4, 8, 8),
        layer_names=tuple(LAYERS),
        layer_shapes=tuple(LAYERS.values()),
    )
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test", "unlabelled"):
        with featurestore.create(root / split, spec, fingerprint=split) as writer:
            for view in ("identity", "hflip"):
                for number in range(12):
                    labels = rng.integers(0, 3, (8, 8)).astype(np.uint8)
                    labels[0, 0] = 3 if number < 2 else 0  # a rare class
                    drawn = {name: rng.random(size, np.float32) for name, size in LAYERS.items()}
                    mask = labels.repeat(8, 0).repeat(8, 1)
                    if split == "unlabelled":
                        mask = np.full_like(mask, 255)
                    image = np.zeros((64, 64, 3), np.uint8)
                    writer.append(id=str(number), features=drawn, mask=mask, image=image, view=view)
    for family in ("gan", "flow"):
        train_gan(root, root / family, "cpu", family=family)
    return root, {family: root / family / "gan" for family in ("gan", "flow")}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Build everything on the CPU, and take the steps on the fake GPU; their numbers are listed."""
    taken: list[int] = []
    with ExitStack() as stack:
        resume_on_cpu = Session.resume

        def resume(self: Session, loader: FeatureLoader, epochs: int, **options: Any) -> None:
            resume_on_cpu(self, loader, epochs, **options)
            if "augmenter" in options["state"]:
                options["state"]["augmenter"].start_round()  # self-training has its teacher
            mode, memo = stack.enter_context(fake_cuda(monkeypatch)), {}
            for each in options["state"].values():
                to_cuda(each, mode, memo)

        def batches(self: Session, epoch: int) -> Iterator[tuple[int, Batch]]:
            for number in range(STEPS):
                positions = list(range(4))
                loader = getattr(self._loader, "labelled", self._loader)
                extra, spec = loader.extra, loader.store.spec
                more = [] if extra is None else extra.choose(epoch, number, positions)
                batch = fake_batch(spec, positions, more)
                if loader is not self._loader:
                    batch.unlabelled = fake_batch(spec, positions, [])
                yield number, batch
                taken.append(number)
            raise StepsTaken

        def set_gradients(accelerator: Accelerator, *losses: Loss) -> None:
            for loss, parameters in losses:
                if parameters:
                    assert (loss.device, loss.dtype, loss.shape) == (CUDA, torch.float32, ())
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)

        monkeypatch.setattr(Session, "resume", resume)
        monkeypatch.setattr(Session, "batches", batches)
        monkeypatch.setattr(Session, "save_if_due", lambda self, step: None)
        for stage in (decoder_stage, gan_stage):
            monkeypatch.setattr(stage, "backward", set_gradients)
        yield taken


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GANS if name not in WITH_PENALTY])
def test_no_step_of_a_generator_waits(
    folders: Folders, tmp_path: Path, steps: list[int], name: str
) -> None:
    store, settings = GANS[name]
    with pytest.raises(StepsTaken):
        train_gan(folders.stores[store], tmp_path, "cpu", mixed_precision="bf16", **settings)
    assert steps == list(range(STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_no_step_of_a_decoder_waits(
    folders: Folders, tmp_path: Path, steps: list[int], name: str
) -> None:
    features, gan, variant = folders.of(name)
    with pytest.raises(StepsTaken):
        train_decoder(features, gan, tmp_path, "cpu", variant, mixed_precision="bf16")
    assert steps == list(range(STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("variant", variants_of_studies().values(), ids=variants_of_studies())
def test_no_step_of_a_variant_of_a_study_waits(
    of_presets: tuple[Path, dict[str, Path]],
    tmp_path: Path,
    steps: list[int],
    variant: dict[str, Any],
) -> None:
    features, gans = of_presets
    families = parse(VARIANT_TYPES, {"mine": variant}, "variants")["mine"].needs_family
    gan = gans[families[0] if families else "gan"]
    with pytest.raises(StepsTaken):
        train_decoder(features, gan, tmp_path, "cpu", variant, gradient_accumulation=2)
    assert steps == list(range(STEPS))


@pytest.mark.parametrize("head", ["linear", "deeplab", "fcn", "deeplabv3plus"])
def test_no_batch_of_an_evaluation_waits(monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    """Scores are read once a split: only their counts are computed here."""
    spec, accelerator = specs()["layered"], Accelerator(cpu=True)
    decoder = Decoder(
        head=head,
        in_channels=spec.feature_shape[0],
        num_classes=spec.num_classes,
        width=8,
        atrous_rates=(2,),
        folds=spec.folds,
    ).eval()
    with fake_cuda(monkeypatch) as mode:
        to_cuda(decoder, mode, {})
        batch = fake_batch(spec, list(range(4)), [])
        predicted = predict(accelerator, decoder, batch)
        total = confusion_matrix(predicted, batch.masks, spec.num_classes)
        by_image = confusion_matrices(predicted, batch.masks, spec.num_classes)
    assert (total.device, by_image.device) == (CUDA, CUDA)
    assert by_image.shape == (4, spec.num_classes, spec.num_classes)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda x: x.sum().item(), "DataDependentOutput"),
        (lambda x: x[x > 0], "DynamicOutputShape"),
        (lambda x: x.nonzero(), "DynamicOutputShape"),
        (lambda x: x.cpu(), "the CPU waits for a copy to cpu"),
        (lambda x: torch.tensor([1.0, 2.0], device="cuda"), "the CPU waits for a copy to cuda"),
        (lambda x: x + torch.zeros(3), "two devices"),
        (lambda x: torch.rand(3, generator=torch.Generator("cuda")), "from a generator on cuda"),
    ],
)
def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch, fault: Any, error: str) -> None:
    with fake_cuda(monkeypatch), pytest.raises(Exception) as raised:  # noqa: PT011
        fault(torch.empty(3, device="cuda"))
    assert error in f"{type(raised.value).__name__} {raised.value}"
