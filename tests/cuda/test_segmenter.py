"""A decoder in use scores as `evaluate` does on stored features, on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import featurestore
from stages.segmentation.metrics import confusion_matrix, score
from stages.use import Segmenter, evaluate
from tests.factories import LAYERED, call, tiny_params, write_photos

pytestmark = [pytest.mark.cuda, pytest.mark.slow]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_decoder.mixed_precision": "bf16"},
        {"train_decoder.backbone": "trained"},
        {**LAYERED, "train_decoder.decoder": "deeplabv3plus", "extract.compute": "bf16"},
    ],
    ids=["last layer", "bf16", "trained backbone", "layers"],
)
def test_the_segmenter_scores_as_evaluate_does(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(tiny_params(changes))
    write_photos(tmp_path / "photos", {"train": 10, "val": 4, "test": 8})
    for command in ("prepare", "extract", "train-decoder --variant baseline"):
        options = [] if command == "prepare" else ["--device", device]
        result = call(*command.split(), *options)
        assert result.exit_code == 0, result.output

    folder = Path("models/decoders/baseline-0")
    options = {"weights": "decoder", "classes": (), "device": device, "batch_size": 3, "workers": 1}
    expected = evaluate.run(folder, Path("features/test"), **options).scores
    stored = featurestore.open("features/test")
    segmenter = Segmenter.load(folder, device=device)
    assert segmenter.device.type == device
    predicted = list(segmenter.segment([sample.image for sample in stored], batch_size=3))
    classes = len(stored.spec.class_names)
    confusion = sum(
        confusion_matrix(torch.from_numpy(found), torch.from_numpy(sample.mask.copy()), classes)
        for found, sample in zip(predicted, stored, strict=True)
    )
    found = score(confusion, stored.spec.class_names)
    # Stored features are rounded to float16, which changes the class of a pixel in a thousand; in
    # bfloat16, cuDNN's algorithms for other batch sizes round otherwise, too.
    tolerance = 1e-2 if changes else 2e-3
    assert found.pixel_accuracy == pytest.approx(expected.pixel_accuracy, abs=tolerance)
    assert found.miou == pytest.approx(expected.miou, abs=2 * tolerance)

    on_cpu = Segmenter.load(folder, device="cpu")
    others = list(on_cpu.segment([sample.image for sample in stored], batch_size=3))
    assert np.mean(np.stack(others) == np.stack(predicted)) > 1 - 5 * tolerance
