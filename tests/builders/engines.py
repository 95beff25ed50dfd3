"""What the tests of all builders that take an ONNX export share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from smoothquant.errors import UserError

Build = Callable[[Path, Path], object]  # from the folder of an export to that of an engine


def all_built(build: Build, exports: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """The engine of every export, in a folder of its form's name."""
    for form, made in exports.items():
        build(made, folder / form)
    return {form: folder / form for form in exports}


def refused_line(build: Build, export: Path, out: Path) -> str:
    """The one line with which `build` refuses. Nothing is left that a later step would take for an engine."""
    with pytest.raises(UserError) as caught:
        build(export, out)
    assert not out.exists()
    line = str(caught.value)
    assert "\n" not in line
    assert str(export) in line
    return line
