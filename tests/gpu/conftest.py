"""Tests that need an NVIDIA GPU with TensorRT (docker/tensorrt/gpu_check.sh) are skipped without."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from tests.benchmarks import gpu
from tests.gpu.outcomes import FAILED, NOT_RUN, OK, record

Note = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def needs_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None:
        return
    if not torch.cuda.is_available() or find_spec("tensorrt") is None:
        pytest.skip("no NVIDIA GPU with TensorRT")


@pytest.fixture
def note() -> Note:
    """Write down what was measured: a row of `gpu.ROWS`, and what to show in it."""
    kind = "sm{}{}".format(*torch.cuda.get_device_capability())
    return lambda row, measured: gpu.note(kind, torch.cuda.get_device_name(), {row: measured})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A line of the table for each test: of its call, or of what kept it from being called."""
    if report.when == "call" or report.outcome != "passed":
        name = report.nodeid.partition("::")[2]
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
        verdict = {"passed": OK, "skipped": NOT_RUN}.get(report.outcome, FAILED)
        record(name, verdict, reason.strip().rpartition("\n")[2] if verdict != OK else "")
