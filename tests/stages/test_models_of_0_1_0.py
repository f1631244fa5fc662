"""Models that version 0.1.0 saved still load, and compute what they computed then.

Version 0.1.0 trained both models for one step on random features. All weights were then rounded to
a few values, so that the archive is small, and version 0.1.0 computed the expected numbers.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.training.models import load_decoder, load_gan, load_generator
from stages.use import Segmenter
from tests.imports import ROOT


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the subfolders ``decoder`` and ``gan``."""
    folder = tmp_path_factory.mktemp("models")
    shutil.unpack_archive(ROOT / "tests" / "data" / "models-0.1.0.tar.xz", folder)
    return folder / "models-0.1.0"


def test_generator(models: Path) -> None:
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 32:] = 1
    features = load_generator(models / "gan").generate(masks, z=torch.tensor([[1.0, -1.0]]))
    assert features.shape == (1, 2, 8, 8)
    torch.testing.assert_close(features[0, :, 3, 4], torch.tensor([-0.0499203317, 0.0437998921]))
    torch.testing.assert_close(features[0, :, 7, 0], torch.tensor([1.1002326012, 0.9393883944]))


def test_discriminator(models: Path) -> None:
    networks, config = load_gan(models / "gan")
    assert networks.discriminator is not None
    assert networks.discriminator.info is None  # today's option without its key is off
    assert config["training"]["adversarial_loss"] == "hinge"


def test_decoder(models: Path) -> None:
    features = torch.linspace(-1, 1, 320 * 64).view(1, 320, 8, 8)
    logits = load_decoder(models / "decoder")(features, (64, 64))
    assert logits.shape == (1, 2, 64, 64)
    torch.testing.assert_close(logits[0, :, 0, 0], torch.tensor([1.1177338362, 0.4068028331]))
    torch.testing.assert_close(logits[0, :, 40, 20], torch.tensor([1.0933219194, 0.3980663717]))


def test_decoder_behind_its_backbone(models: Path) -> None:
    segmenter = Segmenter.load(models / "decoder", device="cpu")
    assert segmenter.spec.class_names == ("belt", "paper")
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:, 20:, 0] = 200
    image[:, :, 1] = np.arange(60) * 4
    probabilities = segmenter.probabilities(image)
    assert probabilities.shape == (2, 40, 60)
    np.testing.assert_allclose(probabilities[1, 0, 0], 0.32839203, rtol=1e-4)
    np.testing.assert_allclose(probabilities[1, 30, 50], 0.3461079, rtol=1e-4)
