"""TensorRT's timing cache: a file with the times of kernels, which makes the next build quicker.

A cache must not cost a finished plan: a path that cannot be written is refused before the build, and a fault after the
build is only a warning.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from smoothquant.errors import OutputError

if TYPE_CHECKING:
    import tensorrt as trt


def check(path: Path) -> None:
    """Raise OutputError unless an existing file can be read and a new file can be written beside it."""
    try:
        if path.exists():
            path.open("rb").close()
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OutputError(
            f"--timing-cache {path}: the file cannot be read or written there ({error.strerror})",
            expected="a file in an existing, writable folder",
            do="make the folder, choose another file, or build without a timing cache",
        ) from error


def read(config: trt.IBuilderConfig, path: Path) -> None:
    """Give the configuration the timing cache of a file.

    The cache stays empty, and every kernel is timed, if the file is absent or of another GPU or TensorRT.
    """
    content = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(content) if content else None
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def write(config: trt.IBuilderConfig, path: Path) -> str:
    """Write the measured times to the file. Returns a warning if that fails, or else ""."""
    cache = config.get_timing_cache()
    if cache is None:
        return ""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        new.write_bytes(memoryview(cache.serialize()))
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        return f"--timing-cache {path}: the file was not written ({error.strerror}); the engine is whole"
    return ""
