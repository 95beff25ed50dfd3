"""What an engine is to everybody above it, and which class opens which folder.

Every folder that can compute logits carries a manifest; its `step` says what made it, and so what runs it. A checkpoint
by another tool's TensorRT-LLM converter carries none: its files stand for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Protocol

from torch import Tensor

from smoothquant.artifacts.manifest import Manifest
from smoothquant.errors import UserError
from smoothquant.workspace import FORMAT, is_output, load_manifest

FOREIGN = "another TensorRT-LLM converter"
ENGINES: Mapping[str, tuple[str, str]] = {  # step -> module and class; imported when a folder asks for it
    "build onnxruntime": ("builders.onnxruntime", "OnnxRuntimeEngine"),
    "build tensorrt": ("builders.tensorrt", "TensorRTEngine"),
    "export onnx": ("builders.onnxruntime", "OnnxRuntimeEngine"),
    "export hf": ("builders.transformers", "TransformersEngine"),
    "export w8a8": ("builders.transformers", "TransformersEngine"),
    "export trtllm": ("builders.tensorrt_llm", "CheckpointEngine"),
    FOREIGN: ("builders.tensorrt_llm", "CheckpointEngine"),
}
SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers")  # what a checkpoint by another tool says of its model
ELSEWHERE: Mapping[str, str] = {  # step -> where its engines run
    "build tensorrt-llm": "serve it on its GPU (smoothquant serve-config); here, validate the checkpoint behind it",
}


class Engine(Protocol):
    """Something that computes logits. manifest: that of its folder."""

    manifest: Manifest

    def logits(self, ids: Tensor) -> Tensor:
        """ids: (batch, tokens) int64, whole sequences without padding; returns float32 (batch, tokens, vocab)."""
        ...


def open_engine(folder: str | Path) -> Engine:
    """Open a folder with the class that runs it.

    Raises UserError for a folder that is no output of this tool or is nothing that runs, MissingPackageError if the
    package that would run it is not installed.
    """
    module, name = ENGINES[engine_manifest(folder).step]
    return getattr(import_module(module), name)(folder)


def engine_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder that runs here; for a checkpoint by another tool, what its config.json says.

    Raises UserError for a folder that is no output of this tool, or is nothing that runs, CheckpointError for such a
    checkpoint with a broken config.json.
    """
    folder = Path(folder)
    if not is_output(folder) and import_module("builders.tensorrt_llm").is_checkpoint(folder):
        checkpoint = import_module("builders.tensorrt_llm.format.checkpoint")
        checkpoint.load_config(folder)  # or why not
        config = checkpoint.read_config(folder)
        inputs = {key: config.get(key) for key in ("dtype", *SHAPE, "quantization")}
        files = {path.name: path.stat().st_size for path in sorted(folder.glob("rank*.safetensors"))}
        return Manifest(FORMAT, FOREIGN, inputs, files, {})
    manifest = load_manifest(folder)
    if manifest.step not in ENGINES:
        raise UserError(
            f"{folder}: made by {manifest.step!r}, which gives nothing to run here",
            expected=f"a folder made by one of: {', '.join(ENGINES)}",
            do=ELSEWHERE.get(manifest.step, "build an engine from it first: smoothquant build --help"),
        )
    return manifest
