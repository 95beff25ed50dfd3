"""Have the system read a layer from the disk while the one before is worked on. It costs no memory of this process."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from smoothquant.artifacts.safetensors_files import read_header
from smoothquant.model import Model

FILES = 4  # whose headers are remembered: a layer lies in one or two


def expect_layer(model: Model, index: int) -> None:
    """Say that a layer's tensors are the next to be read. A layer that the model does not have is none."""
    if index >= model.geometry.layers or not hasattr(os, "posix_fadvise"):
        return
    tensors, within = model.checkpoint.tensors, model.family.module(index, "")
    either = (within, within.removeprefix(model.family.base))  # a checkpoint may hold names without their first part
    for name in (name for name in tensors if name.startswith(either)):
        info = tensors[name]
        if info.file.suffix == ".safetensors":
            begin, end = _ranges(info.file)[info.part.name if info.part else name]
            _advise(info.file, begin, end)


def _advise(file: Path, begin: int, end: int) -> None:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


@functools.lru_cache(maxsize=FILES)
def _ranges(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a file begins and ends."""
    start, header = read_header(file)
    places = {name: facts["data_offsets"] for name, facts in header.items()}
    return {name: (start + begin, start + end) for name, (begin, end) in places.items()}
