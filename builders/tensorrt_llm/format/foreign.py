"""A checkpoint by another converter, which carries no manifest: config.json says what a manifest would."""

from __future__ import annotations

from pathlib import Path

from builders.engine.protocol import FOREIGN, ForeignInputs
from builders.tensorrt_llm.format.checkpoint import is_checkpoint, load_config, read_config
from smoothquant.artifacts.manifest import Manifest
from smoothquant.artifacts.record import as_json
from smoothquant.workspace import FORMAT, is_output


def foreign_manifest(folder: Path) -> Manifest | None:
    """The manifest that stands for another tool's checkpoint, None for any other folder.

    Raises CheckpointError for a broken config.json.
    """
    if is_output(folder) or not is_checkpoint(folder):
        return None
    found = load_config(folder)
    quantization = read_config(folder).get("quantization")
    inputs = ForeignInputs(found.dtype, found.vocab_size, found.hidden_size, found.layers, quantization)
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("rank*.safetensors"))}
    return Manifest(FORMAT, FOREIGN, as_json(inputs), files, {})
