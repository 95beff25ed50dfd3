"""Tools that a test wants and a machine may lack. The test is skipped then; on CI, which has them all, it fails."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

from builders.check.tensorrt_rtx import available

NO_COMPILER = "no TensorRT-RTX: pip install -e .[tensorrt-rtx]"
ON_CI = "CI" in os.environ
with_compiler = pytest.mark.skipif(not available() and not ON_CI, reason=NO_COMPILER)


def lacking(what: str) -> NoReturn:
    """End this test for want of something."""
    (pytest.fail if ON_CI else pytest.skip)(what)
    raise AssertionError


def require_compiler() -> None:
    """End this test where there is no TensorRT-RTX."""
    if not available():
        lacking(NO_COMPILER)
