"""Computing results ahead in threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    ahead: int = 1,
    initializer: Callable[[], object] | None = None,
) -> Iterator[Result]:
    """Compute ``map(function, items)`` in threads, ahead of the caller.

    Threads, not processes: copying, hashing and decoding run without Python's lock, and a thread
    writes its result to its final place instead of sending it through a pipe.

    Parameters
    ----------
    function
        Called with each item.
    items
        Taken one at a time.
    workers
        Threads; 0 computes each result when the caller asks for it.
    ahead
        Number of results that may wait beyond those being computed; default: 1.
    initializer
        Called by each thread before its first item.

    Yields
    ------
    Result
        In the order of the items.

    Raises
    ------
    Exception
        What ``function`` raised for an item, in that item's place. After an error no thread
        starts another item, because an item may depend on those before it.
    """
    if workers == 0:
        yield from map(function, items)
        return
    failures: list[BaseException] = []  # every later item raises the first one

    def guarded(item: Item) -> Result:
        if failures:
            raise failures[0]
        try:
            return function(item)
        except BaseException as error:
            failures.append(error)
            raise

    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(
        workers, thread_name_prefix="prefetch", initializer=initializer
    ) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(guarded, item))
                if len(waiting) >= workers + ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            failures.append(CancelledError())
            for future in waiting:
                future.cancel()
