"""One statement about a reader: what it makes of a kind of folder on some devices, and where that is known from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from builders.readers.devices import Device, Hardware
from builders.readers.folder import FolderFacts


class Outcome(Enum):
    """What becomes of a folder. The values are words for people."""

    AS_WRITTEN = "as written"
    OTHERWISE = "loads, computed otherwise"
    WRONG = "loads, and is wrong"
    REFUSED = "refused"
    UNKNOWN = "not known"

    @property
    def serves(self) -> bool:
        """Whether the folder is of use there."""
        return self in (Outcome.AS_WRITTEN, Outcome.OTHERWISE)


@dataclass(frozen=True)
class Statement:
    """One statement.

    reader: a key of `reader.READERS`. form: of the folder (`FolderFacts.form`). on: the devices that it holds for.
    activations: their forms; empty for all. experts, window: whether the model has them; None for both. model_types:
    of config.json; empty for all.
    outcome: what becomes of the folder. kernel: what multiplies int8. what: a sentence about what happens. do: what a
    user can do about it. said: words of the reader's own message if it refuses. source: the file of the reader, or the
    thread, that says so.
    """

    reader: str
    form: str
    on: Hardware
    outcome: Outcome
    what: str
    source: str
    activations: tuple[str, ...] = ()
    experts: bool | None = None
    window: bool | None = None
    model_types: tuple[str, ...] = ()
    kernel: str = ""
    do: str = ""
    said: str = ""

    def holds(self, folder: FolderFacts, device: Device) -> bool:
        """Whether the statement is about this folder on this device."""
        return (
            self.form == folder.form
            and self.on.holds(device)
            and (not self.activations or folder.activations in self.activations)
            and self.experts in (None, folder.experts)
            and self.window in (None, folder.window)
            and (not self.model_types or folder.model_type in self.model_types)
        )

    @property
    def about(self) -> str:
        """The folders that the statement is about, in words."""
        told = [self.form]
        told += [f"{' or '.join(self.activations)} activations"] if self.activations else []
        told += [] if self.experts is None else ["with experts" if self.experts else "without experts"]
        told += [] if self.window is None else ["with a sliding window" if self.window else "without a sliding window"]
        told += [f"of {' or '.join(self.model_types)}"] if self.model_types else []
        return ", ".join(told)
