"""What the table says of a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from builders.readers.devices import ANY, SHOWN, Device, device_of
from builders.readers.folder import FolderFacts
from builders.readers.reader import READERS
from builders.readers.statement import Outcome, Statement
from builders.readers.statements import STATEMENTS
from smoothquant.errors import UserError

SERVERS = tuple(name for name in READERS if name != "transformers")  # what people serve with
AMPERE_HOPPER = ("a100", "h100")


@dataclass(frozen=True)
class Opinion:
    """What a reader makes of a folder on some devices."""

    devices: tuple[Device, ...]
    statement: Statement

    @property
    def where(self) -> str:
        """The names of the devices."""
        return "anywhere" if len(self.devices) == len(SHOWN) else ", ".join(device.name for device in self.devices)


def readers_of(asked: str) -> tuple[str, ...]:
    """The readers of a name on the command line. Raises UserError for an unknown name."""
    found = tuple(name for name, reader in READERS.items() if reader.asked == asked)
    if not found:
        names = dict.fromkeys(reader.asked for reader in READERS.values())
        raise UserError(f"--for {asked}", expected=f"one of {', '.join(names)}")
    return found


def judge(folder: FolderFacts, reader: str, device: Device) -> Statement:
    """The first statement about a reader that holds for a folder on a device.

    Where the table has none, it is one that says so: the reader takes other forms, or nobody has looked.
    """
    known = READERS[reader]
    if folder.form in known.forms and known.models and folder.model_type not in known.models:
        what = f"it has no class for model_type {folder.model_type!r} that we know of"
        return Statement(reader, folder.form, ANY, Outcome.UNKNOWN, what, "", do="try it")
    for statement in STATEMENTS:
        if statement.reader == reader and statement.holds(folder, device):
            return statement
    if folder.form in known.forms:
        return Statement(reader, folder.form, ANY, Outcome.UNKNOWN, "nobody has looked", "", do="try it")
    what = f"it takes {' and '.join(known.forms)}, and no {folder.form}"
    return Statement(reader, folder.form, ANY, Outcome.REFUSED, what, "", do=known.instead)


def opinions(folder: FolderFacts, reader: str, devices: Sequence[Device] | None = None) -> list[Opinion]:
    """What a reader makes of a folder on each of the devices. Those of one mind stand together."""
    found: dict[Statement, list[Device]] = {}
    for device in devices or [device_of(name) for name in SHOWN]:
        found.setdefault(judge(folder, reader, device), []).append(device)
    return [Opinion(tuple(devices), statement) for statement, devices in found.items()]


def check_served(folder: FolderFacts) -> None:
    """Raise UserError if no server is known to take the folder, wherever it runs, and one that reads its form is known
    to refuse it, or to compute something else."""
    found = [judge(folder, name, device_of(device)) for name in SERVERS for device in SHOWN]
    bad = (Outcome.REFUSED, Outcome.WRONG)
    refusals = [
        one
        for one in found
        if one.outcome in bad and one.source and folder.form in READERS[one.reader].forms  # it reads others like it
    ]
    if not refusals or any(statement.outcome.serves for statement in found):
        return
    refusal = refusals[0]
    raise UserError(
        f"no server takes a {folder.form} folder of {folder.model_type} with {folder.activations} activations",
        expected=f"one that a server takes ({refusal.what})",
        do=refusal.do,
    )


def in_short(folder: FolderFacts) -> str:
    """A sentence for who has just made a folder: which servers compute it as written, and which one is wrong."""
    return "; ".join(_parts(folder))


def _parts(folder: FolderFacts) -> Iterator[str]:
    gpus = [device_of(name) for name in AMPERE_HOPPER]
    statements = {name: [judge(folder, name, device) for device in gpus] for name in SERVERS}
    told = {name: f"{READERS[name].title} {READERS[name].version}" for name in SERVERS}
    good: dict[str, list[str]] = {}  # devices -> readers
    for name, found in statements.items():
        pairs = zip(gpus, found, strict=True)
        devices = [device.name.upper() for device, one in pairs if one.outcome is Outcome.AS_WRITTEN]
        if devices:
            good.setdefault(" and ".join(devices), []).append(told[name])
    for where, readers in good.items():
        yield f"computed as written on {where} by {', '.join(readers)}"
    for name, found in statements.items():
        if found[0].outcome is Outcome.WRONG:
            yield f"not by {told[name]} and later: {found[0].what}"
