"""A thread that writes what the caller has made, while the caller makes what comes next."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, ParamSpec

if TYPE_CHECKING:
    from typing_extensions import Self  # torch requires this package

P = ParamSpec("P")


class Behind:
    """Does one thing at a time behind the caller. Use it as a context manager, whose end waits."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()

    def do(self, work: Callable[P, None], *arguments: P.args, **options: P.kwargs) -> None:
        """Have something done, once what was asked for before is: the arguments of two are in memory, no more. Raises
        what the one before has raised."""
        self.wait()
        self._last = self._thread.submit(work, *arguments, **options)

    def wait(self) -> None:
        """Wait until everything is done. Raises what it has raised."""
        last, self._last = self._last, None
        if last:
            last.result()
