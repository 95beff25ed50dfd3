"""The one module that changes the disk. Every other module writes, renames and removes through it.

    DISK                     the operations themselves, one method for each that can be interrupted in between
    write_bytes and others   files that are there whole or not at all
    remove_folder            a folder of which every file is named

Tests put another `Disk` in the place of `DISK`, and end the process, or lose what was not synced, at any operation.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TextIO

from smoothquant.errors import OutputError

Piece = tuple[int, memoryview]  # offset in a file, and what is written there

CHUNK = 8 << 20  # bytes that are read at a time
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # of renameat2(2)
NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ENOTTY, errno.EXDEV)  # "this file system cannot"
FICLONE = 0x40049409  # ioctl_ficlone(2): share the blocks of another file
AT_FDCWD = -100


class Disk:
    """What can be done to a disk. Each method raises OSError."""

    def make_folder(self, path: Path) -> None:
        """Make one folder, in one that is there."""
        os.mkdir(path)

    def write(self, path: Path, pieces: Iterable[Piece], *, new: bool = False) -> None:
        """Write into a file that is there, or into a new one."""
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if new else 0)
        descriptor = os.open(path, flags, 0o666)
        try:
            for offset, content in pieces:
                done = 0
                while done < len(content):  # pwrite takes at most 2 GiB, and less on a disk that is almost full
                    done += os.pwrite(descriptor, content[done:], offset + done)
        finally:
            os.close(descriptor)

    def reserve(self, path: Path, nbytes: int, *, fill: bool = False) -> None:
        """Give a file its length. fill: take the room on the disk now, so that a full disk is an error here."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            os.ftruncate(descriptor, nbytes)
            if fill and nbytes:
                os.posix_fallocate(descriptor, 0, nbytes)
        finally:
            os.close(descriptor)

    def copy(self, source: Path, target: Path) -> None:
        """Make `target` a file of its own with the content of `source`; it shares blocks where the disk can do that."""
        with open(source, "rb") as old, open(target, "xb") as new:
            try:
                fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
            except OSError as error:
                if error.errno not in NOT_HERE:
                    raise
                shutil.copyfileobj(old, new, CHUNK)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file another name. A file that had this name is gone."""
        os.replace(source, target)

    def place(self, source: Path, target: Path) -> None:
        """Give a file or folder a name that nothing else has. FileExistsError or ENOTEMPTY if something does."""
        try:
            _renameat2(source, target, RENAME_NOREPLACE)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            if source.is_dir():
                os.rename(source, target)  # refuses a folder that holds something, and a file
            else:
                os.link(source, target)
                os.unlink(source)

    def exchange(self, one: Path, other: Path) -> None:
        """Exchange the names of two files or folders at one instant. OSError with an error of `NOT_HERE` where the
        system cannot."""
        _renameat2(one, other, RENAME_EXCHANGE)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def sync(self, path: Path) -> None:
        """Wait until the content of a file, or the entries of a folder, are on the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that has nothing to sync says so
                raise
        finally:
            os.close(descriptor)


DISK = Disk()


def _renameat2(source: Path, target: Path, flags: int) -> None:
    """renameat2(2). ENOSYS where the C library does not have it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(source), None, str(target))
    if function(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source), None, str(target))


def make_folder(path: Path) -> None:
    """Make a folder and those on the way to it, if they are not there."""
    if not path.is_dir():
        if path.parent != path:
            make_folder(path.parent)
        try:
            DISK.make_folder(path)
        except FileExistsError:
            if not path.is_dir():
                raise


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that it is there whole or not at all, even if the power fails."""
    with aside(path) as new:
        DISK.write(new, [(0, memoryview(content))], new=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, so that it is there whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping) -> None:
    """Write a JSON object so that it is there whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def open_log(path: Path) -> TextIO:
    """A text file that is written line by line, and may end anywhere."""
    return open(path, "w", encoding="utf-8")


@contextmanager
def scratch(place: Path | None = None) -> Iterator[Path]:
    """A folder for other programs to write in, outside of every output, which is gone afterwards. place: the folder
    that holds it; None for the system's own."""
    with tempfile.TemporaryDirectory(prefix="smoothquant-", dir=place) as folder:
        yield Path(folder)


