"""Outputs are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from smoothquant.errors import OutputError, UserError
from smoothquant.outputs import load_manifest
from smoothquant.workspace import Workspace


def make(out: Path, inputs: dict | None = None, content: str = "whole", overwrite: bool = False) -> Workspace:
    with Workspace(out, "test", inputs or {"model": "a"}, overwrite=overwrite) as work:
        if not work.finished:
            work.path("data.txt").write_text(content)
            work.commit({"note": 1})
    return work


def test_whole(tmp_path: Path) -> None:
    make(tmp_path / "out")
    manifest = load_manifest(tmp_path / "out")
    assert manifest.files == {"data.txt": 5}
    assert manifest.results["note"] == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data.txt", "manifest.json", "out", "smoothquant"]


def test_finished_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path / "out")
    assert make(tmp_path / "out", content="never written").finished
    assert (tmp_path / "out/data.txt").read_text() == "whole"


def test_other_content_is_refused_and_stays(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(OutputError, match="exists and was not made by this command with these inputs"):
        make(tmp_path / "out", {"model": "b"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").write_text("x")
    with pytest.raises(OutputError, match="exists"):
        make(tmp_path / "mine")
    assert (tmp_path / "mine/precious.txt").exists()


def test_overwrite_keeps_the_old_until_the_new_is_whole(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), Workspace(tmp_path / "out", "test", {"model": "b"}, overwrite=True):
        _ = 1 / 0
    assert load_manifest(tmp_path / "out").inputs == {"model": "a"}
    make(tmp_path / "out", {"model": "b"}, overwrite=True)
    assert load_manifest(tmp_path / "out").inputs == {"model": "b"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_interrupted_goes_on(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", "test", {"model": "a"}) as work:
        work.path("part").write_text("1")
        work.mark(3, {"hidden": torch.arange(4.0)})
    assert not (tmp_path / "out").exists()
    with Workspace(tmp_path / "out", "test", {"model": "a"}) as work:
        assert work.next_layer == 3
        assert work.state()["hidden"].tolist() == [0, 1, 2, 3]
        assert work.path("part").exists()
    with Workspace(tmp_path / "out", "test", {"model": "other"}) as work:  # other inputs: from the start
        assert work.next_layer == 0
        assert not work.path("part").exists()
        assert work.state() == {}


def test_two_writers(tmp_path: Path) -> None:
    with (
        Workspace(tmp_path / "out", "test", {}),
        pytest.raises(OutputError, match="another process is writing it"),
    ):
        Workspace(tmp_path / "out", "test", {})


def test_disk_too_small(tmp_path: Path) -> None:
    with (
        Workspace(tmp_path / "out", "test", {}) as work,
        pytest.raises(OutputError, match=r"GB free on this disk; expected 1000000\.\d GB; free some space"),
    ):
        work.require(10**15)


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write there"):
        Workspace(tmp_path / "file" / "out", "test", {})


def test_half_copied(tmp_path: Path) -> None:
    make(tmp_path / "out")
    os.truncate(tmp_path / "out/data.txt", 2)
    with pytest.raises(UserError, match=r"data\.txt has 2 bytes; expected 5 bytes by smoothquant/manifest\.json"):
        load_manifest(tmp_path / "out")
    (tmp_path / "out/data.txt").unlink()
    with pytest.raises(UserError, match=r"data\.txt is missing"):
        load_manifest(tmp_path / "out")
    with pytest.raises(UserError, match="not an output of this tool"):
        load_manifest(tmp_path)


def test_one_file(tmp_path: Path) -> None:
    with Workspace(tmp_path / "scales.bin", "test", {}) as work:
        work.path("scales.bin").write_text("x")
        work.commit_file("scales.bin")
    assert [path.name for path in tmp_path.rglob("*")] == ["scales.bin"]
