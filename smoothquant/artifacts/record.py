"""Read JSON into frozen dataclasses, strictly, and write it back.

An unknown key, a missing key and a value of another type are errors that name the place. A field with a default may be
missing. The types may be str, int, float, bool, None, Any, unions, tuple[X, ...], Mapping[str, X] and records, and
Annotated[X, EXPECTATION] for those of a range (`smoothquant.values`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from smoothquant.errors import UserError
from smoothquant.values import FLAG, LIST, NAME, NUMBER, OBJECT, WHOLE, Expectation, shown

T = TypeVar("T")
DO = "make the folder again with this version"
LEAVES: Mapping[Any, Expectation] = {str: NAME, int: WHOLE, float: NUMBER, bool: FLAG}


def read(kind: type[T], content: object, where: str) -> T:
    """The record with this JSON content. where: the name of the content in errors. Raises UserError if it does not
    fit."""
    return _read(kind, content, where)


def as_json(record: Any) -> dict[str, Any]:
    """A record as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(record)))


def _read(kind: Any, content: object, where: str) -> Any:
    if kind is Any:
        return content
    if dataclasses.is_dataclass(kind):
        return _record(kind, content, where)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        _expect(parts[1], where, content)
        return _read(parts[0], content, where)
    if origin in (Union, types.UnionType):
        if content is None and type(None) in parts:
            return None
        *others, last = (part for part in parts if part is not type(None))
        for part in others:
            with contextlib.suppress(UserError):
                return _read(part, content, where)
        return _read(last, content, where)
    if origin is tuple:
        _expect(LIST, where, content)
        return tuple(_read(parts[0], each, f"{where}[{n}]") for n, each in enumerate(content))  # type: ignore[arg-type, var-annotated]
    if origin is Mapping:
        _expect(OBJECT, where, content)
        return {key: _read(parts[1], value, f"{where}.{key}") for key, value in content.items()}  # type: ignore[attr-defined]
    _expect(LEAVES[kind], where, content)
    return content


def _record(kind: Any, content: object, where: str) -> Any:
    _expect(OBJECT, where, content)
    assert isinstance(content, dict)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unset = dataclasses.MISSING
    for name in content.keys() - fields.keys():
        raise UserError(f"{where}: unknown key {name!r}", expected=f"one of {', '.join(fields)}", do=DO)
    for name, field in fields.items():
        if name not in content and field.default is unset and field.default_factory is unset:
            raise UserError(f"{where}: key {name!r} is missing", expected=f"all of {', '.join(fields)}", do=DO)
    hints = get_type_hints(kind, include_extras=True)
    return kind(**{name: _read(hints[name], value, f"{where}.{name}") for name, value in content.items()})


def _expect(rule: Expectation, where: str, content: object) -> None:
    if not rule.holds(content):
        raise UserError(f"{where}: {shown(content)}", expected=rule.expected, do=DO)
