"""Outputs that are whole or absent: a step works in a folder beside its output, and names it when it is complete.

    OUT.smoothquant-work/     while the step works (`journal`)
    OUT                       the output, with its manifest (`outputs`)

The same command run again goes on at the last layer that was noted. A finished output with the same inputs is left
alone. Another output of this tool may be replaced on request: it keeps its name until its successor is complete, and
the two exchange names at one instant. Whatever is not this tool's is never touched.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from smoothquant import __version__, digests, files
from smoothquant.artifacts.manifest import FileFacts, Manifest, ModelFacts, Promise
from smoothquant.errors import OutputError, UserError
from smoothquant.journal import OLD
from smoothquant.outputs import (
    FORMAT,
    MANIFEST,
    check_content,
    check_replaceable,
    load_manifest,
    save_manifest,
    versions,
)
from smoothquant.team import ALONE, Team
from smoothquant.workroom import Workroom

if TYPE_CHECKING:
    from typing_extensions import Self  # torch requires this package

log = logging.getLogger(__name__)


class Workspace(Workroom):
    """The output of one step, a folder or a file. Use it as a context manager; call `commit` or `commit_file` at the
    end.

    overwrite: make it in any case, and replace an output of this tool that is there. manifest: where in a folder its
    manifest lies. kind: what the output is; a folder with a manifest, unless it is said otherwise.

    finished: `out` is there, whole, and made from the same inputs; nothing is to be done.

    Raises OutputError also if `out` exists with other content.
    """

    def __init__(
        self,
        out: str | Path,
        step: str,
        inputs: Mapping,
        *,
        overwrite: bool = False,
        manifest: str = MANIFEST,
        kind: OneFile | None = None,
        team: Team = ALONE,
    ) -> None:
        super().__init__(out, step, inputs, team)
        self.overwrite, self.manifest, self.kind = overwrite, manifest, kind
        self.finished = False

    def __enter__(self) -> Self:
        self._agree()
        if self.team.leads:
            self._open()
        self.finished, self.next_layer = self.team.same((self.finished, self.next_layer))
        return self

    def _open(self) -> None:
        if self._recover() or (not self.overwrite and self._is_finished()):
            self.finished = True
            self._journal.close()
            say_unchanged(self.given)
        else:
            self._check_out()
            self._begin()

    def commit(
        self,
        results: Mapping | None = None,
        *,
        contract: Promise | None = None,
        geometry: ModelFacts | None = None,
    ) -> None:
        """Write the manifest and give the folder its name. results: JSON values."""
        if self.team.leads:
            self._commit(results or {}, contract, geometry)
        self.team.wait()

    def commit_file(self, name: str) -> None:
        """The output is one file: give it its name and drop the folder."""
        if self.team.leads:
            path = self.path(name)
            files.DISK.sync(path)
            self._name(path, files.sha256(path))
        self.team.wait()

    def _commit(self, results: Mapping, contract: Promise | None, geometry: ModelFacts | None) -> None:
        self._journal.check_foreign()
        files.remove_file(self.folder / self.manifest)  # of an interrupted run
        found = {}
        for name in files.files_in(self.folder):
            path = self.folder / name
            file = self._journal.file(path)
            if file.has_holes:
                raise ValueError(f"{path}: a planned tensor was not written")
            found[name] = FileFacts(path.stat().st_size, file.sha256())
        manifest = Manifest(FORMAT, self.step, self.inputs, found, versions(), contract, geometry, results)
        save_manifest(self.path(self.manifest), manifest)
        files.sync_tree(self.folder)
        self._name(self.folder, files.sha256(self.folder / self.manifest))
        for name, facts in found.items():
            digests.remember(self.out / name, facts.sha256)

    def _name(self, made: Path, digest: str) -> None:
        """Give what was made its name, and remove the working folder. digest: by which the next process knows it."""
        self._journal.mark(self.next_layer, complete=digest)
        try:
            self._exchange(made)
            files.DISK.sync(self.out.parent)
        except OSError as error:
            raise OutputError(
                f"{self.out}: what was made cannot get this name ({error.strerror})",
                expected="a place where a folder can be renamed",
                do="choose an --out within this folder, or free the name; the same command then goes on",
            ) from error
        self._journal.remove()

    def _exchange(self, made: Path) -> None:
        if made.is_dir() and _is_empty_folder(self.out):
            files.DISK.remove_folder(self.out)
        if not os.path.lexists(self.out):
            with suppress(FileExistsError):
                files.DISK.place(made, self.out)
                return
        if not self.overwrite:
            raise OutputError(
                f"{self.out} appeared while it was being made",
                expected="that nobody else makes it",
                do="move it away and run the same command again: it ends at once",
            )
        before = os.lstat(self.out)
        self._journal.own(self._check_replaceable(made.name))
        try:
            files.DISK.exchange(made, self.out)
        except OSError as error:
            if error.errno not in files.NOT_HERE:
                raise
            files.DISK.place(self.out, self._journal.root / OLD)
            files.DISK.place(made, self.out)
            return
        if os.lstat(made).st_ino != before.st_ino:  # somebody put another one there in this instant
            files.DISK.exchange(made, self.out)
            raise OutputError(f"{self.out} was changed while it was replaced", do="run the same command again")

    def _recover(self) -> bool:
        """Bring to its end what a process was doing when it died. Returns whether the output is finished by that."""
        journal = self._journal
        if not os.path.lexists(journal.root):
            return False
        try:
            journal.open()
        except OutputError:
            if self.overwrite or not self._is_finished():
                raise
            return True
        old = journal.root / OLD
        if os.path.lexists(old) and not os.path.lexists(self.out):
            files.DISK.place(old, self.out)
        digest = self._digest(self.out)
        if journal.found and journal.found[0].complete and journal.found[0].complete == digest:
            ours = bool(journal.marks) and journal.marks[0] is journal.found[0]
            journal.remove()
            return ours and self._is_finished()
        last = journal.marks[0] if journal.marks else None
        if last and last.complete:
            made = next((path for path in self._made() if self._digest(path) == last.complete), None)
            if made is not None and self._is_whole(made):
                self._check_out()
                self._name(made, last.complete)
                return self._is_finished()
        if not journal.found and self._is_finished():  # it died while it removed this folder
            journal.remove()
        return False

    def _made(self) -> list[Path]:
        """What is in the working folder and may be the finished output."""
        if self.kind is None:
            return [self.folder]
        return [self.folder / name for name in files.files_in(self.folder)]

    def _is_whole(self, made: Path) -> bool:
        """Whether what was made is on the disk."""
        try:
            if self.kind is None:
                check_content(made, load_manifest(made, self.manifest))
        except (UserError, OSError):
            return False
        return True

    def _digest(self, path: Path) -> str | None:
        """By which a finished output is known; None where there is none."""
        try:
            return files.sha256(path if self.kind else path / self.manifest)
        except OSError:
            return None

    def _is_finished(self) -> bool:
        if self.kind:
            return self.kind.is_finished(self.out)
        try:
            manifest = load_manifest(self.out, self.manifest)
        except UserError:
            return False
        made = (manifest.versions.get("smoothquant"), manifest.step, manifest.inputs)
        if made != (__version__, self.step, self.inputs):
            return False
        check_content(self.given, manifest, again=False)
        return True

    def _check_out(self) -> None:
        """Raise OutputError for what is at `out` and stays there."""
        if not os.path.lexists(self.out) or (self.kind is None and _is_empty_folder(self.out)):
            return
        self._check_replaceable("")
        if not self.overwrite:
            raise OutputError(
                f"{self.out} exists and was not made by this command with these inputs",
                expected="a new output",
                do="choose another --out, or pass --overwrite",
            )

    def _check_replaceable(self, name: str) -> list[str]:
        """Names, in `output/`, of what lies at `out` once it has been exchanged with what was made there. name: that of
        a file. OutputError for what this tool did not make."""
        if self.kind is None:
            return sorted(check_replaceable(self.out))
        self.kind.check_replaceable(self.out)
        return [name]


class OneFile(Protocol):
    """What a step knows of its output, if that is one file."""

    def is_finished(self, out: Path) -> bool:
        """Whether the file is there, whole, and made from the inputs of the step."""
        ...

    def check_replaceable(self, out: Path) -> None:
        """Raise OutputError for a file that this tool did not make."""
        ...


def say_unchanged(place: Path) -> None:
    """Log that nothing is to be done for an output, since it is already there. The command line shows it in its way."""
    log.info("%s: already there, unchanged", place, extra={"unchanged": str(place)})


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
