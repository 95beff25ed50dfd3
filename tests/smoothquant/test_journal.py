"""Working folders: only what is ours is used or removed, and only what digests bear out is gone on from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from smoothquant import files
from smoothquant.artifacts.seal import opened, sealed
from smoothquant.errors import OutputError
from smoothquant.journal import NAMES, work_folder
from smoothquant.outputs import load_manifest
from smoothquant.reading import read_json
from smoothquant.workspace import Workspace

INPUTS = {"model": "a"}
LAYERS = 4
BEFORE = "the last state of an interrupted run is damaged; it goes on from the one before"
AGAIN = "what an interrupted run left is damaged; it starts again"


class Interrupt(KeyboardInterrupt):
    """Stands for Ctrl-C."""


def work_on(out: Path, *, stop: int | None = None, inputs: dict | None = None, step: str = "test") -> list[int]:
    """A step of some layers: each adds to a state, and writes its part of a large file. Returns the layers done."""
    done = []
    with Workspace(out, step, inputs or INPUTS) as work:
        if work.finished:
            return []
        data = work.data("deep/data")
        data.reserve(LAYERS * 8)
        start = work.next_layer
        state = work.state()["state"] if start else torch.zeros(3)
        for layer in range(start, LAYERS):
            if layer == stop:
                raise Interrupt
            state = state * 2 + layer + 1
            content = memoryview(state.sum().repeat(2).numpy().tobytes())
            data.write([(layer * 8, content)], layer * 8, layer * 8 + 8)
            work.mark(layer + 1, {"state": state})
            done.append(layer)
        work.path("small").write_text("small")
        work.commit()
    return done


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """What an uninterrupted step makes."""
    assert work_on(tmp_path / "whole") == [0, 1, 2, 3]
    return tmp_path / "whole"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output whose step was interrupted before layer 3."""
    with pytest.raises(Interrupt):
        work_on(tmp_path / "out", stop=3)
    return tmp_path / "out"


def same(out: Path, whole: Path) -> None:
    names = list(files.files_in(out))
    assert names == list(files.files_in(whole))
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not work_folder(out).exists()


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, but for the lock and whether it exists."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.name != "lock"}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


# -- what is not ours ------------------------------------------------------------------------------------------------


def foreign_folder(work: Path) -> None:
    work.mkdir()
    (work / "thesis.txt").write_text("the only copy")


def foreign_subfolder(work: Path) -> None:
    (work / "output/deep").mkdir(parents=True)
    (work / "output/deep/thesis.txt").write_text("the only copy")


def foreign_file(work: Path) -> None:
    work.write_text("the only copy")


def link_to_a_folder(work: Path) -> None:
    (work.parent / "elsewhere").mkdir()
    (work.parent / "elsewhere/thesis.txt").write_text("the only copy")
    work.symlink_to(work.parent / "elsewhere")


def link_to_nothing(work: Path) -> None:
    work.symlink_to("nowhere")


def link_inside(work: Path) -> None:
    (work.parent / "elsewhere").mkdir()
    (work.parent / "elsewhere/thesis.txt").write_text("the only copy")
    work.mkdir()
    (work / "output").symlink_to(work.parent / "elsewhere")


