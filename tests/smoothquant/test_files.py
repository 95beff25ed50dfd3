"""The module that changes the disk, and large files that are written in place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoothquant import files
from smoothquant.data_file import DataFile
from smoothquant.errors import OutputError
from smoothquant.workspace import Workspace


def entries(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["write", "sync", "replace"])
@pytest.mark.parametrize("there", [False, True])
def test_a_file_that_cannot_be_written_stays_as_it_was(
    operation: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    if there:
        files.write_text(path, "before")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(files.DISK, operation, full)
        with pytest.raises(OSError, match="no space left"):
            files.write_text(path, "after")
    assert entries(tmp_path) == (["file"] if there else [])
    assert not there or path.read_text() == "before"
    files.write_text(path, "after")
    assert (path.read_text(), entries(tmp_path)) == ("after", ["file"])


def test_what_dead_processes_left_aside_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours, living = f".a[1].smoothquant-{dead.pid}", f".a[1].smoothquant-{os.getppid()}"
    others = [living, f".b.smoothquant-{dead.pid}", ".a[1].smoothquant-x", f".a1.smoothquant-{dead.pid}"]
    for name in (ours, *others):
        (tmp_path / name).write_text("left")
    files.write_text(tmp_path / "a[1]", "new")
    assert entries(tmp_path) == sorted(["a[1]", *others])


def test_json_is_written(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"a": [1, "é"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, "é"]}


@pytest.mark.parametrize("reflink", [True, False])
def test_a_copy_is_a_file_of_its_own(reflink: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(0).randbytes(100_000)
    (tmp_path / "a").write_bytes(content)
    if not reflink:

        def cannot(*_: object) -> None:
            raise OSError(errno.EXDEV, "cannot")

        monkeypatch.setattr("smoothquant.files.fcntl.ioctl", cannot)
    files.copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content
    assert not (tmp_path / "a").samefile(tmp_path / "b")
    assert entries(tmp_path) == ["a", "b"]


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("a")

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("smoothquant.files.fcntl.ioctl", broken)
    with pytest.raises(OSError, match="broken"):
        files.copy(tmp_path / "a", tmp_path / "b")
    assert entries(tmp_path) == ["a"]


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["renameat2", "without"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With renameat2(2), and on a system that lacks it."""
    if request.param == "without":

        def lacking(source: Path, target: Path, flags: int) -> None:
            raise OSError(errno.ENOSYS, "no renameat2", str(source), None, str(target))

        monkeypatch.setattr(files, "_renameat2", lacking)
    return request.param


def test_a_name_is_taken_once(system: str, tmp_path: Path) -> None:
    for name in ("file", "other"):
        (tmp_path / name).write_text(name)
    for name in ("folder", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inner").write_text(name)
    with pytest.raises(FileExistsError):
        files.DISK.place(tmp_path / "file", tmp_path / "other")
    with pytest.raises(OSError, match=r"File exists|Directory not empty"):
        files.DISK.place(tmp_path / "folder", tmp_path / "full")
    assert (tmp_path / "other").read_text() == "other"
    assert (tmp_path / "full/inner").read_text() == "full"
    files.DISK.place(tmp_path / "file", tmp_path / "new")
    files.DISK.place(tmp_path / "folder", tmp_path / "moved")
    assert entries(tmp_path) == ["full", "full/inner", "moved", "moved/inner", "new", "other"]
    assert (tmp_path / "new").read_text() == "file"


def test_names_are_exchanged(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inner").write_text(name)
    files.DISK.exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / "inner").read_text() for name in ("a", "b")] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        files.DISK.exchange(tmp_path / "a", tmp_path / "nowhere")


def test_an_output_is_replaced_on_any_system(system: str, tmp_path: Path) -> None:
    def make(content: str, *, overwrite: bool = False) -> None:
        with Workspace(tmp_path / "out", "test", {"content": content}, overwrite=overwrite) as work:
            work.path("data").write_text(content)
            work.commit()

    make("a")
    make("b", overwrite=True)
    assert (tmp_path / "out/data").read_text() == "b"
    assert entries(tmp_path) == ["out", "out/data", "out/smoothquant", "out/smoothquant/manifest.json"]


