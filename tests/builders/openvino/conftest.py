"""OpenVINO engines of one tiny Llama, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.openvino import build


@pytest.fixture(scope="session")
def openvino_engines(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engine folders by form. Read only."""
    folder = tmp_path_factory.mktemp("openvino")
    for name, made in exports.items():
        build(made, folder / name)
    return {name: folder / name for name in exports}
