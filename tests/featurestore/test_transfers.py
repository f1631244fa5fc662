"""Copies of batches to a GPU; without one, a diary replaces CUDA's streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from featurestore.dataset import FeatureLoader, _copying_stream, copied_ahead
from tests.factories import sample, write


class Diary(list):
    """Records the calls of CUDA, with their streams."""

    stream = "compute"

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[Stream] = []

    def event(self, number: int) -> object:
        return type("Event", (), {"number": number})()


class Stream:
    def __init__(self, diary: Diary, name: str) -> None:
        self.diary, self.name, self.copied = diary, name, -1

    def record_event(self) -> object:
        self.copied += 1
        return self.diary.event(self.copied)

    def wait_event(self, event: object) -> None:
        self.diary.append(f"{self.name} waits for copy {event.number}")


class Tensor:
    def __init__(self, diary: Diary, name: str, number: int) -> None:
        self.diary, self.name, self.number = diary, f"{name} {number}", number

    def record_stream(self, stream: Stream) -> None:
        self.diary.append(f"{self.name} are {stream.name}'s too")

    def to(self, device: torch.device, *, non_blocking: bool) -> Tensor:
        assert non_blocking
        self.diary.append(f"copy {self.name} on {self.diary.stream}")
        return self


def numbered(diary: Diary, number: int) -> dict[str, Tensor]:
    return {name: Tensor(diary, name, number) for name in ("features", "masks")}


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Diary]:
    diary = Diary()

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        diary.stream, before = stream.name, diary.stream
        yield
        diary.stream = before

    _copying_stream.cache_clear()
    streams = diary.streams
    monkeypatch.setattr(
        torch.cuda, "Stream", lambda device: streams.append(Stream(diary, "copies")) or streams[-1]
    )
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(diary, diary.stream))
    yield diary
    _copying_stream.cache_clear()


def test_a_step_waits_for_its_own_copy_while_the_next_one_runs(
    diary: Diary,
) -> None:
    batches = (numbered(diary, number) for number in range(3))
    for batch in copied_ahead(batches, torch.device("cuda")):
        diary.append(f"step {batch['masks'].number}")
    assert diary == [
        "copy features 0 on copies",
        "copy masks 0 on copies",
        "copy features 1 on copies",
        "copy masks 1 on copies",
        "compute waits for copy 0",
        "features 0 are compute's too",
        "masks 0 are compute's too",
        "step 0",
        "copy features 2 on copies",
        "copy masks 2 on copies",
        "compute waits for copy 1",
        "features 1 are compute's too",
        "masks 1 are compute's too",
        "step 1",
        "compute waits for copy 2",
        "features 2 are compute's too",
        "masks 2 are compute's too",
        "step 2",
    ]


@pytest.mark.parametrize("count", [0, 1])
def test_no_batch_or_one_is_copied_too(diary: Diary, count: int) -> None:
    batches = [numbered(diary, number) for number in range(count)]
    copied = copied_ahead(batches, torch.device("cuda"))
    assert [batch["masks"].number for batch in copied] == list(range(count))


def test_all_epochs_copy_on_one_stream(diary: Diary) -> None:
    for _ in range(3):
        assert len(list(copied_ahead([numbered(diary, 0)], torch.device("cuda")))) == 1
    assert len(diary.streams) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_equal_the_samples(tmp_path: Path) -> None:
    loader = FeatureLoader(write(tmp_path / "store"), 3, seed=5, device="cuda")
    for epoch in range(20):
        for batch in loader.epoch(epoch):
            busy = batch.features.float()
            for _ in range(20):  # the next copy starts while this computes
                busy = busy * 1.0
            for row, position in enumerate(batch.positions.tolist()):
                np.testing.assert_array_equal(
                    busy[row].cpu(), sample(position)["features"].astype(np.float32)
                )
                np.testing.assert_array_equal(batch.masks[row].cpu(), sample(position)["mask"])
