"""Batches on their way to a device. No GPU is needed: CUDA's streams are stood in for by a diary."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from featurestore.transfer import moved


class Diary(list):
    """What is asked of CUDA, and of which stream."""

    stream = "compute"

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
    def __init__(self, diary: Diary, number: int) -> None:
        self.diary, self.number = diary, number

    def record_stream(self, stream: Stream) -> None:
        self.diary.append(f"memory {self.number} is {stream.name}'s too")


class Numbered:
    def __init__(self, diary: Diary, number: int) -> None:
        self.diary, self.number = diary, number

    def to(self, device: torch.device) -> Numbered:
        self.diary.append(f"copy {self.number} on {self.diary.stream}")
        return self

    def tensors(self) -> list[Tensor]:
        return [Tensor(self.diary, self.number)]


def test_the_next_batch_is_copied_beside_the_computation_which_waits_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    diary = Diary()

    @contextmanager
    def on(stream: Stream):
        diary.stream, before = stream.name, diary.stream
        yield
        diary.stream = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(diary, "copies"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(diary, diary.stream))
    for batch in moved((Numbered(diary, number) for number in range(3)), torch.device("cuda")):
        diary.append(f"step {batch.number}")
    assert diary == [
        "copy 0 on copies",
        "copy 1 on copies",
        "compute waits for copy 0",
        "memory 0 is compute's too",
        "step 0",
        "copy 2 on copies",
        "compute waits for copy 1",
        "memory 1 is compute's too",
        "step 1",
        "compute waits for copy 2",
        "memory 2 is compute's too",
        "step 2",
    ]


@pytest.mark.parametrize("count", [0, 1])
def test_few_batches_arrive(count: int) -> None:
    diary = Diary()
    assert [batch.number for batch in moved([Numbered(diary, number) for number in range(count)], torch.device("cpu"))] == list(
        range(count)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_hold_what_they_held() -> None:
    from featurestore.dataset import as_batch
    from featurestore.transfer import Pool

    device = torch.device("cuda")
    pool = Pool(device)

    def batches():
        for number in range(50):
            tensors = {
                "features": pool.take((8, 64, 32, 32), torch.float16).fill_(number),
                "masks": pool.take((8, 64, 64), torch.uint8).fill_(number),
            }
            yield as_batch(range(8), tensors)

    for number, batch in enumerate(moved(batches(), device)):
        busy = batch.features.float()
        for _ in range(20):
            busy = busy * 1.0
        assert bool((busy == number).all())
        assert bool((batch.masks == number).all())
