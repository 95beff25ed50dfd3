"""A thread that makes ahead of the caller."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import closing

import pytest

from smoothquant.ahead import ahead


class Held:
    """Something large."""


def test_in_order_and_while_the_caller_works() -> None:
    begun = [threading.Event() for _ in range(5)]

    def make(number: int) -> tuple[int, bool]:
        begun[number].set()
        return number, threading.current_thread() is threading.main_thread()

    for number, made in enumerate(ahead(make, range(4))):
        assert made == (number, False)
        if number < 3:
            assert begun[number + 1].wait(10)  # without the caller's asking
    assert not begun[4].is_set()
    assert list(ahead(make, range(0))) == []


def test_no_more_than_two_are_held() -> None:
    held: list[weakref.ref] = []

    def make(number: int) -> Held:
        gc.collect()
        assert sum(ref() is not None for ref in held) <= 1  # the caller's
        one = Held()
        held.append(weakref.ref(one))
        return one

    for one in ahead(make, range(5)):
        assert isinstance(one, Held)
        del one
    assert len(held) == 5


def test_an_error_is_the_callers_in_its_turn() -> None:
    def make(number: int) -> int:
        return 6 // (2 - number)

    with closing(ahead(make, range(4))) as numbers:
        assert [next(numbers), next(numbers)] == [3, 6]
        with pytest.raises(ZeroDivisionError):
            next(numbers)
