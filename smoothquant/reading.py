"""Read small files that others may have written: JSON, and texts as a whole.

Only a regular file is opened (a pipe may never end, /dev/zero never does), and none that is larger than `LARGEST`: a
hole of a terabyte takes no room on a disk, and all of it in memory.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from smoothquant.errors import REFUSALS, UserError

LARGEST = 64 << 20  # bytes; an index of 100,000 tensors has some ten million
DEPTH = 64  # of objects and lists in each other
DIGITS = 100  # of a whole number: far above every size and seed, and no more than a float can hold
MAKE_AGAIN = "make or copy it again"


def read_bytes(path: Path, *, most: int = LARGEST) -> bytes:
    """The content of a small file.

    Raises UserError if there is no such file, or one that is not regular or has more than `most` bytes. OSError, which
    names the file, for what the machine refuses: no permission, no room.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # NONBLOCK: a pipe is opened at once
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in its name
        if getattr(error, "errno", 0) in REFUSALS:
            raise
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        _check_small(path, os.fstat(descriptor), most)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)


def check_small(path: Path, *, most: int = LARGEST) -> None:
    """Raise UserError if something is there that is not regular or has more than `most` bytes: before a library reads
    it."""
    if path.exists():
        _check_small(path, path.stat(), most)


def _check_small(path: Path, found: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: no regular file", expected="a file")
    if found.st_size > most:
        raise UserError(f"{path}: {found.st_size} bytes", expected=f"at most {most}")


def read_text(path: Path) -> str:
    """The text of a small file. Raises UserError if it is not UTF-8, and what `read_bytes` raises."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error


def parse_json(text: str) -> Any:
    """The value that a JSON text writes.

    Raises ValueError, which says why, if it is not JSON, is nested too deep, or holds a whole number of more than
    `DIGITS` digits.
    """
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_object(
    path: Path, error: type[UserError] = UserError, *, wanted: str = "a JSON object", do: str = MAKE_AGAIN
) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises `error` if there is none, or if it holds half of a surrogate pair, which nobody can write again; OSError for
    what the machine refuses. wanted: what is right; do: what a user can do then.
    """
    try:
        text = read_text(path)
        found = parse_json(text)
        _check_depth(found)
        if "\\u" in text:  # UTF-8 itself has no half of a pair
            json.dumps(found, ensure_ascii=False).encode()
    except UserError as fault:
        raise error(fault.what, expected=fault.expected or wanted, do=do) from fault
    except UnicodeEncodeError as fault:
        half = fault.object[fault.start]
        raise error(f"{path}: half of a surrogate pair, {half!a}, is no character", expected=wanted, do=do) from fault
    except ValueError as fault:
        raise error(f"{path}: not JSON ({fault})", expected=wanted, do=do) from fault
    if not isinstance(found, dict):
        raise error(f"{path}: not a JSON object", expected=wanted, do=do)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is none to read. OSError for one that the machine does not let us read."""
    try:
        return read_object(path)
    except UserError:
        return {}


def _whole(text: str) -> int:
    if len(digits := text.lstrip("-")) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(text)


def _check_depth(value: Any, left: int = DEPTH) -> None:
    """Raise ValueError for a value that is nested deeper than whoever walks through it can follow."""
    if not left:
        raise ValueError("nested too deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, left - 1)
