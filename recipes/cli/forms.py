"""A command with several forms, of which an option chooses one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """The parser of a command. forms: option -> the parser of the whole command where that option is given, at any
    place among its words."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.forms: dict[str, argparse.ArgumentParser] = {}

    def parse_known_args(  # type: ignore[override]  # its overloads differ in the type of the namespace alone
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        given = sys.argv[1:] if args is None else list(args)
        for option, form in self.forms.items():
            if any(word.partition("=")[0] == option for word in given):
                return form.parse_known_args(given, namespace)
        return super().parse_known_args(given, namespace)
