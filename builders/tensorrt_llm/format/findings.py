"""Findings about a TensorRT-LLM checkpoint, which `smoothquant check` prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ERROR, WARNING = "error", "warning"
CONFIG = "config.json"


@dataclass(frozen=True)
class FormatFinding:
    """One fault of a checkpoint, or one doubt about it.

    severity: ERROR if readers of the folder refuse it or compute nonsense, or else WARNING. where: the file, and the
    key or tensor in it. what: the fault. expected: the right value.
    """

    severity: str
    where: str
    what: str
    expected: str = ""

    @property
    def sentence(self) -> str:
        """The finding in one line."""
        found = f"{self.where}: {self.what}" + (f"; expected {self.expected}" if self.expected else "")
        return found.replace("\n", " ")  # a key may hold one


def errors(findings: Iterable[FormatFinding]) -> list[FormatFinding]:
    """The findings that are errors."""
    return [finding for finding in findings if finding.severity == ERROR]


def config_error(key: str, what: str, expected: str = "") -> FormatFinding:
    """An error in config.json at a key."""
    return FormatFinding(ERROR, f"{CONFIG} {key}", what, expected)


def config_warning(key: str, what: str, expected: str = "") -> FormatFinding:
    """A warning about a key of config.json."""
    return FormatFinding(WARNING, f"{CONFIG} {key}", what, expected)
