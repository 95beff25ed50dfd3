"""Engines of one tiny Llama, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.onnxruntime import build
from tests.builders.engines import all_built


@pytest.fixture(scope="session")
def engines(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engine folders by form. Read only."""
    return all_built(build, exports, tmp_path_factory.mktemp("engines"))
