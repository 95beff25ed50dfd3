"""Tests in this folder need an NVIDIA GPU with TensorRT (docker/tensorrt/gpu_check.sh), and are skipped without."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(autouse=True)
def needs_a_gpu() -> None:
    if not torch.cuda.is_available() or find_spec("tensorrt") is None:
        pytest.skip("no NVIDIA GPU with TensorRT")