def copy(source: Path, target: Path) -> None:
    """Make `target` a copy of its own of a regular file, there whole or not at all."""
    with aside(target) as new:
        DISK.copy(source, new)


def check_place(path: Path, option: str, given: str | Path) -> None:
    """Raise OutputError where no file could be written, before the work that it is to hold. path: of the file; folders
    on the way need not be there. option, given: what a user wrote for it."""
    if path.is_dir():
        raise OutputError(f"{option} {given}: a folder", expected="a file to write", do=f"choose another {option}")
    place = path.parent
    while not place.exists():
        place = place.parent
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise OutputError(
            f"{option} {given}: cannot write there ({error.strerror})",
            expected="a writable place",
            do=f"choose another {option}",
        ) from error


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A new name beside a file. What is written there takes the file's place; what a killed process of this name left
    is removed."""
    start = f".{path.name}.smoothquant-"
    new = path.with_name(f"{start}{os.getpid()}")
    for left in path.parent.glob(f"{_escaped(start)}*"):
        number = left.name.removeprefix(start)
        if re.fullmatch(r"\d+", number) and (int(number) == os.getpid() or not _alive(int(number))):
            DISK.unlink(left)
    try:
        yield new
        DISK.sync(new)
        DISK.replace(new, path)
        DISK.sync(path.parent)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def remove_file(path: Path) -> None:
    """Remove a file, if it is there."""
    with suppress(FileNotFoundError):
        DISK.unlink(path)


def remove_folder(folder: Path, names: Collection[str]) -> None:
    """Remove the files of a folder that are named, by their paths within it, and then every folder that is empty.

    OSError if the folder holds more: this module removes nothing that its callers do not name, and nothing outside of
    the folder, whatever they name: no name with "..", and nothing behind a link.
    """
    named = set(names)
    for name in filter(named.__contains__, files_in(folder)):
        remove_file(folder / name)
    for place, folders, _ in os.walk(folder, topdown=False):
        for inner in folders:
            path = Path(place, inner)
            if not path.is_symlink():
                with suppress(FileNotFoundError):
                    DISK.remove_folder(path)
    with suppress(FileNotFoundError):
        DISK.remove_folder(folder)


def files_in(folder: Path) -> Iterator[str]:
    """Paths, within a folder, of all that is no folder: files, links to whatever, sockets. Sorted."""
    found = []
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [str(Path(place, name).relative_to(folder)) for name in names + links]
    yield from sorted(found)


def is_within(name: str) -> bool:
    """Whether a path stays in the folder that it is relative to."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def sync_tree(folder: Path) -> None:
    """Wait until all files and folders in a folder, and it itself, are on the disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            DISK.sync(Path(place, name))
        DISK.sync(Path(place))


def sha256(path: Path, begin: int = 0, end: int | None = None) -> str:
    """SHA-256 of the bytes [begin, end) of a file, 64 hex digits. OSError if the file is shorter."""
    digest = hashlib.sha256()
    feed(digest, path, begin, os.stat(path).st_size if end is None else end)
    return digest.hexdigest()


def feed(digest: hashlib._Hash, path: Path, begin: int, end: int) -> None:
    """Have a digest take the bytes [begin, end) of a file. OSError if the file is shorter."""
    room = memoryview(bytearray(min(CHUNK, max(1, end - begin))))
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        while begin < end:
            count = file.readinto(room[: min(len(room), end - begin)])
            if not count:
                raise OSError(errno.EIO, f"ends before byte {end}", str(path))
            digest.update(room[:count])
            begin += count
