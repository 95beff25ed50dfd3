"""Read a checkpoint that another converter made. It has no manifest, so config.json takes its place."""

from __future__ import annotations

from pathlib import Path

from builders.engine.protocol import FOREIGN, SHAPE
from builders.tensorrt_llm.format.checkpoint import is_checkpoint, load_config, read_config
from smoothquant.artifacts.manifest import Manifest
from smoothquant.workspace import FORMAT, is_output


def foreign_manifest(folder: Path) -> Manifest | None:
    """A manifest made from config.json of another tool's checkpoint; None for any other folder.

    Raises CheckpointError for a broken config.json.
    """
    if is_output(folder) or not is_checkpoint(folder):
        return None
    load_config(folder)  # raises an error for a broken config.json
    config = read_config(folder)
    inputs = {key: config.get(key) for key in ("dtype", *SHAPE, "quantization")}
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("rank*.safetensors"))}
    return Manifest(FORMAT, FOREIGN, inputs, files, {})
