"""A thread that writes behind the caller."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from smoothquant.behind import Behind


class Held:
    """Something large."""


def test_in_order_and_beside_the_caller() -> None:
    found: list[tuple[int, bool]] = []
    with Behind() as behind:
        for number in range(5):
            behind.do(
                lambda number: found.append((number, threading.current_thread() is threading.main_thread())), number
            )
        behind.wait()
        assert found == [(number, False) for number in range(5)]


def test_no_more_than_two_are_held() -> None:
    """What is done is forgotten, before the next thing is begun."""
    held: list[weakref.ref] = []
    with Behind() as behind:
        for _ in range(4):
            one = Held()
            held.append(weakref.ref(one))
            behind.do(lambda one: None, one)
            del one
        behind.wait()
        behind.do(lambda: None)
        behind.wait()
        gc.collect()
        assert [ref() for ref in held] == [None] * 4


def test_an_error_is_the_callers() -> None:
    def fail() -> None:
        raise OSError(28, "no space")

    done: list[int] = []
    with Behind() as behind:
        behind.do(fail)
        with pytest.raises(OSError, match="no space"):
            behind.do(done.append, 1)
        behind.wait()  # it is raised once
        behind.do(fail)
        with pytest.raises(OSError, match="no space"):
            behind.wait()
    assert not done
