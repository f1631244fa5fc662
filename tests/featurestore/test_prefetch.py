"""Results are in order, and work stops at an error."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from featurestore.prefetch import prefetch


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    def slow_at_first(number: int) -> int:
        time.sleep(0.02 if number % 4 == 0 else 0)
        return number**2

    assert list(prefetch(slow_at_first, range(20), workers=workers, ahead=3)) == [
        number**2 for number in range(20)
    ]


def test_no_item_starts_after_one_failed() -> None:
    started, results = [], []

    def work(number: int) -> int:
        started.append(number)
        if number == 3:
            raise KeyError(number)
        return number

    with pytest.raises(KeyError):
        for result in prefetch(work, range(100), workers=1, ahead=10):
            results.append(result)
    assert results == [0, 1, 2]
    assert started == [0, 1, 2, 3]


def test_an_error_of_the_items_iterator_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(prefetch(abs, items(), workers=2))
