"""SHA-256 of files, remembered while they stay as they are.

A file counts as unchanged if its device, inode, size, and times of modification and of change are. (A copy that keeps
the time of modification, `cp -p`, has another inode and another time of change.) A file that changed within the clock's
grain of being read is not remembered: another change could leave it with the same times.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from smoothquant import cache, files
from smoothquant.errors import UserError
from smoothquant.reading import read_json

T = TypeVar("T")

GRAIN = 100_000_000  # nanoseconds: more than the grain of the times that file systems keep


@dataclass(frozen=True)
class Stamp:
    """What the system says of a file without reading it. Times are in nanoseconds."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp of a file. OSError if there is none."""
        found = os.stat(path)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def sha256(path: Path, *, again: bool = False) -> str:
    """SHA-256 of a file, 64 hex digits; from memory if the file has not changed since it was taken.

    again: read the file in any case. Raises UserError for a file that changes while it is read, OSError for one that
    cannot be read.
    """
    return remembered(path, "sha256", str, lambda: files.sha256(path), again=again)


def remembered(path: Path, what: str, kind: type[T], compute: Callable[[], T], *, again: bool = False) -> T:
    """What was computed from the content of a file, a JSON value; from memory if the file has not changed since.

    what: names it. kind: its type. again: compute it in any case. Raises UserError for a file that changes meanwhile.
    """
    stamp, began = Stamp.of(path), time.time_ns()
    known = _known(stamp)
    if not again and isinstance(known.get(what), kind):
        return known[what]
    found = compute()
    check_unchanged(path, stamp)
    _note(path, stamp, began, {**known, what: found})
    return found


def remember(path: Path, digest: str) -> None:
    """Note the SHA-256 of a file, as it is now."""
    stamp = Stamp.of(path)
    _note(path, stamp, time.time_ns(), {**_known(stamp), "sha256": digest})


def _known(stamp: Stamp) -> dict:
    """What is remembered of a file with this stamp."""
    try:
        found = read_json(_memory(stamp))
    except OSError:  # a cache of somebody else's
        return {}
    return {key: found[key] for key in found if key != "stamp"} if found.get("stamp") == asdict(stamp) else {}


def _note(path: Path, stamp: Stamp, read: int, content: dict) -> None:
    """Remember what was found in a file. read: when it was read, in nanoseconds since the epoch."""
    if max(stamp.modified, stamp.changed) > read - GRAIN:
        return
    try:
        files.make_folder(_memory(stamp).parent)
        files.write_json(_memory(stamp), {**content, "path": os.path.abspath(path), "stamp": asdict(stamp)})
    except (OSError, UnicodeError):
        pass  # a read-only home: the file is read again


def _memory(stamp: Stamp) -> Path:
    return cache.place("digests") / f"{stamp.device}-{stamp.inode}.json"


def check_unchanged(path: Path, stamp: Stamp) -> None:
    """Raise UserError if a file is no longer the one that had this stamp."""
    try:
        same = Stamp.of(path) == stamp
    except OSError:
        same = False
    if not same:
        raise UserError(
            f"{path} was changed while it was read",
            expected="files that stay as they are until the command ends",
            do="let nothing write there, and run the same command again",
        )


def combined(parts: dict[str, str]) -> str:
    """One SHA-256, 16 hex digits, over names and what belongs to them."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name} {parts[name]}\n".encode())
    return digest.hexdigest()[:16]
