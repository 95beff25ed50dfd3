"""What an interrupted step left behind, believed only as far as digests bear it out.

    WORK/                       a folder of ours beside the output, held by one process at a time
        lock                    held by whoever works here
        names                   every file of `output/`, one JSON string a line, noted before it is made
        journal.N.json          N is 0 or 1: the two last marks, each sealed with its own digest
        state.NAME.N.safetensors    tensors that mark N needs
        scratch.NAME            what the step needs while it works
        output/                 the output to be
        old/                    the former output, for an instant, where names cannot be exchanged

A mark is made when everything that it speaks of is on the disk: data, then the state, then the mark. Where one is
damaged, or speaks of damaged data, the one before it counts; if that is damaged too, the step starts again.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoothquant import __version__, files
from smoothquant.artifacts.record import as_json, read
from smoothquant.artifacts.seal import opened, sealed
from smoothquant.data_file import DataFile, Written
from smoothquant.errors import OutputError, UserError
from smoothquant.reading import parse_json, read_json

if TYPE_CHECKING:
    from torch import Tensor

END = ".smoothquant-work"
OUTPUT, OLD, LOCK, NAMES = "output", "old", "lock", "names"
SCRATCH = "scratch."
DAMAGED = "what an interrupted run left is damaged; it starts again"
STATE = "layer"  # the tensors that the next layer starts from
OWN = re.compile(rf"{OUTPUT}|{OLD}|{LOCK}|{NAMES}|journal\.[01]\.json|state\.[a-z]+\.\d+\.safetensors|scratch\..+")
ASIDE = re.compile(r"\.(.*)\.smoothquant-\d+")  # what `files.aside` makes


@dataclass(frozen=True)
class Kept:
    """A file of tensors that a mark needs."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Mark:
    """How far a step has come. order: marks are counted. version: of this tool. step, inputs: say whose mark it is.

    next_layer: first layer that is not done. data: what is written of files that are written in place. kept: tensors to
    go on from, by name. complete: the digest of the finished output, once only its name is lacking.
    """

    order: int
    version: str
    step: str
    inputs: Mapping[str, Any]
    next_layer: int
    data: Mapping[str, Written] = field(default_factory=dict)
    kept: Mapping[str, Kept] = field(default_factory=dict)
    complete: str | None = None


