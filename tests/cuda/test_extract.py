"""Extraction on a GPU: killed and resumed to the same bytes, and close to a CPU's features."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import featurestore
import featurestore.writer
from featurestore import FeatureStore
from stages import extract
from tests.factories import digests, extract_config, prepare, prepare_config, write_photos
from tests.imports import ROOT

pytestmark = [pytest.mark.cuda, pytest.mark.slow]
SHARD_BYTES = 3 * 60_000  # three samples, and two batches, a shard

# Dies in the second shard, once the first one is finished, which a thread does.
DYING = """
import os, signal, sys, time
from pathlib import Path
from featurestore.writer import StoreWriter
from tests.cuda import test_extract
device, folder, out, compute = sys.argv[1:]
write, samples = StoreWriter.write, []

def dying(self, sample):
    samples.append(1)
    if len(samples) == 6:
        while not list(Path(folder).glob("scratch/train/*/shard-00000.h5.finished.json")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, sample)

StoreWriter.write = dying
test_extract.extract_on(device, Path(folder), out, compute)
"""


def extract_on(device: str, folder: Path, out: str, compute: str) -> dict[str, FeatureStore]:
    """Extract the images that :func:`photos` prepared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(featurestore.writer, "SHARD_BYTES", SHARD_BYTES)
        return extract.run(
            extract_config(views=["identity", "hflip"], compute=compute),
            dataset=folder / "dataset",
            out=folder / out,
            scratch=folder / "scratch",
            device=device,
            workers=2,
        )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", {"train": 5, "val": 1, "test": 1})
    prepare(prepare_config(tmp_path / "photos"), tmp_path)
    return tmp_path


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_killed_extraction_resumes_to_the_same_bytes(
    folder: Path, device: str, compute: str
) -> None:
    extract_on(device, folder, "undisturbed", compute)
    expected = digests(folder / "undisturbed")
    assert sum(name.startswith("train/shard") for name in expected) == 4

    command = [sys.executable, "-c", DYING, device, str(folder), "features", compute]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (folder / "features" / "train").exists()
    (receipt,) = folder.glob("scratch/train/*/*.finished.json")
    shard = receipt.with_name(receipt.name.removesuffix(".finished.json"))
    inode = shard.stat().st_ino

    extract_on(device, folder, "features", compute)
    assert digests(folder / "features") == expected
    assert (folder / "features" / "train" / shard.name).stat().st_ino == inode  # reused


def test_features_are_those_of_the_cpu(folder: Path, device: str) -> None:
    """Without TF32 they differ by other algorithms of cuDNN, and by one rounding to float16."""
    found = extract_on(device, folder, "on-gpu", "fp32")
    expected = extract_on("cpu", folder, "on-cpu", "fp32")
    for split, store in expected.items():
        assert found[split].ids == store.ids
        for name in ("masks", "images"):
            positions = range(len(store))
            np.testing.assert_array_equal(
                found[split].gather(name, positions), store.gather(name, positions)
            )
        for number in range(len(store)):
            features = store.features(number).astype(np.float32)
            np.testing.assert_allclose(
                found[split].features(number).astype(np.float32),
                features,
                rtol=2e-3,
                atol=1e-3 * np.abs(features).max(),
            )
