"""Keep Python's garbage collector from running while TensorRT calls back.

TensorRT locks a mutex while it makes a builder or a runtime, and calls the logger, which is Python, while it holds it.
If the collector runs there and finds an old builder (in a cycle through an exception's traceback, for example), the
destructor of that builder waits for the mutex that its own thread holds, for ever.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept() -> Iterator[None]:
    """Keep the collector from running until the end of the block. Objects outside cycles still go at once."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