FOREIGN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a folder": (foreign_folder, r"it holds thesis\.txt"),
    "a folder that looks like ours": (foreign_subfolder, r"it holds output/deep/thesis\.txt"),
    "a file": (foreign_file, "it is no folder"),
    "a link to a folder": (link_to_a_folder, "it is no folder"),
    "a link to nothing": (link_to_nothing, "it is no folder"),
    "a link inside": (link_inside, "output is a link"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_ours_is_refused_and_stays(kind: str, tmp_path: Path) -> None:
    change, fault = FOREIGN[kind]
    change(work_folder(tmp_path / "out"))
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=rf"where this output is made, and {fault}; .*choose another --out"):
        work_on(tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis.txt", "deep/thesis.txt", "smoothquant/thesis.txt", "link"])
def test_a_file_that_a_user_put_into_the_folder_stays(name: str, out: Path, whole: Path) -> None:
    """Even where the step starts again, and removes what it had made."""
    path = work_folder(out) / "output" / name
    path.parent.mkdir(exist_ok=True)
    if name == "link":
        path.symlink_to(out.parent)
    else:
        path.write_text("the only copy")
    for inputs in (INPUTS, {"model": "b"}):
        with pytest.raises(OutputError, match=f"it holds output/{name}; .*move what is yours away"):
            work_on(out, inputs=inputs)
    assert os.path.lexists(path)
    path.unlink()
    assert work_on(out) == [3]
    same(out, whole)


def test_a_file_that_comes_while_we_work_is_no_part_of_the_output(tmp_path: Path, whole: Path) -> None:
    with Workspace(tmp_path / "out", "test", INPUTS) as work:
        work.path("small").write_text("small")
        (work.folder / "thesis.txt").write_text("the only copy")
        with pytest.raises(OutputError, match=r"it holds output/thesis\.txt"):
            work.commit()
        with pytest.raises(OSError, match="not empty"):
            work.forget()
        assert (work.folder / "thesis.txt").read_text() == "the only copy"
    assert not (tmp_path / "out").exists()


# -- damage ----------------------------------------------------------------------------------------------------------


def journals(out: Path) -> list[Path]:
    """The two marks, newest first."""
    found = [work_folder(out) / f"journal.{number}.json" for number in (0, 1)]
    return sorted(found, key=lambda path: json.loads(path.read_text())["order"], reverse=True)


def states(out: Path) -> list[Path]:
    found = list(work_folder(out).glob("state.*"))
    return sorted(found, key=lambda path: int(path.name.split(".")[2]), reverse=True)


def test_an_interrupted_step_goes_on(out: Path, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(journals(out)) == len(states(out)) == 2
    assert work_on(out) == [3]
    same(out, whole)
    assert caplog.records == []


FAULTS: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 2),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped at its beginning": lambda path: flip(path, 0),
    "flipped in its middle": lambda path: flip(path, path.stat().st_size // 2),
    "flipped at its end": lambda path: flip(path, path.stat().st_size - 2),
    "garbage": lambda path: path.write_bytes(b"\xff" * 100),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("damaged", "again", "note"), [((0,), [2, 3], BEFORE), ((0, 1), [0, 1, 2, 3], AGAIN)])
def test_damaged_states(
    fault: str,
    damaged: tuple[int, ...],
    again: list[int],
    note: str,
    out: Path,
    whole: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for path in [states(out)[number] for number in damaged]:
        FAULTS[fault](path)
    assert work_on(out) == again
    same(out, whole)
    assert [record.getMessage() for record in caplog.records] == [f"{out}: {note}"]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "longer"])
@pytest.mark.parametrize(("damaged", "again"), [((0,), [2, 3]), ((0, 1), [0, 1, 2, 3])])
def test_damaged_marks(fault: str, damaged: tuple[int, ...], again: list[int], out: Path, whole: Path) -> None:
    for path in [journals(out)[number] for number in damaged]:
        FAULTS[fault](path)
    assert work_on(out) == again
    same(out, whole)


def test_any_flipped_bit_of_a_mark(out: Path, whole: Path) -> None:
    """A mark that was changed is none, or says the same."""
    path = journals(out)[0]
    kept = json.loads(path.read_text())
    for place in range(0, path.stat().st_size, 3):
        flip(path, place)
        assert opened(read_json(path)) in (None, opened(kept))
        flip(path, place)
    assert work_on(out) == [3]
    same(out, whole)


