"""Finished outputs: what made a folder, which files belong to it, and whether they are what was written.

    OUT/smoothquant/manifest.json    `artifacts.manifest.Manifest`, sealed with its own digest

What is ours lies in the subfolder `smoothquant`: others' programs read the folder, and some read all that they find.
(vLLM takes every *.safetensors of a folder for weights.) A model repository of Triton's is the exception: it holds its
manifest at the top, since every subfolder there is a model.
"""

from __future__ import annotations

import errno
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from smoothquant import __version__, digests
from smoothquant.artifacts.card import CARD
from smoothquant.artifacts.manifest import FileFacts, Manifest
from smoothquant.artifacts.record import as_json, read
from smoothquant.artifacts.seal import opened, sealed
from smoothquant.errors import OutputError, UserError
from smoothquant.files import files_in, is_within, write_json
from smoothquant.reading import read_json

OURS = "smoothquant"  # the subfolder of an output that holds what only this tool reads
MANIFEST = f"{OURS}/manifest.json"
TOP_MANIFEST = "manifest.json"  # where earlier versions had it, and where model repositories have it
CACHE = f"{OURS}/cache/"  # what engines keep for themselves while they run
FORMAT = 4
FIXED = (".safetensors", ".onnx", ".data", ".plan", ".engine", ".bin")  # files that nobody changes by hand
PACKAGES = ("torch", "safetensors", "transformers", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_llm")


def is_output(folder: Path) -> bool:
    """Whether a folder says that this tool made it, in this version or an earlier one."""
    return (folder / MANIFEST).exists() or _is_manifest(read_json(folder / TOP_MANIFEST))


def load_manifest(folder: str | Path, place: str = MANIFEST) -> Manifest:
    """The manifest of a finished output. place: where in the folder it lies.

    Raises UserError if the folder is no output, was made by another version, is half-copied, or has a manifest that
    was changed or that names files outside of the folder. The content of its files is not read: see `check_content`.
    A model card may be changed, or removed, by anybody.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder, place)
    for name, facts in manifest.files.items():
        path = folder / name
        if name == CARD:
            continue
        if not path.is_file() or path.stat().st_size != facts.size:
            found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
            raise UserError(f"{path} {found}", expected=f"{facts.size} bytes by {place}", do=_remedy(folder, name))
    return manifest


def check_content(folder: str | Path, manifest: Manifest, *, again: bool = True) -> None:
    """Raise UserError unless every file of an output holds what was written.

    again: read all of them. Else those are believed that have not changed, by the times and the inode that the system
    keeps, since they were read last.
    """
    for name, facts in manifest.files.items():
        path = Path(folder) / name
        if name != CARD and digests.sha256(path, again=again) != facts.sha256:
            raise UserError(
                f"{path}: its content is not what was written",
                expected=f"SHA-256 {facts.sha256[:16]}..., by the manifest",
                do=_remedy(Path(folder), name),
            )


def accept(folder: str | Path, names: list[str], place: str = MANIFEST) -> Manifest:
    """Note in the manifest that files were changed on purpose. Returns the manifest.

    names: of files that people change: a tokenizer, a chat template, settings. Raises UserError for weights, graphs and
    files that do not belong to the output.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder, place)
    found = dict(manifest.files)
    for name in names:
        if name not in found or not _is_changeable(name) or not (folder / name).is_file():
            known = ", ".join(filter(_is_changeable, found)) or "none"
            raise UserError(f"--accept {name}", expected=f"a file that may be changed by hand: {known}")
        path = folder / name
        found[name] = FileFacts(path.stat().st_size, digests.sha256(path, again=True), accepted=True)
    save_manifest(folder / place, replace(manifest, files=found))
    return load_manifest(folder, place)


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest, sealed."""
    write_json(path, sealed(as_json(manifest)))


def check_replaceable(out: Path) -> set[str]:
    """The files of an existing output, all of which this tool wrote, by their paths in it.

    Raises OutputError for anything else that lies there: a folder that this tool did not make, or one that also holds a
    file of somebody else's.
    """
    content = read_json(out / MANIFEST)
    content = content if _is_manifest(content) else read_json(out / TOP_MANIFEST)
    names = content.get("files")
    if not _is_manifest(content) or not isinstance(names, dict):
        raise OutputError(
            f"{out} exists, and this tool did not make it",
            expected="a new output, or one of this tool's to be replaced",
            do="choose another --out, or move it away",
        )
    listed = {MANIFEST, TOP_MANIFEST, *names}
    found = set(files_in(out))
    foreign = sorted(name for name in found - listed if not name.startswith(CACHE))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise OutputError(
            f"{out} holds {foreign[0]}{more}, which this tool did not write",
            expected="nothing but the output that is to be replaced",
            do="move it away, or choose another --out",
        )
    return found


def check_holds_outputs(out: str | Path) -> None:
    """Raise OutputError for a folder that shall hold outputs and is one itself."""
    if is_output(Path(out)):
        raise OutputError(
            f"--out {out}: an output of this tool, in which others have no place",
            expected="a folder that holds outputs, or a new one",
            do="choose another --out",
        )


def check_apart(out: str | Path, inputs: Mapping[str, str | Path], option: str = "--out") -> None:
    """Raise OutputError for an output that is an input, holds one or lies inside one. inputs: path by what it is."""
    target = Path(out)
    above = list(_with_parents(target))
    for what, given in inputs.items():
        source = Path(given)
        mine, theirs = _identity(source), list(_with_parents(source))
        if mine is None:
            continue
        if mine in above:
            how = "is" if above and _identity(target) == mine else "lies inside"
        elif (here := _identity(target)) is not None and here in theirs:
            how = "holds"
        else:
            continue
        raise OutputError(
            f"{option} {out} {how} {what} ({given})",
            expected="a place apart from everything that is read",
            do=f"choose another {option}",
        )


def versions() -> dict[str, str]:
    """Versions of what took part: this tool, Python, and the packages that are installed."""
    found = {"smoothquant": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _read_manifest(folder: Path, place: str) -> Manifest:
    """A manifest of this version, as it was written, that names files of its own folder alone. Raises UserError."""
    content = read_json(folder / place)
    if content.get("format") != FORMAT:
        raise _unreadable(folder, content or read_json(folder / TOP_MANIFEST))
    inner = opened(content)
    if inner is None:
        raise UserError(
            f"{folder / place}: changed or damaged since it was written",
            expected="the content that its own SHA-256 belongs to",
            do="copy it again, or make the folder again",
        )
    manifest = read(Manifest, inner, str(folder / place))
    for name in manifest.files:
        if not is_within(name):
            raise UserError(
                f"{folder / place}: it names the file {name!r}",
                expected="files of its own folder",
                do="do not use this folder",
            )
    return manifest


def _with_parents(path: Path) -> list[tuple[int, int]]:
    """Device and inode of a path and of all folders above it, as far as they exist; links are followed."""
    real = Path(path).resolve()
    return [found for place in (real, *real.parents) if (found := _identity(place)) is not None]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return None
        raise
    return found.st_dev, found.st_ino


def _is_changeable(name: str) -> bool:
    return not name.startswith(f"{OURS}/") and not name.endswith(FIXED)


def _remedy(folder: Path, name: str) -> str:
    again = "copy or make it again"
    return f"{again}; changed on purpose: smoothquant check {folder} --accept {name}" if _is_changeable(name) else again


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
