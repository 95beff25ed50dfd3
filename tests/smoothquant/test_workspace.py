"""Outputs are whole or absent."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from smoothquant.artifacts.manifest import FileFacts
from smoothquant.errors import OutputError, UserError
from smoothquant.journal import work_folder
from smoothquant.outputs import load_manifest
from smoothquant.workroom import forget
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
    assert manifest.files == {"data.txt": FileFacts(5, hashlib.sha256(b"whole").hexdigest())}
    assert manifest.results["note"] == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data.txt", "manifest.json", "out", "smoothquant"]


def test_finished_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path / "out")
    assert make(tmp_path / "out", content="never written").finished
    assert (tmp_path / "out/data.txt").read_text() == "whole"
    assert not make(tmp_path / "out", content="anew", overwrite=True).finished
    assert (tmp_path / "out/data.txt").read_text() == "anew"


def test_other_content_is_refused_and_stays(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(OutputError, match="exists and was not made by this command with these inputs"):
        make(tmp_path / "out", {"model": "b"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="mine exists, and this tool did not make it"):
            make(tmp_path / "mine", overwrite=overwrite)
    (tmp_path / "out/precious.txt").write_text("x")
    with pytest.raises(OutputError, match=r"out holds precious\.txt, which this tool did not write"):
        make(tmp_path / "out", {"model": "b"}, overwrite=True)
    assert (tmp_path / "mine/precious.txt").exists()
    assert load_manifest(tmp_path / "out").inputs == {"model": "a"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]  # no working folder, either


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert load_manifest(tmp_path / "out").inputs == {"model": "a"}


def test_overwrite_keeps_the_old_until_the_new_is_whole(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), Workspace(tmp_path / "out", "test", {"model": "b"}, overwrite=True):
        _ = 1 / 0
    assert load_manifest(tmp_path / "out").inputs == {"model": "a"}
    make(tmp_path / "out", {"model": "b"}, overwrite=True)
    assert load_manifest(tmp_path / "out").inputs == {"model": "b"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_output_that_comes_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Workspace(out, "test", {"model": "a"}) as work:
        work.path("data.txt").write_text("whole")
        out.mkdir()
        (out / "precious.txt").write_text("x")
        with pytest.raises(OutputError, match="out appeared while it was being made"):
            work.commit()
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    (out / "precious.txt").unlink()
    out.rmdir()
    with Workspace(out, "test", {"model": "a"}) as work:  # as the error promises: "it ends at once"
        assert work.finished
    assert (out / "data.txt").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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


def test_kept_and_forgotten(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", "test", {}) as work:
        work.mark(1, {"hidden": torch.ones(1)})
        work.keep("more", {"found": torch.arange(3)})
    with Workspace(tmp_path / "out", "test", {}) as work:
        assert work.state()["hidden"].tolist() == [1]
        assert work.state("more")["found"].tolist() == [0, 1, 2]
        assert work.state("other") == {}
    with Workspace(tmp_path / "out", "test", {"model": "other"}) as work:
        assert (work.next_layer, work.state(), work.state("more")) == (0, {}, {})
    forget(tmp_path / "out")
    forget(tmp_path / "out")  # nothing is there any more
    assert list(tmp_path.iterdir()) == []


def test_two_writers(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", "test", {}):
        with (
            pytest.raises(OutputError, match="another process is writing it"),
            Workspace(tmp_path / "out", "test", {}),
        ):
            raise AssertionError("two at a time")
        with Workspace(tmp_path / "other", "test", {}):
            pass
    with Workspace(tmp_path / "out", "test", {}):
        pass


def test_nothing_is_made_before_it_is_entered(tmp_path: Path) -> None:
    Workspace(tmp_path / "out", "test", {})
    assert list(tmp_path.iterdir()) == []


def test_disk_too_small(tmp_path: Path) -> None:
    with (
        Workspace(tmp_path / "out", "test", {}) as work,
        pytest.raises(OutputError, match=r"GB free on this disk; expected 1000000\.\d GB; free some space"),
    ):
        work.require(10**15)


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="cannot write there"),
        Workspace(tmp_path / "file" / "out", "test", {}),
    ):
        raise AssertionError("a folder in a file")


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


def test_an_adopted_file_is_a_copy(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"weights")
    with Workspace(tmp_path / "out", "test", {}) as work:
        work.adopt(tmp_path / "source", "deep/weights")
        work.commit()
    (tmp_path / "source").write_bytes(b"changed")
    assert (tmp_path / "out/deep/weights").read_bytes() == b"weights"
    assert not work_folder(tmp_path / "out").exists()