def test_folders_are_made_on_the_way(tmp_path: Path) -> None:
    files.make_folder(tmp_path / "a/b/c")
    files.make_folder(tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c").is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/inner"):
        with pytest.raises((FileExistsError, NotADirectoryError)):
            files.make_folder(path)


def test_only_what_is_named_is_removed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (folder / "deep/er").mkdir(parents=True)
    for name in ("a", "deep/b"):
        (folder / name).write_text("x")
    (folder / "deep/link").symlink_to(outside)
    with pytest.raises(OSError, match="not empty"):
        files.remove_folder(folder, ["a", "deep/b", "gone"])
    assert entries(folder) == ["deep", "deep/link"]
    files.remove_folder(folder, ["deep/link"])
    files.remove_folder(folder, ["deep/link"])
    assert entries(tmp_path) == ["outside", "outside/precious"]


def test_what_is_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b/empty").mkdir(parents=True)
    (tmp_path / "b/inner").write_text("")
    (tmp_path / "a").write_text("")
    (tmp_path / "to a folder").symlink_to(tmp_path / "b")
    (tmp_path / "to nothing").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert list(files.files_in(tmp_path)) == ["a", "b/inner", "pipe", "to a folder", "to nothing"]
    assert list(files.files_in(tmp_path / "nowhere")) == []


def test_a_place_is_checked_before_the_work(tmp_path: Path) -> None:
    files.check_place(tmp_path / "new/deep/report.html", "--report", "report.html")
    with pytest.raises(OutputError, match="--report x: a folder; expected a file to write; choose another --report"):
        files.check_place(tmp_path, "--report", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"--report x: cannot write there \(.*\); expected a writable place"):
        files.check_place(tmp_path / "file/report.html", "--report", "x")
    assert entries(tmp_path) == ["file"]


def test_a_scratch_folder_goes_away(tmp_path: Path) -> None:
    with files.scratch() as folder:
        (folder / "deep").mkdir()
        (folder / "deep/a").write_text("")
    assert not folder.exists()


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_short_writes_go_on(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda file, content, offset: pwrite(file, content[:limit], offset))
    files.write_bytes(tmp_path / "a", bytes(range(200)))
    assert (tmp_path / "a").read_bytes() == bytes(range(200))


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    for attack in (
        lambda: files.DISK.write(tmp_path / "link", [(0, memoryview(b"y"))]),
        lambda: files.DISK.reserve(tmp_path / "link", 0),
    ):
        with pytest.raises(OSError, match="symbolic links"):
            attack()
    files.write_text(tmp_path / "link", "new")  # takes the place of the link
    assert (tmp_path / "precious").read_text() == "x"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(("begin", "end"), [(0, None), (0, 0), (3, 9), (0, 20), (9, 9)])
def test_digests_are_those_of_hashlib(
    begin: int, end: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", 4)
    (tmp_path / "a").write_bytes(bytes(range(20)))
    assert files.sha256(tmp_path / "a", begin, end) == hashlib.sha256(bytes(range(20))[begin:end]).hexdigest()


def test_a_file_that_is_too_short_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(20))
    with pytest.raises(OSError, match="ends before byte 21"):
        files.sha256(tmp_path / "a", 5, 21)


# -- large files -----------------------------------------------------------------------------------------------------

SIZE = 64
RANGES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 16)), min_size=1, max_size=12)


def fill(file: DataFile, ranges: list[tuple[int, int]], seed: int) -> bytearray:
    """Write random bytes into a new file. Returns what it must hold."""
    content, source = bytearray(SIZE), random.Random(seed)
    file.reserve(SIZE)
    for begin, length in ranges:
        end = min(begin + length, SIZE)
        content[begin:end] = source.randbytes(end - begin)
        middle = (begin + end) // 2
        pieces = [(middle, memoryview(content)[middle:end]), (begin, memoryview(content)[begin:middle])]
        file.write([(offset, memoryview(bytes(piece))) for offset, piece in pieces], begin, end)
    return content


