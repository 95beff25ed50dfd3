"""A thread that makes what comes next, while the caller works on what came before."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(make: Callable[[int], T], numbers: Sequence[int]) -> Generator[T, None, None]:
    """Yield what `make` makes of each number, in order. The caller's and the next one are in memory, no more.

    Raises what `make` raises, where its turn comes. Whoever stops before the end closes the iterator, which waits for
    the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        following = thread.submit(make, numbers[0]) if numbers else None
        for number in [*numbers[1:], None]:
            if following is None:
                return
            made = following.result()
            following = None if number is None else thread.submit(make, number)
            yield made
            del made
