"""Tests in this folder need an NVIDIA GPU with TensorRT (docker/tensorrt/gpu_check.sh), and are skipped without."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from tests.benchmarks import gpu

Note = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def needs_a_gpu() -> None:
    if not torch.cuda.is_available() or find_spec("tensorrt") is None:
        pytest.skip("no NVIDIA GPU with TensorRT")


@pytest.fixture
def note() -> Note:
    """Write down what was measured: a row of `gpu.ROWS`, and what to show in it."""
    kind = "sm{}{}".format(*torch.cuda.get_device_capability())
    return lambda row, measured: gpu.note(kind, torch.cuda.get_device_name(), {row: measured})
