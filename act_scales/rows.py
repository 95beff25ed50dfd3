"""The text of a row: of a line of JSON, or of a row of a dataset.

    {"text": "..."}                                             a text
    {"messages": [{"role": "user", "content": "..."}, ...]}     a conversation, as chat models are trained on
    {"conversations": [{"from": "human", "value": "..."}, ...]} the same in ShareGPT's form

Another field may be named; it holds a text or a conversation in either form. No field is guessed: the first string of
a row is as often its id or its URL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smoothquant.errors import UserError

FIELDS = ("text", "messages", "conversations")  # where a row has its text, in this order
FORMS = (("role", "content"), ("from", "value"))  # keys of a turn: who, and what
ROLES = {  # ShareGPT's names of who speaks -> the roles that chat templates know
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
}
SHOWN = 16  # fields of a row that an error lists


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation, {"role": ..., "content": ...}, and where they stand. A chat template makes its text."""

    turns: tuple[Mapping[str, str], ...]
    where: str


def read_row(row: Any, where: str, field: str | None = None) -> str | Conversation:
    """What a row says. where: its file and line, for errors. field: the one to read; default: the first of `FIELDS`.

    Raises UserError, which lists the row's fields, if the row is no object, or if the field is neither a text nor a
    conversation.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: no text in it", expected='an object, as in {"text": "..."}')
    for name in [field] if field else FIELDS:
        found = row.get(name)
        if isinstance(found, str):
            return _written(found, where)
        if isinstance(found, Sequence) and found and not isinstance(found, bytes):
            return Conversation(tuple(_turn(turn, f"{where}, field {name!r}") for turn in found), where)
    fields = ", ".join(map(repr, list(row)[:SHOWN])) or "none"
    raise UserError(
        f"{where}: no text in {repr(field) if field else ' or '.join(FIELDS)}; its fields are {fields}",
        expected="a text, or a conversation of turns with role and content, or from and value",
        do="name the field that holds it: --text-field NAME",
    )


def _turn(turn: Any, where: str) -> dict[str, str]:
    """A turn in the form that chat templates take."""
    for who, what in FORMS if isinstance(turn, Mapping) else ():
        role, content = turn.get(who), _content(turn.get(what))
        if not isinstance(role, str) or content is None:
            continue
        if who == "from" and role not in ROLES:
            raise UserError(f"{where}: a turn from {role!r}", expected=f"from one of {', '.join(ROLES)}")
        return {"role": ROLES[role] if who == "from" else role, "content": _written(content, where)}
    found = f"with {', '.join(map(repr, turn))}" if isinstance(turn, Mapping) else f"that is {type(turn).__name__}"
    raise UserError(f"{where}: a turn {found}", expected="a role and a content, or a from and a value, that are texts")


def _content(content: Any) -> str | None:
    """The text of a turn: a string, or a list of parts {"type": "text", "text": ...}. None for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    parts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return "".join(parts) if len(parts) == len(content) else None


def _written(text: str, where: str) -> str:
    """The text. Raises UserError for half of a surrogate pair, of which no tokenizer can make a token."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half of a surrogate pair, {text[error.start]!a}, is no character",
            expected="text in Unicode",
            do="remove this row, or write it again with both halves",
        ) from error
    return text
