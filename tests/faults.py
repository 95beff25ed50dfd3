"""What can be wrong with a small file that somebody else may have written, whatever it is to say.

FAULTS: name -> a function that puts it at a path, where nothing is. WORDS: what an error says of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path


def _hole(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


def _written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


_TABLE: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "list": (_written(b"[1]"), "not a JSON object"),
    "number": (_written(b"7"), "not a JSON object"),
    "null": (_written(b"null"), "not a JSON object"),
    "string": (_written(b'"x"'), "not a JSON object"),
    "empty": (_written(b""), "not JSON"),
    "cut off": (_written(b'{"a": 1'), "not JSON"),
    "deep list": (_written(b"[" * 100_000), "nested too deep"),
    "deep object": (_written(b'{"a":' * 100_000), "nested too deep"),
    "deep": (_written(b'{"a":' + b"[" * 100 + b"]" * 100 + b"}"), "nested too deep"),
    "surrogate": (_written(b'{"a": "\\ud800"}'), "half of a surrogate pair"),
    "surrogate in a key": (_written(b'{"\\uDC80": 1}'), "half of a surrogate pair"),
    "huge number": (_written(b'{"a": 1' + b"0" * 10_000 + b"}"), "a number of 10001 digits"),
    "not UTF-8": (_written(b'{"a": "\xff"}'), "not UTF-8"),
    "UTF-16": (_written('{"a": 1}'.encode("utf-16")), "not UTF-8"),
    "byte order mark": (_written(b'\xef\xbb\xbf{"a": 1}'), "not JSON"),
    "NUL": (_written(b'{"a": 1}\0'), "not JSON"),
    "NULs": (_written(bytes(1000)), "not JSON"),
    "pipe": (lambda path: os.mkfifo(path), "no regular file"),
    "folder": (lambda path: path.mkdir(), "no regular file"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    "loop": (lambda path: path.symlink_to(path), "cannot be read"),
    "hole": (_hole, f"{2**40} bytes"),
}
FAULTS = {name: make for name, (make, _) in _TABLE.items()}
WORDS = {name: words for name, (_, words) in _TABLE.items()}
