r"""Write plain values in Protocol buffers' text format, as far as a config.pbtxt needs it.

    str -> "quoted"    Name -> BARE    bool -> true, false    int -> digits
    dict -> { ... }    Line -> { ... } on one line    list -> the field once for each entry

A string holds its characters in UTF-8. A backslash stands before a quote and a backslash; control characters are three
octal digits, or \n, \r, \t (https://protobuf.dev/reference/protobuf/textformat-spec, "String Literals").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from smoothquant.errors import UserError

Message = dict[str, object]
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


class Name(str):
    """The value of an enum: TYPE_INT32, KIND_CPU."""


class Line(Message):
    """A message that is written on one line."""


def dumps(message: Mapping[str, object], notes: Iterable[str] = ()) -> str:
    """The text of a message. notes: comments for the head of the text.

    Raises UserError for a string that UTF-8 cannot hold, such as the path of a file with another encoding.
    """
    comments = (f"# {_printable(line)}" for note in notes for line in note.splitlines())
    return "".join(f"{line}\n" for line in [*comments, *_lines(message)])


def entries(values: Mapping[str, object]) -> list[Message]:
    """The value of a map field: a message for each key."""
    return [{"key": key, "value": value} for key, value in values.items()]


def parameters(values: Mapping[str, str]) -> list[Message]:
    """The value of ModelConfig's `parameters`."""
    return entries({key: {"string_value": value} for key, value in values.items()})


def _lines(message: Mapping[str, object]) -> Iterator[str]:
    for field, value in message.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Line):
                yield f"{field} {{ {' '.join(_lines(one))} }}"
            elif isinstance(one, Mapping):
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
    return '"' + _printable(value.replace("\\", r"\\").replace('"', r"\"")) + '"'


def _printable(text: str) -> str:
    """A text with its control characters escaped. Raises UserError for a text that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{text!a}: not a text in UTF-8", do="rename the file or folder") from error
    return CONTROL.sub(lambda found: SHORT.get(found[0], f"\\{ord(found[0]):03o}"), text)
