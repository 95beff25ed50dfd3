"""Errors written for the person who meets them.

Every error that a user's input, machine or disk can cause is a `UserError`: one line that says what was
wrong, what was expected and what to do. The command line prints it without a traceback and exits with
`exit_code`; anything else that escapes is a defect of ours.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

# what a machine refuses for no fault of the file: permission, and room for one more open file or for its content
REFUSALS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class UserError(Exception):
    """A fault in what the tool was given.

    Args:
        what: what was wrong, naming the file, tensor or option concerned.
        expected: what would have been right.
        do: what the user can do now.
    """

    exit_code = 2

    def __init__(self, what: str, *, expected: str = "", do: str = "") -> None:
        self.what, self.expected, self.do = what, expected, do
        parts = [what]
        if expected:
            parts.append(f"expected {expected}")
        if do:
            parts.append(do)
        super().__init__("; ".join(part.strip().replace("\n", " ") for part in parts))


class CheckpointError(UserError):
    """The model folder or one of its tensors is not what its config promises."""


class ActScalesError(UserError):
    """Activation scales are broken, or they belong to another model."""


class ContractError(UserError):
    """A transformation changed the logits, although it must not."""


class OutputError(UserError):
    """The output place exists, is read-only, or is full."""


class MissingPackageError(UserError):
    """A package or a device that the command needs is missing."""

    exit_code = 3


class LostRankError(UserError):
    """Another process of the same run has ended."""

    exit_code = 4


class CheckError(UserError):
    """An engine would refuse the checked model, or run a part of it in floating point that should run in INT8."""

    exit_code = 1


class ThresholdError(UserError):
    """The engine runs, but it is less accurate than its recipe demands."""

    exit_code = 1


def raise_refusal(error: BaseException, place: str | Path) -> None:
    """Raise what the machine refused, if that is why a file could not be read; else the file may be to blame.

    place: the file, or the folder that holds it. Libraries tell a refusal in words of their own, or as another fault:
    so every file is opened again. Raises OSError, which names the file, or MemoryError.
    """
    if isinstance(error, MemoryError):
        raise error
    place = Path(place)
    told = [known for known in REFUSALS if os.strerror(known) in str(error) or getattr(error, "errno", 0) == known]
    try:
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            place = path
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # NONBLOCK: a FIFO is opened at once
    except OSError as refused:
        told.append(refused.errno or 0)
    for number in told:
        if number in REFUSALS:
            raise OSError(number, os.strerror(number), str(place)) from error
