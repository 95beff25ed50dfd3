"""Large files that are written in place, with the SHA-256 of what is written."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from smoothquant import files


@dataclass(frozen=True)
class WrittenRange:
    """The bytes [begin, end) of a file, and their SHA-256."""

    begin: int
    end: int
    sha256: str


@dataclass(frozen=True)
class Written:
    """What has been written of a file: its first `length` bytes, with their SHA-256, and ranges beyond them."""

    length: int
    sha256: str
    beyond: tuple[WrittenRange, ...] = ()


class DataFile:
    """A large file that is written in place, in any order.

    A thread takes the SHA-256 of the bytes from the beginning of the file, while later ones are written. So a process
    that goes on where another one was interrupted knows what must be there, and the manifest has the file's digest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: list[tuple[int, int]] = []  # ranges [begin, end), sorted; none touches the next
        self._beyond: dict[tuple[int, int], str] = {}  # SHA-256 of ranges that do not begin the file
        self._forget()

    @property
    def is_new(self) -> bool:
        """Whether nothing has been written that another process left or this one wrote."""
        return not self._written

    @property
    def has_holes(self) -> bool:
        """Whether a part of the file has been written, and another has not."""
        return bool(self._written) and self._written != [(0, self.path.stat().st_size)]

    def reserve(self, nbytes: int, *, fill: bool = False) -> None:
        """Give the file its length. What was written stays. fill: take the room on the disk now."""
        files.DISK.reserve(self.path, nbytes, fill=fill)

    def changed(self) -> None:
        """Count the whole file as written: a mapping of it was changed."""
        self.unwritten()
        self._written = _merged([(0, self.path.stat().st_size)])

    def unwritten(self) -> None:
        """Count nothing of the file as written: what it holds is of no more use."""
        self._forget()
        self._written, self._beyond = [], {}

    def write(self, pieces: Iterable[files.Piece], begin: int, end: int) -> None:
        """Write pieces that fill the range [begin, end), with zeros between them where the file is new."""
        if begin < self._asked:  # it was hashed already
            self._forget()
        files.DISK.write(self.path, pieces)
        self._beyond = {found: digest for found, digest in self._beyond.items() if found[1] <= begin or end <= found[0]}
        self._written = _merged([*self._written, (begin, end)])
        self._follow()

    def written(self) -> Written:
        """What has been written so far, once it is on the disk."""
        self._follow(0)
        files.DISK.sync(self.path)  # while the thread takes the digest
        ranges = self._written[1:] if self._prefix else self._written
        self._beyond = {found: self._beyond.get(found) or files.sha256(self.path, *found) for found in ranges}
        beyond = tuple(WrittenRange(begin, end, digest) for (begin, end), digest in self._beyond.items())
        return Written(self._prefix, self._digested(), beyond)

    def restore(self, there: Written) -> bool:
        """Take up what `written` gave another process. Returns whether the file holds it."""
        held = hashlib.sha256()
        try:
            files.feed(held, self.path, 0, there.length)
            if held.hexdigest() != there.sha256:
                return False
            if any(files.sha256(self.path, found.begin, found.end) != found.sha256 for found in there.beyond):
                return False
        except OSError:
            return False
        self._forget()
        self._digest, self._asked = held, there.length
        self._beyond = {(found.begin, found.end): found.sha256 for found in there.beyond}
        self._written = _merged([(0, there.length), *self._beyond])
        return True

    def sha256(self) -> str:
        """SHA-256 of the whole file, 64 hex digits."""
        self._follow(0)
        if self._prefix != os.stat(self.path).st_size:
            return files.sha256(self.path)
        return self._digested()

    @property
    def _prefix(self) -> int:
        """End of what is written from the beginning on."""
        return self._written[0][1] if self._written and self._written[0][0] == 0 else 0

    def _digested(self) -> str:
        """SHA-256 of what the thread was asked for. OSError if it could not read it."""
        for future in self._futures:
            future.result()
        self._futures.clear()
        return self._digest.hexdigest()

    def _follow(self, step: int = files.CHUNK) -> None:
        """Have the thread take what has been written since."""
        if self._prefix - self._asked > step:
            self._futures.append(_hasher().submit(files.feed, self._digest, self.path, self._asked, self._prefix))
            self._asked = self._prefix

    def _forget(self) -> None:
        self._digest = hashlib.sha256()
        self._asked = 0  # bytes that the thread has taken or is going to take
        self._futures: list[Future[None]] = []


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges [begin, end), sorted; those that touch or overlap are one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif begin < end:
            merged.append((begin, end))
    return merged


@functools.cache
def _hasher() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="sha256")


os.register_at_fork(after_in_child=_hasher.cache_clear)  # a forked process has no thread but its own
