"""Extractions that are killed again and again end in an undisturbed run's bytes.

``FEATUREGAN_FAULTS=20 python -m pytest tests/stages/test_extract_kills.py`` kills 100 times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.factories import prepare, prepare_config, write_photos
from tests.imports import ROOT

KILLS = 5 * int(os.environ.get("FEATUREGAN_FAULTS", "1"))

# Forks a child for each extraction from a process that has loaded everything but started no thread.
# The time before a kill is then spent on extracting.
KILLER = """
import json, os, random, shutil, signal, sys, time
import torch
torch.set_num_threads(1)
import featurestore.writer
from pathlib import Path
from stages import extract
from stages.backbones.build import build_backbone
from tests import factories
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
featurestore.writer.SHARD_BYTES = 3 * 60_000  # three samples a shard
backbone = build_backbone(name="efficientnet_lite0", weights="default")
extract.build_backbone = lambda **_: backbone

def start(out):
    child = os.fork()
    if child == 0:
        try:
            factories.extract(factories.extract_config(), folder, workers=2, out=out)
            os._exit(0)
        finally:
            os._exit(1)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

begun = time.monotonic()
assert ended(start("undisturbed")) == 0
duration = time.monotonic() - begun
whole, rng = factories.digests(folder / "undisturbed"), random.Random(0)
killed = taken_over = equal = 0
while killed < kills:
    child = start("features")
    time.sleep(rng.uniform(0, duration / 2))
    os.kill(child, signal.SIGKILL)
    if ended(child) == -signal.SIGKILL:
        killed += 1
        taken_over += len(list((folder / "scratch").glob("*/*/*.finished.json")))
        if rng.random() < 0.7:
            continue  # and kill the run that resumes, too
        assert ended(start("features")) == 0
    assert factories.digests(folder / "features") == whole
    equal += 1
    shutil.rmtree(folder / "features")
    shutil.rmtree(folder / "scratch")
shards = len([name for name in whole if name.endswith(".h5")])
print(json.dumps({"killed": killed, "shards": shards, "taken_over": taken_over, "equal": equal}))
"""


@pytest.mark.slow
def test_random_kills_cost_no_more_than_the_unfinished_shard(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", {"train": 24, "val": 3, "test": 3})
    prepare(prepare_config(tmp_path / "photos"), tmp_path)
    command = [sys.executable, "-c", KILLER, str(tmp_path), str(KILLS)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    outcome = json.loads(result.stdout.splitlines()[-1])
    print(outcome)
    assert outcome["killed"] == KILLS
    assert outcome["shards"] == 10
    if KILLS >= 20:
        assert outcome["taken_over"] > 0
        assert outcome["equal"] > 0
