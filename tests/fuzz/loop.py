"""Trials with seeds of their own, counted by outcome."""

from __future__ import annotations

import gc
import resource
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from smoothquant.errors import UserError

SECONDS = 60  # that one trial may take
MEMORY = 4 * 2**30  # bytes of address space that trials may take beyond what is taken when they begin
REFUSED, ACCEPTED, ALONE, DIFFERENT, LOST, TRACEBACK = (
    "refused",
    "accepted",
    "accepted alone",
    "silent differences",
    "lost files",
    "tracebacks",
)
OUTCOMES = {  # whether it is a defect
    REFUSED: False,
    ACCEPTED: False,
    ALONE: True,
    DIFFERENT: True,
    LOST: True,
    TRACEBACK: True,
}


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. name: of OUTCOMES. told: what was said, or what differs, in a line."""

    name: str
    told: str = ""


class StuckError(Exception):
    """A trial took too long."""


# Damages something below an empty folder as the random numbers say, uses it, and returns the outcome. A UserError that
# it lets through is a refusal, any other exception a traceback.
Trial = Callable[[Random, Path], Outcome]


@dataclass
class Report:
    """Outcomes of one kind. defects: number of the trial and what it told."""

    counts: Counter[str] = field(default_factory=Counter)
    defects: list[tuple[int, Outcome]] = field(default_factory=list)

    def add(self, number: int, outcome: Outcome) -> None:
        self.counts[outcome.name] += 1
        if OUTCOMES[outcome.name]:
            self.defects.append((number, outcome))


def fuzz(kinds: Mapping[str, Trial], seed: int, proceed: Callable[[int], bool]) -> dict[str, Report]:
    """A report for each kind. proceed: whether a trial of this number is still wanted, asked before each round."""
    reports, number = {name: Report() for name in kinds}, 0
    while proceed(number):
        for name, trial in kinds.items():
            reports[name].add(number, attempt(trial, name, seed, number))
        number += 1
    return reports


def attempt(trial: Trial, name: str, seed: int, number: int) -> Outcome:
    """The outcome of one trial; equal arguments damage the same."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        try:
            with _bounded():
                return trial(Random(f"{seed} {name} {number}"), Path(folder))
        except UserError as error:
            return (
                Outcome(TRACEBACK, f"several lines: {error!r}") if "\n" in str(error) else Outcome(REFUSED, str(error))
            )
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return Outcome(TRACEBACK, f"{told} ({Path(place.filename).name}:{place.lineno})")
        finally:
            gc.collect()  # models that hold themselves hold their mapped files too


def until(minutes: float) -> Callable[[int], bool]:
    """For `fuzz`: so many minutes from now."""
    end = time.monotonic() + 60 * minutes
    return lambda number: time.monotonic() < end


def table(reports: Mapping[str, Report]) -> Iterator[str]:
    """Lines of a table, one for each kind."""
    yield f"{'kind':12}{'trials':>8}" + "".join(f"{name:>20}" for name in OUTCOMES)
    for kind, report in reports.items():
        counts = "".join(f"{report.counts[name]:>20}" for name in OUTCOMES)
        yield f"{kind:12}{report.counts.total():>8}{counts}"


def limit_memory() -> None:
    """Let an allocation that is out of all proportion fail in this process, instead of filling the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))


@contextmanager
def _bounded() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise StuckError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
