"""A checkpoint by another converter, which carries no manifest: config.json says what a manifest would."""

from __future__ import annotations

from pathlib import Path

from builders.engine.protocol import FOREIGN, SHAPE
from builders.tensorrt_llm.format.checkpoint import is_checkpoint, load_config, read_config
from smoothquant.artifacts.manifest import FileFacts, Manifest
from smoothquant.digests import sha256
from smoothquant.outputs import FORMAT, is_output


def foreign_manifest(folder: Path) -> Manifest | None:
    """The manifest that stands for another tool's checkpoint, None for any other folder.

    Raises CheckpointError for a broken config.json.
    """
    if is_output(folder) or not is_checkpoint(folder):
        return None
    load_config(folder)  # raises for a broken one
    config = read_config(folder)
    inputs = {key: config.get(key) for key in ("dtype", *SHAPE, "quantization")}
    files = {
        path.name: FileFacts(path.stat().st_size, sha256(path)) for path in sorted(folder.glob("rank*.safetensors"))
    }
    return Manifest(FORMAT, FOREIGN, inputs, files, {})
