"""Protocol buffers' text format, written from plain values: as much of it as a config.pbtxt needs.

str -> "quoted"    Name -> BARE    bool, int -> as they are    dict -> { ... }    list -> the field again and again
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping


class Name(str):
    """The value of an enum: TYPE_INT32, KIND_CPU."""


def dumps(message: Mapping[str, object]) -> str:
    """A message as text."""
    return "".join(f"{line}\n" for line in _lines(message))


def _lines(message: Mapping[str, object]) -> Iterator[str]:
    for field, value in message.items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, Mapping):
                yield f"{field} {{"
                yield from (f"  {line}" for line in _lines(one))
                yield "}"
            else:
                yield f"{field}: {_scalar(one)}"


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (Name, int)):
        return str(value)
    assert isinstance(value, str), value
    return json.dumps(value, ensure_ascii=False)  # the escapes that JSON has are protocol buffers' too
