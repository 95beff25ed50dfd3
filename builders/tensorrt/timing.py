"""TensorRT's timing cache: times of kernels, in a file that outlives a build.

It makes the next build quicker, and is worth no plan: a place that cannot be written is refused before the build, and
what goes wrong after it is only said.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from smoothquant.errors import OutputError
from smoothquant.files import write_bytes

if TYPE_CHECKING:
    import tensorrt as trt

NAMES = (".cache", ".timing")  # such a file is taken for a timing cache, and replaced


def check(path: Path) -> None:
    """Raise OutputError unless the file can be read, if it is there, and written beside itself."""
    if path.suffix not in NAMES:
        raise OutputError(
            f"--timing-cache {path}: this file is written over",
            expected=f"a name that ends in {' or '.join(NAMES)}",
            do="choose another file",
        )
    try:
        if path.exists():
            path.open("rb").close()
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OutputError(
            f"--timing-cache {path}: cannot be read or written there ({error.strerror})",
            expected="a file in a folder that is there and writable",
            do="make the folder, choose another file, or build without",
        ) from error


def read(config: trt.IBuilderConfig, path: Path) -> None:
    """A cache of another GPU or TensorRT, or none at all, is an empty one: every kernel is timed."""
    content = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(content) if content else None
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def write(config: trt.IBuilderConfig, path: Path) -> str:
    """Replace the file by what was measured. Returns what went wrong, "" for nothing."""
    cache = config.get_timing_cache()
    if cache is None:
        return ""
    try:
        write_bytes(path, memoryview(cache.serialize()))
    except OSError as error:
        return f"--timing-cache {path}: not written ({error.strerror}); the engine is whole"
    return ""
