"""Outputs that are whole or absent: a step works in `OUT.partial/`, and the folder gets its name when it is complete.

    OUT.partial/journal.json         inputs of the step, next layer to do
    OUT.partial/state.N.safetensors  tensors that the next layer, N, starts from (optional)
    OUT/smoothquant/manifest.json    step, inputs, files and their sizes, versions, results

What is ours lies in the subfolder `smoothquant`: others' programs read the folder, and some read all that they find.
(vLLM takes every *.safetensors of a folder for weights.) A model repository of Triton's is the exception: it holds its
manifest at the top, since every subfolder there is a model.

The same command run again goes on at the layer where it stopped. A finished output with the same inputs is left
alone; any other existing output is refused unless it may be overwritten, and stays until its successor is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smoothquant import __version__
from smoothquant.artifacts.manifest import Manifest, ModelFacts, Promise
from smoothquant.artifacts.record import as_json, read
from smoothquant.errors import OutputError, UserError, raise_refusal

OURS = "smoothquant"  # the subfolder of an output that holds what only this tool reads
MANIFEST = f"{OURS}/manifest.json"
TOP_MANIFEST = "manifest.json"  # where earlier versions had it, and where model repositories have it
FORMAT = 3
SLACK = 64 << 20  # bytes left free beside a step's own


class Workspace:
    """The output of one step. Use it as a context manager; call `commit` at the end.

    Args:
        out: folder to make (or file, with `commit_file`).
        step: what makes it, as in "export onnx".
        inputs: JSON values that determine the result: fingerprints and settings.
        overwrite: replace an existing output made from other inputs.
        manifest: where in the output its manifest lies.

    Attributes:
        finished: `out` is there, whole, and made from the same inputs; nothing is to be done.
        folder: where to write.
        next_layer: first layer that is not done yet.

    Raises OutputError: `out` exists with other content, cannot be written, or another process is writing it.
    """

    def __init__(
        self, out: str | Path, step: str, inputs: Mapping, *, overwrite: bool = False, manifest: str = MANIFEST
    ) -> None:
        self.out, self.step, self.inputs = Path(out), step, json.loads(json.dumps(inputs))
        self.manifest = manifest
        self.folder = self.out.with_name(self.out.name + ".partial")
        self.finished = self._is_finished()
        self.next_layer = 0
        if self.finished:
            return
        if self.out.exists() and not overwrite:
            raise OutputError(
                f"{self.out} exists and was not made by this command with these inputs",
                expected="a new output",
                do="choose another --out, or pass --overwrite",
            )
        self._begin()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.finished:
            self._lock.close()

    def path(self, name: str) -> Path:
        """A file in the folder being made. The folders on the way to it are made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def require(self, nbytes: int) -> None:
        """Raise OutputError now if the disk cannot hold `nbytes` more than what is already written."""
        written = self._written()
        needed, free = nbytes - written + SLACK, shutil.disk_usage(self.folder).free
        if needed > free:
            raise OutputError(
                f"{self.out}: {_gigabytes(free)} free on this disk",
                expected=f"{_gigabytes(needed)}",
                do="free some space, or choose an --out on another disk",
            )

    def adopt(self, source: Path, name: str) -> None:
        """Put a finished file of another output into the folder, as `name`: linked where the disk allows, else
        copied."""
        target = self.path(name)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another disk, or one without links
            self.require(self._written() + source.stat().st_size)
            shutil.copyfile(source, target)

    def state(self) -> dict[str, Tensor]:
        """Tensors that the last `mark` kept. Raises OutputError if they cannot be read."""
        path = self._state(self.next_layer)
        try:
            return load_file(path) if path.exists() else {}
        except (SafetensorError, OSError) as error:
            raise OutputError(
                f"{path}: truncated or corrupt ({error})",
                expected="what an interrupted run left",
                do=f"remove {self.folder} and start again",
            ) from error

    def mark(self, next_layer: int, state: Mapping[str, Tensor] | None = None) -> None:
        """Note that all layers before `next_layer` are written, with what the next one starts from."""
        kept = self._state(next_layer)  # named after its layer: state and journal agree at every instant
        if state is not None:
            save_tensors(kept, state)
        self.next_layer = next_layer
        write_json(self.path("journal.json"), {"step": self.step, "inputs": self.inputs, "next_layer": next_layer})
        for old in self.folder.glob("state.*"):
            if old != kept:
                old.unlink()

    def commit(
        self,
        results: Mapping | None = None,
        *,
        contract: Promise | None = None,
        geometry: ModelFacts | None = None,
    ) -> Manifest:
        """Write the manifest and give the folder its name. Returns the manifest. results: JSON values."""
        self._drop_journal()
        files = {
            str(file.relative_to(self.folder)): file.stat().st_size
            for file in sorted(self.folder.rglob("*"))
            if file.is_file() and file.name != ".lock"
        }
        manifest = Manifest(FORMAT, self.step, self.inputs, files, versions(), contract, geometry, results or {})
        for name in files:
            _sync(self.path(name))
        write_json(self.path(self.manifest), as_json(manifest))
        self.path(".lock").unlink()
        if self.out.exists():  # overwrite: the old output goes when the new one is complete
            old = self.out.with_name(self.out.name + ".old")
            remove(old)
            os.replace(self.out, old)
            os.replace(self.folder, self.out)
            remove(old)
        else:
            os.replace(self.folder, self.out)
        return manifest

    def commit_file(self, name: str) -> None:
        """The output is one file: give it its name and drop the folder."""
        _sync(self.path(name))
        os.replace(self.path(name), self.out)
        shutil.rmtree(self.folder)

    def _is_finished(self) -> bool:
        try:
            manifest = load_manifest(self.out, self.manifest)
        except UserError:
            return False
        return manifest.step == self.step and manifest.inputs == self.inputs

    def _begin(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path(".lock"), "w")  # noqa: SIM115 (held until __exit__)
        except OSError as error:
            raise OutputError(
                f"{self.out}: cannot write there ({error.strerror})",
                expected="a writable place",
                do="choose another --out",
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise OutputError(f"{self.out}: another process is writing it", do="wait for it, or stop it") from error
        journal = read_json(self.path("journal.json"))
        if journal.get("step") == self.step and journal.get("inputs") == self.inputs:
            self.next_layer = journal["next_layer"]
            return
        for leftover in self.folder.iterdir():
            if leftover.name != ".lock":
                remove(leftover)
        self.mark(0)

    def _written(self) -> int:
        return sum(file.stat().st_blocks * 512 for file in self.folder.rglob("*") if file.is_file())

    def _drop_journal(self) -> None:
        self.path("journal.json").unlink(missing_ok=True)
        for old in self.folder.glob("state.*"):
            old.unlink()

    def _state(self, layer: int) -> Path:
        return self.path(f"state.{layer}.safetensors")


def is_output(folder: Path) -> bool:
    """Whether a folder says that this tool made it, in this version or an earlier one."""
    return (folder / MANIFEST).exists() or _is_manifest(read_json(folder / TOP_MANIFEST))


def load_manifest(folder: str | Path, place: str = MANIFEST) -> Manifest:
    """The manifest of a finished output. place: where in the folder it lies.

    Raises UserError if the folder is no output, was made by another version, is half-copied or was changed.
    """
    folder = Path(folder)
    content = read_json(folder / place)
    if content.get("format") != FORMAT:
        raise _unreadable(folder, content or read_json(folder / TOP_MANIFEST))
    manifest = read(Manifest, content, str(folder / place))
    for name, size in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
            raise UserError(f"{path} {found}", expected=f"{size} bytes by {place}", do="copy or make it again")
    return manifest


def _is_manifest(content: Mapping) -> bool:
    return {"format", "step", "inputs"} <= content.keys()


def _unreadable(folder: Path, found: Mapping) -> UserError:
    """Why a folder's manifest is not one of this version's. found: what it has instead."""
    if not _is_manifest(found) or found["format"] == FORMAT:
        return UserError(
            f"{folder}: not an output of this tool (no readable {MANIFEST})",
            expected="a folder made by smoothquant export or build",
            do="check the path, or make it again",
        )
    age = "an earlier" if found["format"] in range(FORMAT) else "a later"
    kind = str(found["step"]).partition(" ")[0]
    arguments = {"export": "MODEL ACT_SCALES ", "build": "EXPORT "}.get(kind, "... ")
    return UserError(
        f"{folder}: made by {age} version of this tool (format {found['format']})",
        expected=f"format {FORMAT}",
        do=f"make it again: smoothquant {found['step']} {arguments}--out {folder} --overwrite",
    )


def versions() -> dict[str, str]:
    """Versions of what took part: this tool, Python, and the packages that are installed."""
    found = {"smoothquant": __version__, "python": platform.python_version()}
    for package in ("torch", "safetensors", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt_llm"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_place(path: Path, option: str, given: str | Path) -> None:
    """Raise OutputError where no file could be written, before the work that it is to hold. path: of the file; folders
    on the way need not be there. option, given: what a user wrote for it."""
    if path.is_dir():
        raise OutputError(f"{option} {given}: a folder", expected="a file to write", do=f"choose another {option}")
    place = path.parent
    while not place.exists():
        place = place.parent
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise OutputError(
            f"{option} {given}: cannot write there ({error.strerror})",
            expected="a writable place",
            do=f"choose another {option}",
        ) from error


def read_json(path: Path) -> dict:
    """A JSON object, or {} if there is none to read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise_refusal(error, path)
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Mapping) -> None:
    """Write a JSON object so that it is there whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(new, path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file so that it is there whole or not at all. Raises OutputError."""
    new = path.with_name(path.name + ".new")
    try:
        save_file(dict(tensors), new)
    except SafetensorError as error:  # its way to say that the disk is full
        raise OutputError(
            f"{path}: cannot write ({error})", do="free some space and run the same command again"
        ) from error
    os.replace(new, path)


def forget(out: str | Path) -> None:
    """Remove what a step that makes `out` has kept in `OUT.partial/`, if anything."""
    remove(Path(out).with_name(Path(out).name + ".partial"))


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
