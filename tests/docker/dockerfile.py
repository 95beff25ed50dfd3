"""A Dockerfile, read into its stages: the instructions that our files use, as BuildKit reads them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

INSTRUCTIONS = (
    "",
    "ARG",
    "FROM",
    "RUN",
    "COPY",
    "ENV",
    "WORKDIR",
    "USER",
    "EXPOSE",
    "HEALTHCHECK",
    "ENTRYPOINT",
    "CMD",
)


@dataclass(frozen=True)
class Stage:
    """A stage. base: the image behind FROM. steps: an instruction, and what stands behind it."""

    base: str
    steps: tuple[tuple[str, str], ...]


def stages(text: str) -> dict[str, Stage]:
    """The stages of a file, by name; one without a name has its number. Arguments before the first are left out.

    Raises ValueError for a word that is no instruction.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, Stage] = {}
    steps: list[tuple[str, str]] = []
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word not in INSTRUCTIONS:
            raise ValueError(f"{word}: no instruction that is known here")
        if word == "FROM":
            base, *name = re.split(r"\s+AS\s+", rest.strip(), flags=re.IGNORECASE)
            steps = []
            found[name[0] if name else str(len(found))] = Stage(base, ())
        elif word:
            steps.append((word, rest.strip()))
        if found:
            last = next(reversed(found))
            found[last] = Stage(found[last].base, tuple(steps))
    return found


def assignments(rest: str) -> dict[str, str]:
    """What ENV sets."""
    return dict(part.split("=", 1) for part in shlex.split(rest))
