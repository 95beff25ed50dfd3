"""The table of engines: the class that opens each kind of folder.

Every folder that computes logits has a manifest. Its `step` names the command that made the folder, and so the class
that runs it. A TensorRT-LLM checkpoint by another tool has no manifest; its own files are read instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from builders.engine.protocol import FOREIGN, Engine
from smoothquant.artifacts.manifest import Manifest
from smoothquant.errors import UserError
from smoothquant.outputs import check_content, is_output, load_manifest


class Row(NamedTuple):
    """A class that opens folders. Its module is imported when a folder asks for it.

    foreign: the name of the module's function that recognises a folder without a manifest. The function returns a
    manifest for such a folder, and None for any other folder.
    """

    module: str
    name: str
    foreign: str | None = None


ENGINES: Mapping[str, Row] = {  # by the manifest's step
    "build onnxruntime": Row("builders.onnxruntime", "OnnxRuntimeEngine"),
    "build openvino": Row("builders.openvino.engine", "OpenVinoEngine"),
    "build tensorrt": Row("builders.tensorrt.engine", "TensorRTEngine"),
    "export onnx": Row("builders.onnxruntime", "OnnxRuntimeEngine"),
    "export hf": Row("builders.transformers", "TransformersEngine"),
    "export w8a8": Row("builders.transformers", "TransformersEngine"),
    "export trtllm": Row("builders.tensorrt_llm", "CheckpointEngine"),
    FOREIGN: Row("builders.tensorrt_llm", "CheckpointEngine", foreign="foreign_manifest"),
}
ELSEWHERE: Mapping[str, str] = {  # step -> advice to a user whose engine does not run here
    "build tensorrt-llm": "serve it on its GPU (smoothquant serve-config); here, validate the checkpoint behind it",
}


def open_engine(folder: str | Path) -> Engine:
    """The engine in a folder.

    Raises UserError for a folder that this tool did not make, that was changed since, or that does not run;
    MissingPackageError if the package that runs it is not installed.
    """
    manifest = engine_manifest(folder)
    check_content(folder, manifest, again=False)
    row = ENGINES[manifest.step]
    return getattr(import_module(row.module), row.name)(folder)


def is_engine(folder: Path) -> bool:
    """Whether a folder is known to the table, or is another output of this tool."""
    return is_output(folder) or _foreign(folder) is not None


def engine_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder that runs here, or a manifest made from a foreign checkpoint.

    Raises UserError for a folder that this tool did not make or that does not run, CheckpointError for a foreign
    checkpoint with a broken config.json.
    """
    folder = Path(folder)
    found = None if is_output(folder) else _foreign(folder)
    if found is not None:
        return found
    manifest = load_manifest(folder)
    if manifest.step not in ENGINES:
        raise UserError(
            f"{folder}: made by {manifest.step!r}, whose output does not run here",
            expected=f"a folder made by one of: {', '.join(ENGINES)}",
            do=ELSEWHERE.get(manifest.step, "build an engine from it first: smoothquant build --help"),
        )
    return manifest


def _foreign(folder: Path) -> Manifest | None:
    """A manifest made from a folder of another tool; None if no row of the table knows the folder."""
    for row in ENGINES.values() if folder.is_dir() else ():
        found = getattr(import_module(row.module), row.foreign)(folder) if row.foreign else None
        if found is not None:
            return found
    return None
