"""An ONNX export as builders find it: one graph, or two that share their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smoothquant.artifacts.manifest import Manifest, Origin
from smoothquant.digests import combined
from smoothquant.errors import UserError
from smoothquant.outputs import check_content, load_manifest

MODEL = "model.onnx"
GRAPHS = {"per-token": MODEL, "per-tensor": "model.per-tensor.onnx"}  # form -> file, where an export holds both


@dataclass(frozen=True)
class OnnxExport:
    """One graph of an export. manifest: the folder's; graph: its file; origin: what this graph was made from; files:
    names of those that an engine needs beside it."""

    folder: Path
    manifest: Manifest
    graph: Path
    origin: Origin
    files: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Identity of what an engine is made of: SHA-256 over the graph and the files beside it, 16 hex digits."""
        return combined({name: self.manifest.files[name].sha256 for name in (self.graph.name, *self.files)})


def open_export(folder: str | Path, activations: str | None = None) -> OnnxExport:
    """Open a folder made by `export onnx`. activations: which form, where it holds both (by default "per-token").

    Raises UserError if it is no such folder, or does not hold this form.
    """
    folder = Path(folder)
    made = load_manifest(folder)
    check_content(folder, made)
    if made.step != "export onnx":
        raise UserError(
            f"{folder}: made by {made.step!r}", expected="an ONNX export", do="smoothquant export onnx MODEL ..."
        )
    origin = made.origin
    schemes = {scheme.activations.form: scheme for scheme in origin.schemes}
    chosen = activations or origin.scheme.activations.form
    if chosen not in schemes:
        raise UserError(
            f"{folder}: its activations are {' and '.join(schemes)}",
            expected=f"{activations}, as asked for",
            do=f"export with --act {activations}, or with --act both",
        )
    graph = GRAPHS[chosen] if len(schemes) > 1 else MODEL
    others = tuple(name for name in made.files if name not in GRAPHS.values())
    return OnnxExport(folder, made, folder / graph, origin.only(schemes[chosen]), others)
