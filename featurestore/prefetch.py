"""Work done ahead by threads, its results in order."""

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
    """``map(function, items)``, computed by threads before it is asked for.

    Threads, not processes: what is done here (copying, hashing, decoding) lets go of
    Python's lock, and a thread writes its result where it is wanted instead of
    sending it through a pipe.

    Parameters
    ----------
    workers
        Threads; 0 computes each result when it is asked for.
    ahead
        How many results may wait beyond those in work.
    initializer
        Called by each thread before its first item.

    Raises
    ------
    Exception
        What ``function`` raised for an item, when that item's turn comes. From the moment it was raised no thread
        begins another item: one that depends on those before it must not run after a failure.
    """
    if workers == 0:
        yield from map(function, items)
        return
    failures: list[BaseException] = []  # the first one is what every later item ends with

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
