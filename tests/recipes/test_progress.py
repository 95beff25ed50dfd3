"""Progress in a log: lines now and then, one at the end, none beside an error."""

from __future__ import annotations

import pytest

from recipes.cli import ui
from recipes.cli.ui import Ui


def test_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Ui().progress("calibrate") as progress:
        progress(1, 4)
        monkeypatch.setattr(ui, "EVERY", 0)
        progress(2, 4)
        monkeypatch.undo()
        progress(3, 4)
        progress(4, 4)
    assert capsys.readouterr().err.splitlines() == ["calibrate: 2 of 4, 0:00:00", "calibrate: 4 of 4, 0:00:00"]


def fail() -> None:
    with Ui().progress("export") as progress:
        progress(1, 2)
        raise ValueError("full")


def test_an_error_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="full"):
        fail()
    assert capsys.readouterr().err == ""


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Ui(quiet=True).progress("export") as progress:
        progress(2, 2)
    assert capsys.readouterr().err == ""
