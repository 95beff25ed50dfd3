"""An ONNX export as builders find it: one graph, or two that share their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smoothquant.artifacts.manifest import Manifest, Origin
from smoothquant.artifacts.ports import MODEL, graph_files
from smoothquant.errors import UserError
from smoothquant.workspace import load_manifest


@dataclass(frozen=True)
class OnnxExport:
    """One graph of an export. manifest: the folder's; graph: its file; origin: what this graph was made from; files:
    names of those that an engine needs beside it."""

    folder: Path
    manifest: Manifest
    graph: Path
    origin: Origin
    files: tuple[str, ...]


def open_export(folder: str | Path, activations: str | None = None) -> OnnxExport:
    """Open a folder made by `export onnx`. activations: which form, where it holds both (by default "per-token").

    Raises UserError if it is no such folder, or does not hold this form.
    """
    folder = Path(folder)
    made = load_manifest(folder)
    if made.step != "export onnx":
        raise UserError(
            f"{folder}: made by {made.step!r}", expected="an ONNX export", do="smoothquant export onnx MODEL ..."
        )
    origin = made.origin
    files = graph_files(origin.schemes)
    graphs = {scheme.activations.form: graph for graph, scheme in files.items()}
    graph = graphs.get(activations) if activations else MODEL
    if graph is None:
        raise UserError(
            f"{folder}: its activations are {' and '.join(graphs)}",
            expected=f"{activations}, as asked for",
            do=f"export with --act {activations}, or with --act both",
        )
    others = tuple(name for name in made.files if name not in files)
    return OnnxExport(folder, made, folder / graph, origin.only(files[graph]), others)
