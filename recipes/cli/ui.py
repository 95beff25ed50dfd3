"""What a command shows: progress on stderr, results on stdout as tables or, with --json, as one JSON object."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # what a terminal obeys and does not show
EVERY = 30  # seconds between lines of progress in a log


class Piped(Console):
    """A console whose reader may go away, as in `smoothquant recipes | head -1`: BrokenPipeError, for all to see."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def printable(text: str, keep: str = "") -> str:
    """The text with control characters as escapes, so that no name of a file or a tensor commands the terminal.

    keep: those that stay, as in "\\n". Characters that change the direction of a line count too.
    """
    return CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


class Ui:
    """Where a command writes. json: print results as JSON. quiet: show no progress. mute: write nothing at all, since
    another process of the same run does."""

    def __init__(self, *, json: bool = False, quiet: bool = False, mute: bool = False) -> None:
        self.json, self.quiet = json and not mute, quiet or mute
        self.out = Piped(width=None if sys.stdout.isatty() else 120, quiet=mute)
        self.err = Piped(stderr=True, quiet=mute)
        self._subject = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Show what the other rooms log, while a command runs."""
        logger = logging.getLogger("smoothquant")
        handler = _Notes(self)
        self.unchanged: dict[str, str] = {}  # outputs that were already there, and what is to be said of them
        logger.addHandler(handler)
        level = logger.level
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            for line in self.unchanged.values():
                self.note(line)

    @contextmanager
    def about(self, subject: str) -> Iterator[None]:
        """Let notes and warnings begin with what they are about; empty for the command as a whole."""
        self._subject = f"{subject}: " if subject else ""
        try:
            yield
        finally:
            self._subject = ""

    def done(self, out: str, text: str) -> None:
        """Say what a command has made; where it was already there, that."""
        self.say(self.unchanged.pop(str(Path(out)), text))

    @contextmanager
    def progress(self, what: str, *, ends: bool = True) -> Iterator[Callable[[int, int], None]]:
        """A progress bar on a terminal, lines in a log. Yields update(done, total). An error removes the bar.

        ends: whether a log says the end of work that was too quick for any other line.
        """
        if self.quiet:
            yield lambda done, total: None
            return
        if not self.err.is_terminal:
            yield from self._lines(what, ends)
            return
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err) as bar:
            task = bar.add_task(what, total=None)
            try:
                yield lambda done, total: bar.update(task, completed=done, total=total)
            except BaseException:
                bar.live.transient = True  # the error alone stays on the screen
                raise

    def _lines(self, what: str, ends: bool) -> Iterator[Callable[[int, int], None]]:
        """A line every `EVERY` seconds, and one at the end."""
        start = said = time.monotonic()
        reached = (0, 0)

        def line() -> None:
            done, total = reached
            self.note(f"{what}: {done} of {total}, {timedelta(seconds=round(said - start))}")

        def update(done: int, total: int) -> None:
            nonlocal said, reached
            reached = (done, total)
            if time.monotonic() - said >= EVERY:
                said = time.monotonic()
                line()

        yield update
        if reached[1] and (ends or said > start):  # else there was nothing to do, or it was done at once
            said = time.monotonic()
            line()

    def note(self, text: str) -> None:
        """A line on stderr about what is going on."""
        if not self.quiet:
            self.err.print(printable(f"{self._subject}{text}"), markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line on stderr that nobody should miss."""
        self.err.print(f"warning: {self._subject}{printable(text)}", markup=False, highlight=False, soft_wrap=True)

    def result(self, content: dict) -> None:
        """The result of a command for programs: printed only with --json."""
        if self.json:
            json.dump(content, sys.stdout, indent=2)
            sys.stdout.write("\n")

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
        """A result for people: not printed with --json."""
        if self.json:
            return
        table = Table(
            title=escape(printable(title)), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
        )
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left", no_wrap=not index, overflow="fold")
        for row in rows:
            table.add_row(*(escape(printable(cell)) for cell in row))
        self.out.print(table)
        if caption:
            self.out.print(caption, markup=False, highlight=False)

    def say(self, text: str) -> None:
        """A line of result for people: not printed with --json."""
        if not self.json:
            self.out.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def write(self, text: str) -> None:
        """Part of a text for people, as it comes: not printed with --json. Its lines and tabs stay."""
        if not self.json:
            sys.stdout.write(printable(text, keep="\n\t"))
            sys.stdout.flush()


class _Notes(logging.Handler):
    """Shows log records as notes, and those of a warning's level as warnings."""

    def __init__(self, ui: Ui) -> None:
        super().__init__(logging.INFO)
        self.ui = ui

    def emit(self, record: logging.LogRecord) -> None:
        if output := getattr(record, "unchanged", ""):
            self.ui.unchanged[output] = record.getMessage()
        elif record.levelno >= logging.WARNING:
            self.ui.warn(record.getMessage())
        else:
            self.ui.note(record.getMessage())


def listed(names: Sequence[str], most: int = 16) -> str:
    """At most `most` names in a line, "a, b, c", and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
