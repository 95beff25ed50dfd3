"""Disks that end the process at a chosen operation; one of them also loses what was not on the disk yet.

`CountingDisk` counts operations. `DyingDisk` ends the process before operation N, or in the middle of it where it is a
write. `FailingPower` keeps, beside the real folder, what a disk would hold after a loss of power: of every file the
content at its last sync, and the changes of names in their order with the last sync of the folders that they touch. At
operation N it puts the folder into one of the states that such a disk may show, and ends the process.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoothquant.files import Disk, Piece

DIED = 77  # exit status of a process that came to its operation
BLOCK = 512  # bytes that a disk writes at once


class CountingDisk(Disk):
    """Counts the operations. names: of those that were done."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if name.startswith("_") or name not in vars(Disk) or not callable(found):
            return found

        def operation(*args: Any, **options: Any) -> Any:
            self.names.append(name)
            return self._do(name, found, *args, **options)

        return operation

    def _do(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return None if name == "sync" else function(*args, **options)  # the real disk need not be waited for


class DyingDisk(CountingDisk):
    """Ends the process at operation `at`, counted from 0. torn: a write is done by half before."""

    def __init__(self, at: int, *, torn: bool = False) -> None:
        super().__init__()
        self._at, self._torn = at, torn

    def _do(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if len(self.names) - 1 == self._at:
            if self._torn and name == "write":
                path, pieces = args
                function(path, _half(pieces), **options)
            self._die()
        return super()._do(name, function, *args, **options)

    def _die(self) -> None:
        os._exit(DIED)


def _half(pieces: Iterable[Piece]) -> list[Piece]:
    found = list(pieces)
    offset, content = found[len(found) // 2]
    return [*found[: len(found) // 2], (offset, content[: len(content) // 2])]


Names = dict[int, dict[str, int]]  # folder -> what its names stand for; files and folders are numbers
Slot = tuple[int, str, int | None]  # a folder, a name in it, and what it stands for from now on


@dataclass
class Change:
    """A change of names at one instant. durable: whether it is on the disk."""

    slots: tuple[Slot, ...]
    durable: bool = False

    def apply(self, names: Names) -> None:
        for folder, name, node in self.slots:
            entries = names.setdefault(folder, {})
            entries.pop(name, None)
            if node is not None:
                entries[name] = node


class FailingPower(DyingDisk):
    """Loses power at operation `at`. root: the folder that is on this disk. seed: chooses among the states that are
    possible. lying: the disk forgets what was synced, too."""

    def __init__(self, root: Path, at: int, seed: int, *, lying: bool = False) -> None:
        super().__init__(at)
        self._root, self._random, self._lying = root, random.Random(seed), lying
        self._names: Names = {0: {}}  # as the process sees them; 0 is the root
        self._synced: dict[int, bytes] = {}  # contents of files at their last sync
        self._count = 0
        self._read(root, 0)
        self._start = copy.deepcopy(self._names)
        self._changes: list[Change] = []

    def _do(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        found = super()._do(name, function, *args, **options)
        paths = [arg for arg in args if isinstance(arg, Path)]
        paths = paths[1:] if name == "copy" else paths  # what is copied may be on another disk
        if all(self._root in path.parents or path == self._root for path in paths):
            getattr(self, f"_after_{name}")(*paths)
        return found

    def _after_make_folder(self, path: Path) -> None:
        self._change((*self._slot(path), self._new(folder=True)))

    def _after_write(self, path: Path) -> None:
        if self._find(path) is None:
            self._change((*self._slot(path), self._new()))

    _after_reserve = _after_copy = _after_write

    def _after_replace(self, source: Path, target: Path) -> None:
        self._change((*self._slot(source), None), (*self._slot(target), self._find(source)))

    _after_place = _after_replace

    def _after_exchange(self, one: Path, other: Path) -> None:
        self._change((*self._slot(one), self._find(other)), (*self._slot(other), self._find(one)))

    def _after_unlink(self, path: Path) -> None:
        self._change((*self._slot(path), None))

    _after_remove_folder = _after_unlink

    def _after_sync(self, path: Path) -> None:
        node = self._find(path)
        if node is None or self._lying:
            return
        if node not in self._names:
            self._synced[node] = path.read_bytes()
        for change in self._changes:
            change.durable = change.durable or any(folder == node for folder, _, _ in change.slots)

    def _slot(self, path: Path) -> tuple[int, str]:
        folder = self._find(path.parent)
        assert folder is not None, path
        return folder, path.name

    def _find(self, path: Path) -> int | None:
        node: int | None = 0
        for part in path.relative_to(self._root).parts:
            node = None if node is None else self._names.get(node, {}).get(part)
        return node

    def _new(self, *, folder: bool = False) -> int:
        self._count += 1
        if folder:
            self._names[self._count] = {}
        return self._count

    def _change(self, *slots: Slot) -> None:
        self._changes.append(Change(slots))
        self._changes[-1].apply(self._names)

    def _read(self, place: Path, node: int) -> None:
        for path in place.iterdir():
            inner = self._new(folder=path.is_dir())
            self._names[node][path.name] = inner
            if path.is_dir():
                self._read(path, inner)
            else:
                self._synced[inner] = path.read_bytes()

    def _die(self) -> None:
        """Put one of the possible states in the place of the folder."""
        contents = dict(self._contents(self._root, 0))
        names = self._lost()
        for path in self._root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._make(self._root, 0, names, contents)
        super()._die()

    def _contents(self, place: Path, node: int) -> Iterable[tuple[int, bytes]]:
        """What files hold now, as the process sees them."""
        for name, inner in self._names[node].items():
            path = place / name
            if inner in self._names:
                yield from self._contents(path, inner)
            elif path.exists():
                yield inner, path.read_bytes()

    def _lost(self) -> Names:
        """Names after the loss: all changes up to some instant after the last durable one, in their order, as file
        systems with a journal have it; or durable ones alone."""
        last = max((number for number, change in enumerate(self._changes) if change.durable), default=-1)
        kept = self._changes[: self._random.randint(last + 1, len(self._changes))]
        if self._random.random() < 0.5:
            kept = [change for change in self._changes if change.durable]
        names = copy.deepcopy(self._start)
        for change in kept:
            change.apply(names)
        return names

    def _make(self, place: Path, node: int, names: Names, contents: dict[int, bytes]) -> None:
        for name, inner in names.get(node, {}).items():
            path = place / name
            if inner in self._names:
                path.mkdir()
                self._make(path, inner, names, contents)
            else:
                path.write_bytes(self._content(self._synced.get(inner), contents.get(inner)))

    def _content(self, synced: bytes | None, now: bytes | None) -> bytes:
        """What a file may hold: what was synced, what it held last, or blocks of both."""
        old = synced or b""
        if now is None or now == old:
            return old
        chosen = self._random.choice(["old", "new", "blocks"])
        if chosen != "blocks":
            return old if chosen == "old" else now
        starts = range(0, len(now), BLOCK)
        padded = old.ljust(len(now), b"\0")
        return b"".join(self._random.choice([now, padded])[start : start + BLOCK] for start in starts)