@pytest.mark.parametrize(("place", "again"), [(0, [0, 1, 2, 3]), (12, [0, 1, 2, 3]), (20, [2, 3]), (28, [3])])
def test_damaged_data(place: int, again: list[int], out: Path, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mark 3 speaks of the first 24 bytes, mark 2 of 16; nobody has written the rest."""
    flip(work_folder(out) / "output/deep/data", place)
    assert work_on(out) == again
    same(out, whole)
    notes = {3: [], 2: [BEFORE], 0: [AGAIN]}[again[0]]
    assert [record.getMessage() for record in caplog.records] == [f"{out}: {note}" for note in notes]


@pytest.mark.parametrize("fault", ["gone", "empty"])
def test_lost_data(fault: str, out: Path, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    FAULTS[fault](work_folder(out) / "output/deep/data")
    assert work_on(out) == [0, 1, 2, 3]
    same(out, whole)
    assert [record.getMessage() for record in caplog.records] == [f"{out}: {AGAIN}"]


def test_an_old_mark_beside_newer_data(out: Path, whole: Path) -> None:
    """A mark, its state and what they speak of belong together: another run's state is not taken for ours."""
    newest, before = states(out)
    newest.write_bytes(before.read_bytes())
    assert work_on(out) == [2, 3]
    same(out, whole)


# -- the list of names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", ['\n"half', "\n", '\n"caf\\u00', "\n\xc3", '\n{"a": 1}', "\n3"])
def test_a_torn_last_line_is_passed_over(torn: str, out: Path, whole: Path) -> None:
    """The file that it was to name was never made."""
    with open(work_folder(out) / NAMES, "a", encoding="latin-1") as names:
        names.write(torn)
    assert work_on(out) == [3]
    same(out, whole)


def test_names_after_a_torn_line_are_read(out: Path, whole: Path) -> None:
    with open(work_folder(out) / NAMES, "a") as names:
        names.write('\n"half')
    with Workspace(out, "test", INPUTS) as work:
        work.path("early").write_text("x")  # noted behind the torn line
    (work_folder(out) / "output/early").unlink()
    assert work_on(out) == [3]
    same(out, whole)


def test_every_file_is_noted_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(out: Path) -> set[str]:
        text = (work_folder(out) / NAMES).read_text() if (work_folder(out) / NAMES).exists() else ""
        return {json.loads(line) for line in text.splitlines() if line}

    make_folder = files.make_folder

    def checked(path: Path) -> None:
        if "output" in path.parts and path.name == "deep":
            assert "deep/a" in noted(tmp_path / "out")
        make_folder(path)

    monkeypatch.setattr(files, "make_folder", checked)
    with Workspace(tmp_path / "out", "test", {}) as work:
        work.path("deep/a").write_text("x")
        work.path("b\nc").write_text("x")
        assert noted(tmp_path / "out") == {"deep/a", "b\nc"}
        (work.folder / "made by others").write_text("x")
        work.own()
        assert noted(tmp_path / "out") == {"deep/a", "b\nc", "made by others"}
        work.commit()
    assert set(load_manifest(tmp_path / "out").files) == {"deep/a", "b\nc", "made by others"}


# -- whose marks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"inputs": {"model": "b"}}, {"inputs": {**INPUTS, "more": 1}}, {"step": "other test"}]
)
def test_marks_of_other_inputs_are_not_used(changes: dict, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert work_on(out, **changes) == [0, 1, 2, 3]
    manifest = load_manifest(out)
    assert (manifest.step, manifest.inputs) == (changes.get("step", "test"), changes.get("inputs", INPUTS))
    assert not work_folder(out).exists()
    assert caplog.records == []


@pytest.mark.parametrize("key", ["version", "step", "inputs"])
def test_sealed_marks_of_others_are_not_used(key: str, out: Path, whole: Path) -> None:
    """Whole, and with data that is borne out: but made by another version, step, or from other inputs."""
    for path in journals(out):
        inner = opened(read_json(path))
        assert inner
        other = {"version": "0.0.0", "step": "other", "inputs": {"model": "b"}}[key]
        files.write_json(path, sealed({**inner, key: other}))
    assert work_on(out) == [0, 1, 2, 3]
    same(out, whole)


def test_an_unsealed_mark_is_not_used(out: Path, whole: Path) -> None:
    path = journals(out)[0]
    inner = opened(read_json(path))
    assert inner
    files.write_json(path, {**inner, "next_layer": 4})
    assert work_on(out) == [2, 3]
    same(out, whole)


@pytest.mark.parametrize("name", ["../../thesis.txt", "link/thesis.txt", "{here}/thesis.txt"])
def test_a_note_of_ours_names_nothing_outside(name: str, out: Path, whole: Path, tmp_path: Path) -> None:
    """A working folder may come from somebody else, with notes that name files of the user's as ours."""
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("all my work")
    work = work_folder(out)
    (work / "output/link").symlink_to(tmp_path)
    named = name.format(here=tmp_path)
    with open(work / NAMES, "a", encoding="utf-8") as notes:
        notes.write("".join(f"\n{json.dumps(each)}" for each in (named, "link")))
    work_on(out, inputs={"model": "b"})  # what is there is of no use to this step, and is removed
    assert thesis.read_text() == "all my work"
    assert not work.exists()