def touched(ranges: list[tuple[int, int]]) -> set[int]:
    return {place for begin, length in ranges for place in range(begin, min(begin + length, SIZE))}


@settings(max_examples=50)
@given(RANGES, RANGES, st.sampled_from([0, 1, 8, 1000]), st.integers(0, 1000))
def test_digests_of_a_file_written_in_any_order(
    ranges: list[tuple[int, int]], later: list[tuple[int, int]], step: int, seed: int
) -> None:
    """Whatever was written twice, and whether the thread has hashed it before; then another process goes on."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataFile._follow, "__defaults__", (step,))
        path = Path(folder, "data")
        file = DataFile(path)
        assert file.is_new
        content = fill(file, ranges, seed)
        assert path.read_bytes() == content
        assert file.sha256() == hashlib.sha256(content).hexdigest()
        written = file.written()
        prefix = next((place for place in range(SIZE + 1) if place not in touched(ranges)), SIZE)
        assert written.length == prefix
        assert written.sha256 == hashlib.sha256(content[:prefix]).hexdigest()
        covered = {place for found in written.beyond for place in range(found.begin, found.end)}
        assert covered | set(range(prefix)) == touched(ranges)
        for found in written.beyond:
            assert found.sha256 == hashlib.sha256(content[found.begin : found.end]).hexdigest()
        again = DataFile(path)
        assert again.restore(written)
        assert again.written() == written
        for begin, length in later:
            end = min(begin + length, SIZE)
            content[begin:end] = bytes(end - begin)
            again.write([(begin, memoryview(bytes(end - begin)))], begin, end)
        assert again.sha256() == hashlib.sha256(path.read_bytes()).hexdigest() == hashlib.sha256(content).hexdigest()


@settings(max_examples=15)
@given(RANGES, st.integers(0, 1000), st.integers(0, 7))
def test_a_flipped_bit_of_what_was_written_is_seen(ranges: list[tuple[int, int]], seed: int, bit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data")
        file = DataFile(path)
        content = fill(file, ranges, seed)
        written = file.written()
        for place in range(SIZE):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            assert DataFile(path).restore(written) == (place not in touched(ranges))
        for size in range(SIZE):
            path.write_bytes(content[:size])
            assert DataFile(path).restore(written) == (max(touched(ranges)) < size)
        path.unlink()
        assert not DataFile(path).restore(written)


def test_a_file_that_is_restored_in_vain_is_new(tmp_path: Path) -> None:
    file = DataFile(tmp_path / "data")
    fill(file, [(0, 8)], 0)
    written = file.written()
    (tmp_path / "data").write_bytes(bytes(SIZE))
    again = DataFile(tmp_path / "data")
    assert not again.restore(written)
    assert again.is_new


def test_a_mapping_counts_as_written_when_it_says_so(tmp_path: Path) -> None:
    file = DataFile(tmp_path / "data")
    file.reserve(SIZE, fill=True)
    assert file.is_new
    for content in (bytes(SIZE), bytes(range(SIZE))):
        (tmp_path / "data").write_bytes(content)
        file.changed()
        written = file.written()
        assert (written.length, written.sha256) == (SIZE, hashlib.sha256(content).hexdigest())
    file.unwritten()
    assert file.is_new
    assert file.written().length == 0


CHANGES: dict[str, Callable[[Path], object]] = {
    "shorter": lambda path: os.truncate(path, 3),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_goes_away_is_an_error(change: str, tmp_path: Path) -> None:
    """The thread that takes the digest does not hide that it could not read."""
    file = DataFile(tmp_path / "data")
    fill(file, [(0, SIZE)], 0)
    CHANGES[change](tmp_path / "data")
    with pytest.raises(OSError, match=r"ends before byte|No such file"):
        file.written()
