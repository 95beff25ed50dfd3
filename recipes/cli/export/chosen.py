"""The targets of one pass: --target NAME[:OPTION=VALUE,...], given once for each.

The options are those of `smoothquant export NAME`, without their dashes. One that takes no value stands alone:

    --target w8a8    --target onnx:act=both,dtype=fp16    --target trtllm:tp=2,no-plugins

A part that is no option goes on with the value before it: --target w8a8:act=per-tensor,keep-float=o,down
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.cli.export.target import ExportTarget
from smoothquant.errors import UserError


@dataclass(frozen=True)
class Chosen:
    """A target with its options. words: as a user gave them. out: its folder."""

    target: ExportTarget
    options: argparse.Namespace
    words: str
    out: str

    def within(self, arguments: argparse.Namespace) -> argparse.Namespace:
        """All options of its export. arguments: those that all targets of a pass share."""
        return argparse.Namespace(**(vars(arguments) | vars(self.options) | {"out": self.out}))


class TargetOptions(argparse.ArgumentParser):
    """The options of a target, by their names without dashes in `known`."""

    def __init__(self, target: ExportTarget) -> None:
        super().__init__(add_help=False, exit_on_error=False)
        self.known: dict[str, argparse.Action] = {}
        target.add_options(self)

    def add_argument(self, *names: Any, **facts: Any) -> argparse.Action:
        action = super().add_argument(*names, **facts)
        self.known[names[0].removeprefix("--")] = action
        return action

    def form(self, name: str) -> str:
        """How an option is written, with the values that it takes."""
        action = self.known[name]
        values = "|".join(map(str, action.choices)) if action.choices else action.metavar
        return name if action.nargs == 0 else f"{name}={values}"


def chosen(spelled: Sequence[str], targets: Sequence[ExportTarget], out: str) -> list[Chosen]:
    """The targets that --target names, each in its folder in `out`. Raises UserError for one that is not known or is
    given twice, and for an option or a value that its target does not know."""
    by_name = {target.name: target for target in targets}
    found: dict[str, Chosen] = {}
    for words in spelled:
        name, _, options = words.partition(":")
        if name not in by_name:
            raise UserError(f"--target {words}: no target {name!r}", expected=f"one of {', '.join(by_name)}")
        if name in found:
            raise UserError(
                f"--target {found[name].words} and --target {words}",
                expected="each target once: its folder has its name",
                do=f"make the other one by itself: smoothquant export {name}",
            )
        parsed = _parsed(TargetOptions(by_name[name]), words, options)
        found[name] = Chosen(by_name[name], parsed, words, f"{out}/{name}")
    return list(found.values())


def _parsed(parser: TargetOptions, words: str, options: str) -> argparse.Namespace:
    """The options of a target after its name; words: both."""
    namespace, seen = parser.parse_args([]), set()
    for name, value in _pairs(parser, options):
        if name not in parser.known:
            known = ", ".join(map(parser.form, parser.known))
            raise UserError(f"--target {words}: no option {name!r}", expected=f"of {known}")
        if name in seen:
            raise UserError(f"--target {words}: {name} is given twice", expected="each option once")
        seen.add(name)
        try:
            parser.parse_known_args([f"--{name}" if value is None else f"--{name}={value}"], namespace)
        except argparse.ArgumentError as error:
            given = name if value is None else f"{name}={value}"
            raise UserError(f"--target {words}: {given} cannot be", expected=parser.form(name)) from error
    return namespace


def _pairs(parser: TargetOptions, options: str) -> Iterator[tuple[str, str | None]]:
    """Names of options, and their values; None for one that stands alone."""
    pairs: list[tuple[str, str | None]] = []
    for part in options.split(",") if options else ():
        name, equals, value = part.partition("=")
        if not equals and name not in parser.known and pairs and pairs[-1][1] is not None:
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]},{part}")
        else:
            pairs.append((name, value if equals else None))
    yield from pairs
