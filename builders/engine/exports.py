"""Open an ONNX export, which holds one graph, or two graphs that share their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smoothquant.artifacts.manifest import Manifest, Origin
from smoothquant.artifacts.ports import MODEL, graph_files
from smoothquant.digests import combined
from smoothquant.errors import UserError
from smoothquant.outputs import load_manifest

EXPORT = "export onnx"  # the step


@dataclass(frozen=True)
class OnnxExport:
    """One graph of an export.

    manifest: the folder's manifest. graph: the file of the graph. origin: the inputs that the graph was made from.
    files: the names of the files that an engine needs beside the graph.
    """

    folder: Path
    manifest: Manifest
    graph: Path
    origin: Origin
    files: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Identity of what an engine is made of: SHA-256 over the graph and the files beside it, 16 hex digits."""
        contents = self.manifest.contents
        return combined({name: contents[name] for name in (self.graph.name, *self.files)})

    @property
    def capacity(self) -> int | None:
        """The tokens of a cache that is written in place; None for a cache that grows."""
        return self.origin.onnx.capacity if self.origin.onnx else None

    def check_for_tensorrt(self) -> None:
        """Raise UserError for an embedding that TensorRT cannot look up, and for integers that it cannot write in
        place."""
        embedding, kv_cache = self.origin.scheme.embedding, self.origin.scheme.kv_cache
        if self.capacity is not None and kv_cache.quantized:
            raise UserError(
                f"{self.folder}: its cache is in {kv_cache.dtype} and written in place",
                expected="one in float: TensorRT's KVCacheUpdate takes no integers",
                do="export it again without --kv, or without --cache in-place",
            )
        if embedding.quantized:
            raise UserError(
                f"{self.folder}: its embedding is in {embedding.dtype}",
                expected="one in float: TensorRT looks up no integers",
                do="export it again with --embedding float",
            )


def check_grown(folder: Path, origin: Origin, reader: str) -> None:
    """Raise UserError for a cache that is written in place. folder: an export or an engine; origin: the inputs of the
    export; reader: who runs no such graph."""
    if origin.onnx is not None and origin.onnx.capacity is not None:
        raise UserError(
            f"{folder}: its cache is written in place, which {reader} does not run",
            expected="a cache that grows",
            do="export it again without --cache in-place",
        )


def open_export(folder: str | Path, activations: str | None = None) -> OnnxExport:
    """One graph of a folder made by `export onnx`.

    activations: the form of the graph if the folder holds both, by default "per-token".
    Raises UserError if the folder is not an ONNX export or does not hold this form.
    """
    folder = Path(folder)
    made = load_manifest(folder)
    if made.step != EXPORT:
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
            expected=f"{activations} activations",
            do=f"export with --act {activations}, or with --act both",
        )
    others = tuple(name for name in made.files if name not in files)
    return OnnxExport(folder, made, folder / graph, origin.only(files[graph]), others)
