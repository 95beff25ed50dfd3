"""Python's garbage collector and TensorRT: the first must not run while the second calls back.

Making a builder or a runtime locks a mutex of TensorRT's; while it is held, the logger is called, and so Python. If the
collector runs there and finds an old builder (behind an exception, say, whose traceback makes a cycle), the builder's
end waits for the mutex that its own thread holds: for ever.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept() -> Iterator[None]:
    """Garbage waits until the end of this block. What is not part of a cycle goes at once, as ever."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
