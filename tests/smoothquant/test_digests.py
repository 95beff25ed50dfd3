"""Digests are remembered while files stay as they are, and no longer."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from smoothquant import digests, files
from smoothquant.errors import UserError

SECOND = 1_000_000_000


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMOOTHQUANT_CACHE", str(tmp_path / "memory"))
    return tmp_path / "memory/digests"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were read for their digest."""
    found: list[Path] = []
    sha256 = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: found.append(path) or sha256(path))
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that has been there for longer than the clock's grain."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    rest()
    return path


def rest() -> None:
    time.sleep(1.5 * digests.GRAIN / SECOND)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_an_unchanged_file_is_read_once(path: Path, reads: list[Path], memory: Path) -> None:
    assert [digests.sha256(path) for _ in range(3)] == [digest(b"content")] * 3
    assert reads == [path]
    assert digests.sha256(path, again=True) == digest(b"content")
    assert reads == [path, path]
    assert len(list(memory.iterdir())) == 1
    os.link(path, path.with_name("link"))  # changes the time of change
    assert digests.sha256(path) == digest(b"content")
    assert len(reads) == 3


def overwritten(path: Path) -> None:
    path.write_bytes(b"CONTENT")


def overwritten_with_the_same_time(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"CONTENT")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def copied_over(path: Path) -> None:
    """What `cp -p` does: the other file has the same size and the same time."""
    other, before = path.with_name("other"), path.stat()
    other.write_bytes(b"CONTENT")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    shutil.copy2(other, path)


def moved_over(path: Path) -> None:
    copied_over(path)
    shutil.copy2(path.with_name("other"), path.with_name("third"))
    os.replace(path.with_name("third"), path)


@pytest.mark.parametrize("change", [overwritten, overwritten_with_the_same_time, copied_over, moved_over])
def test_a_changed_file_is_read(change: Callable[[Path], None], path: Path, reads: list[Path]) -> None:
    before = path.stat()
    assert digests.sha256(path) == digest(b"content")
    change(path)
    assert path.stat().st_size == before.st_size
    if change is not overwritten:
        assert path.stat().st_mtime_ns == before.st_mtime_ns
    rest()
    assert [digests.sha256(path) for _ in range(2)] == [digest(b"CONTENT")] * 2
    assert len(reads) == 2


def test_a_file_of_this_instant_is_not_remembered(tmp_path: Path, reads: list[Path], memory: Path) -> None:
    """It could change once more without another time."""
    path = tmp_path / "new"
    path.write_bytes(b"content")
    digests.sha256(path)
    digests.remember(path, digest(b"content"))
    assert not memory.exists()
    os.utime(path, ns=(0, time.time_ns() + 3600 * SECOND))  # a time that has not come yet is no better
    rest()
    digests.sha256(path)
    digests.sha256(path)
    assert len(reads) == 3
    os.utime(path, ns=(0, 0))
    rest()
    digests.sha256(path)
    digests.sha256(path)
    assert len(reads) == 4


def test_what_was_written_is_remembered(path: Path, reads: list[Path]) -> None:
    digests.remember(path, digest(b"content"))
    assert digests.sha256(path) == digest(b"content")
    assert reads == []


def test_a_file_that_changes_while_it_is_read(path: Path, memory: Path) -> None:
    def compute() -> str:
        path.write_bytes(b"CONTENT")
        return "of both"

    for change in (compute, lambda: path.unlink() or ""):
        with pytest.raises(UserError, match=r"file was changed while it was read; expected files that stay as they"):
            digests.remembered(path, "sha256", str, change)
    assert not memory.exists()


def test_several_things_of_one_file(path: Path, reads: list[Path]) -> None:
    computed: list[int] = []
    for _ in range(2):
        digests.sha256(path)
        assert digests.remembered(path, "tensors", dict, lambda: computed.append(1) or {"a": "b"}) == {"a": "b"}
    assert (len(reads), len(computed)) == (1, 1)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": "0"}', '{"sha256": 3, "stamp": {}}', "\0"])
def test_a_damaged_memory_is_none(content: str, path: Path, reads: list[Path], memory: Path) -> None:
    digests.sha256(path)
    (note,) = memory.iterdir()
    note.write_text(content)
    assert digests.sha256(path) == digest(b"content")
    assert len(reads) == 2


@pytest.mark.parametrize("kind", ["a file in the way", "read-only"])
def test_without_a_memory_the_file_is_read_again(
    kind: str, path: Path, reads: list[Path], memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "read-only":

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        for operation in ("make_folder", "write"):
            monkeypatch.setattr(files.DISK, operation, refuse)
    else:
        memory.parent.write_text("")
    assert [digests.sha256(path) for _ in range(2)] == [digest(b"content")] * 2
    assert len(reads) == 2


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        digests.sha256(tmp_path / "nowhere")


def test_one_digest_of_several_parts() -> None:
    parts = {"a": "1", "b": "2"}
    assert digests.combined(parts) == digests.combined(dict(reversed(parts.items())))
    assert len(digests.combined(parts)) == 16
    others = [{"a": "1"}, {"a": "2", "b": "1"}, {"a": "1", "c": "2"}, {}]
    assert len({digests.combined(part) for part in (parts, *others)}) == 5
