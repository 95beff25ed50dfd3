"""What is wrong with a TensorRT-LLM checkpoint: findings, as `smoothquant check` gives them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ERROR, WARNING = "error", "warning"
CONFIG = "config.json"


@dataclass(frozen=True)
class FormatFinding:
    """One thing that is wrong, or likely to be.

    severity: ERROR, whatever reads the folder will refuse it or compute nonsense; or WARNING.
    where: the file, and the key or tensor in it. what: what was found there. expected: what would have been right.
    """

    severity: str
    where: str
    what: str
    expected: str = ""

    @property
    def sentence(self) -> str:
        """The finding in one line."""
        return f"{self.where}: {self.what}" + (f"; expected {self.expected}" if self.expected else "")


def errors(findings: Iterable[FormatFinding]) -> list[FormatFinding]:
    """Those that are errors."""
    return [finding for finding in findings if finding.severity == ERROR]


def config_error(key: str, what: str, expected: str = "") -> FormatFinding:
    """An error in config.json."""
    return FormatFinding(ERROR, f"{CONFIG} {key}", what, expected)


def config_warning(key: str, what: str, expected: str = "") -> FormatFinding:
    """A doubt about config.json."""
    return FormatFinding(WARNING, f"{CONFIG} {key}", what, expected)