class Journal:
    """The working folder of one output. Use it through `Workspace`.

    Raises OutputError if another process holds the folder, if it cannot be written, or if it holds a file of somebody
    else's.
    """

    def __init__(self, out: Path, step: str, inputs: Mapping[str, Any]) -> None:
        self.out, self.step, self.inputs = out, step, inputs
        self.root = work_folder(out)
        self.folder = self.root / OUTPUT
        self.note = ""  # what a user should know of an interrupted run
        self.found: list[Mark] = []  # all that are whole, newest first
        self.marks: list[Mark] = []  # those of them that were made by this step from these inputs
        self.data: dict[str, DataFile] = {}  # by path in the folder
        self._lock = -1
        self._names: set[str] = set()

    def open(self) -> None:
        """Take the folder, and read what is in it. It is made if it is not there."""
        if self._lock >= 0:
            return
        self._check_own()
        self._take()
        try:
            self._names = set(self._noted())
            self.check_foreign()
            self.found = self._read_marks()
            self.marks = [mark for mark in self.found if self._is_ours(mark)]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def path(self, name: str) -> Path:
        """A file of the output to be. It is noted as ours before it is made, and the folders on the way to it are
        made."""
        self.own([name])
        path = self.folder / name
        files.make_folder(path.parent)
        return path

    def file(self, path: Path) -> DataFile:
        """A file in the folder that is written in place; what an interrupted run wrote, and the marks bear out, is
        known."""
        return self.data.setdefault(str(path.relative_to(self.root)), DataFile(path))

    def own(self, names: Iterable[str]) -> None:
        """Note files of `output/` as ours."""
        new = [name for name in names if name not in self._names]
        if new:
            path, text = self.root / NAMES, "".join(f"\n{json.dumps(name)}" for name in new)
            there = path.exists()
            size = path.stat().st_size if there else 0
            files.DISK.write(path, [(size, memoryview(text.encode()))], new=not there)
            files.DISK.sync(path)
            if not there:
                files.DISK.sync(self.root)
            self._names |= set(new)

    def restore(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the newest mark that is borne out, by their names in it; it is `marks[0]` then. What no mark
        bears out is removed."""
        for number, mark in enumerate(self.marks):
            if mark.complete or not (mark.data or mark.kept):
                continue
            kept = self._restored(mark)
            if kept is not None:
                if number:
                    self.note = "the last state of an interrupted run is damaged; it goes on from the one before"
                self.marks = self.marks[number:]
                for name in filter(_is_aside, files.files_in(self.folder)):
                    files.remove_file(self.folder / name)
                return kept
            self.note = DAMAGED
        if self.note:
            self.note = DAMAGED
        self.clear()
        self.mark(0)
        return {}

    def mark(self, next_layer: int, state: Mapping[str, Tensor] | None = None, *, complete: str | None = None) -> None:
        """Note on the disk that all layers before `next_layer` are done, with what the next one starts from."""
        data = {name: file.written() for name, file in self.data.items() if not file.is_new}
        for folder in {(self.root / name).parent for name in data}:
            files.DISK.sync(folder)
        kept = {STATE: self._keep(STATE, state)} if state else {}
        self._note(Mark(self._order, __version__, self.step, self.inputs, next_layer, data, kept, complete))

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Note more tensors in the last mark. name: of letters."""
        last = self.marks[0]
        self._note(replace(last, order=self._order, kept={**last.kept, name: self._keep(name, tensors)}))

    def clear(self) -> None:
        """Remove what earlier work left. The lock stays."""
        self._remove_folders()
        newest = max((mark.order for mark in (*self.marks, *self.found)), default=0)  # it may say that all is done
        marks = [_journal(newest + 1), _journal(newest)]
        for path in sorted(self.root.iterdir()):
            if path.name not in (LOCK, NAMES, *marks):
                files.remove_file(path)
        for name in (*marks, NAMES):  # as long as there is a mark, the next process knows what was done
            files.remove_file(self.root / name)
        self._names, self.marks, self.data = set(), [], {}

    def remove(self) -> None:
        """Remove the folder, once the output has its name, and let go of it."""
        self.clear()
        files.remove_file(self.root / LOCK)
        with suppress(OSError):  # another process may have come to wait here
            files.DISK.remove_folder(self.root)
        self.close()

    @property
    def _order(self) -> int:
        """Of the next mark."""
        return self.marks[0].order + 1 if self.marks else 0

    def _keep(self, name: str, tensors: Mapping[str, Tensor]) -> Kept:
        from smoothquant.artifacts.safetensors_files import save_tensors  # torch, which a build does without

        path = self.root / f"state.{name}.{self._order}.safetensors"
        save_tensors(path, tensors)
        return Kept(path.name, path.stat().st_size, files.sha256(path))

    def _note(self, mark: Mark) -> None:
        files.write_json(self.root / _journal(mark.order), sealed(as_json(mark)))
        self.marks = [mark, *self.marks[:1]]
        needed = {kept.name for found in self.marks for kept in found.kept.values()}
        for path in self.root.glob("state.*"):
            if path.name not in needed:
                files.remove_file(path)

    def _remove_folders(self) -> None:
        """Remove `output/` and `old/`: all that is noted as ours, and nothing else."""
        for folder in (self.folder, self.root / OLD):
            if folder.is_dir() and not folder.is_symlink():
                left = filter(_is_aside, files.files_in(folder))
                files.remove_folder(folder, [*self._names, *left])
            else:
                files.remove_file(folder)

    def _restored(self, mark: Mark) -> dict[str, dict[str, Tensor]] | None:
        """The tensors of a mark, with its data files taken up; None if something is damaged."""
        data = {name: DataFile(self.root / name) for name in mark.data}
        if not all(file.restore(mark.data[name]) for name, file in data.items()):
            return None
        found = {}
        for name, kept in mark.kept.items():
            tensors = _loaded(self.root / kept.name, kept)
            if tensors is None:
                return None
            found[name] = tensors
        self.data = data
        return found

    def _read_marks(self) -> list[Mark]:
        """The marks that are whole, newest first."""
        found = []
        for path in (self.root / _journal(order) for order in (0, 1)):
            try:
                found.append(read(Mark, opened(read_json(path)), "mark"))
            except UserError:
                if path.exists():
                    self.note = "the last mark of an interrupted run is damaged; it goes on from the one before"
        return sorted(found, key=lambda mark: mark.order, reverse=True)

    def _is_ours(self, mark: Mark) -> bool:
        return (mark.version, mark.step, mark.inputs) == (__version__, self.step, self.inputs)

    def _take(self) -> None:
        """Make the folder, and hold its lock."""
        try:
            files.make_folder(self.root)
            while True:
                self._lock = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._holds():
                    return
                self.close()  # the process that held it has just removed it
                files.make_folder(self.root)
        except BlockingIOError as error:
            self.close()
            raise OutputError(f"{self.out}: another process is writing it", do="wait for it, or stop it") from error
        except OSError as error:
            self.close()
            raise _unwritable(self.out, error) from error

    def _holds(self) -> bool:
        try:
            there, mine = os.stat(self.root / LOCK), os.fstat(self._lock)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _check_own(self) -> None:
        """Raise OutputError for a folder of this name that is not ours."""
        try:
            if not stat.S_ISDIR(os.lstat(self.root).st_mode):
                raise _foreign(self.root, "it is no folder")
            for name in os.listdir(self.root):
                if not OWN.fullmatch(name) and not _is_aside(name):
                    raise _foreign(self.root, f"it holds {name}")
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:  # a name that is too long, a folder that may not be read
            raise _unwritable(self.out, error) from error

    def check_foreign(self) -> None:
        """Raise OutputError if a folder in here holds a file that nobody noted."""
        for folder in (self.folder, self.root / OLD):
            if folder.is_symlink():
                raise _foreign(self.root, f"{folder.name} is a link")
            for name in files.files_in(folder):
                if name not in self._names and not _is_aside(name):
                    raise _foreign(self.root, f"it holds {folder.name}/{name}")

    def _noted(self) -> Iterator[str]:
        """The names of files that are ours. The last line may be torn: its file was never made."""
        path = self.root / NAMES
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
            try:
                name = parse_json(line)
            except ValueError:
                continue
            if isinstance(name, str):
                yield name


def work_folder(out: Path) -> Path:
    """The folder where the output `out` is made."""
    return out.with_name(out.name + END)


def _is_aside(name: str) -> bool:
    """Whether a path ends in a name that `files.aside` makes."""
    return ASIDE.fullmatch(Path(name).name) is not None


def _unwritable(out: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{out}: cannot write there ({error.strerror})", expected="a writable place", do="choose another --out"
    )


def _journal(order: int) -> str:
    return f"journal.{order % 2}.json"


def _foreign(folder: Path, why: str) -> OutputError:
    return OutputError(
        f"{folder} is where this output is made, and {why}",
        expected="no such folder, or what an interrupted run of this tool left",
        do="move what is yours away, or choose another --out",
    )


def _loaded(path: Path, kept: Kept) -> dict[str, Tensor] | None:
    """The tensors of a file; None if it is not what was kept."""
    from safetensors import SafetensorError  # torch, which a build does without
    from safetensors.torch import load_file

    try:
        whole = path.stat().st_size == kept.size and files.sha256(path) == kept.sha256
        return load_file(path) if whole else None
    except (OSError, SafetensorError):
        return None
