"""The working folder of a step that can be interrupted: files being made, and states to go on from.

OUT.smoothquant-work/     beside the output `OUT`, which need not be a file or folder of its own (`journal`)
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from smoothquant import files
from smoothquant.data_file import DataFile
from smoothquant.errors import OutputError
from smoothquant.journal import SCRATCH, STATE, Journal
from smoothquant.outputs import versions
from smoothquant.team import ALONE, Team

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self  # torch requires this package

SLACK = 64 << 20  # bytes left free beside a step's own
KEEP_EVERY = 20.0  # seconds of work that an interruption may cost, beside the layer under way

log = logging.getLogger(__name__)


class Workroom:
    """The working folder of a step that can be interrupted. Use it as a context manager.

    out: what the folder lies beside. step: what makes it, as in "export onnx". inputs: JSON values that determine the
    result: fingerprints and settings.

    team: all of its ranks use it; the folder is that of rank 0, which writes what is written once.

    folder: where to write. next_layer: first layer that is not done yet.

    Raises OutputError: the folder cannot be written, another process holds it, or it holds what is not ours; UserError
    if ranks have other inputs.
    """

    def __init__(self, out: str | Path, step: str, inputs: Mapping, team: Team = ALONE) -> None:
        self.given, self.out, self.team = Path(out), _real(out), team
        self.step, self.inputs = step, json.loads(json.dumps(inputs))
        self.next_layer = 0
        self._last = time.monotonic()  # when the state was kept
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._journal = Journal(self.out, step, self.inputs)
        self.folder = self._journal.folder

    def __enter__(self) -> Self:
        self._agree()
        if self.team.leads:
            self._begin()
        self.next_layer = self.team.same(self.next_layer)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._journal.close()

    def path(self, name: str) -> Path:
        """A file in the folder being made. The folders on the way to it are made; by rank 0, before others write."""
        return self._journal.path(name) if self.team.leads else self.folder / name

    def data(self, name: str) -> DataFile:
        """A large file in the folder being made, which is written in place; with what an interrupted run wrote."""
        return self._journal.file(self.path(name))

    def scratch(self, name: str) -> DataFile:
        """The same of a file that is no part of the output."""
        return self._journal.file(self._journal.root / f"{SCRATCH}{name}")

    def own(self) -> None:
        """Count every file that is in the folder now as ours: another program has made them for us."""
        self._journal.own(files.files_in(self.folder))

    def require(self, nbytes: int) -> None:
        """Raise OutputError now if the disk cannot hold an output of `nbytes`, part of which may be written."""
        if self.team.leads:
            require_room([(self, nbytes)])

    def adopt(self, source: Path, name: str) -> None:
        """Put a copy of a file of another output into the folder, as `name`. It shares the other's room on a disk that
        can do that."""
        self.require(self.on_disk() + source.stat().st_size)
        files.copy(source, self.path(name))

    def state(self, name: str = STATE) -> dict[str, Tensor]:
        """Tensors that an interrupted run kept: those that the next layer starts from, or others by their name. Rank 0
        has them."""
        return self._kept.get(name, {})

    @property
    def due(self) -> bool:
        """Whether it is time to keep the state again."""
        return self.team.same(time.monotonic() - self._last > KEEP_EVERY)

    def mark(self, next_layer: int, state: Mapping[str, Tensor] | None = None) -> None:
        """Note that all layers before `next_layer` are done and on the disk, with what the next one starts from."""
        if self.team.leads:
            self._journal.mark(next_layer, state)
        self.next_layer, self._last = next_layer, time.monotonic()

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Note more tensors, for `state(name)` to find. name: of letters."""
        if self.team.leads:
            self._journal.keep(name, tensors)
        self._last = time.monotonic()

    def forget(self) -> None:
        """Remove the folder: what was made in it is of no more use."""
        self._journal.remove()

    def _agree(self) -> None:
        """Raise UserError unless all ranks make the same from the same."""
        told = {f"version of {name}": version for name, version in versions().items()} if self.team.linked else {}
        self.team.agree({"step": self.step, "--out": str(self.out), **told, **self.inputs})

    def _begin(self) -> None:
        self._journal.open()
        self._kept = self._journal.restore()
        self.next_layer = self._journal.marks[0].next_layer
        if self._journal.note:
            log.warning("%s: %s", self.out, self._journal.note)
        files.make_folder(self.folder)

    def on_disk(self) -> int:
        """How many bytes of the output are written."""
        return sum((self.folder / name).lstat().st_blocks * 512 for name in files.files_in(self.folder))


def require_room(made: Sequence[tuple[Workroom, int]]) -> None:
    """Raise OutputError now if a disk cannot hold the outputs that are made on it, part of which may be written. made:
    each with its size in bytes."""
    needed: defaultdict[int, int] = defaultdict(lambda: SLACK)
    for room, nbytes in made:
        disk, free = os.stat(room.folder).st_dev, shutil.disk_usage(room.folder).free
        needed[disk] += nbytes - room.on_disk()
        if needed[disk] > free:
            raise OutputError(
                f"{room.out}: {_gigabytes(free)} free on this disk",
                expected=f"{_gigabytes(needed[disk])}",
                do="free some space, or choose an --out on another disk",
            )


def forget(out: str | Path) -> None:
    """Remove what an interrupted step that makes `out` has kept, if anything."""
    room = Workroom(out, "", {})
    if room.folder.parent.exists():
        with room:
            room.forget()


def _real(out: str | Path) -> Path:
    """The place that a user names, with links followed. Raises OutputError for what can be no name."""
    try:
        found = Path(os.path.realpath(out))
        os.fsencode(found)
    except (ValueError, OSError) as error:  # NUL, lone surrogates, links in a circle
        raise OutputError(f"--out {str(out)!r}: no name for a file", do="choose another --out") from error
    if not found.name:
        raise OutputError(f"--out {str(out)!r}: the root folder", expected="a place in it", do="choose another --out")
    return found


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
