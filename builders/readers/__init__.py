"""What other programs make of the folders that leave us: one table, its proof by runs, and what it says of a folder."""

from builders.readers.devices import Device, device_of
from builders.readers.folder import FolderFacts, facts_of, folder_facts
from builders.readers.judge import Opinion, check_served, in_short, judge, opinions, readers_of
from builders.readers.reader import READERS
from builders.readers.statement import Outcome
from builders.readers.statements import STATEMENTS

__all__ = [
    "READERS",
    "STATEMENTS",
    "Device",
    "FolderFacts",
    "Opinion",
    "Outcome",
    "check_served",
    "device_of",
    "facts_of",
    "folder_facts",
    "in_short",
    "judge",
    "opinions",
    "readers_of",
]
