"""Read a checkpoint that another converter made. It has no manifest, so config.json takes its place."""

from __future__ import annotations

from pathlib import Path

from builders.engine.protocol import FOREIGN, ForeignInputs
from builders.tensorrt_llm.format.checkpoint import is_checkpoint, load_config, read_config
from smoothquant.artifacts.manifest import FileFacts, Manifest
from smoothquant.artifacts.record import as_json
from smoothquant.digests import sha256
from smoothquant.outputs import FORMAT, is_output


def foreign_manifest(folder: Path) -> Manifest | None:
    """A manifest made from config.json of another tool's checkpoint; None for any other folder.

    Raises CheckpointError for a broken config.json.
    """
    if is_output(folder) or not is_checkpoint(folder):
        return None
    found = load_config(folder)
    quantization = read_config(folder).get("quantization")
    inputs = ForeignInputs(found.dtype, found.vocab_size, found.hidden_size, found.layers, quantization)
    ranks = sorted(folder.glob("rank*.safetensors"))
    facts = {path.name: FileFacts(path.stat().st_size, sha256(path)) for path in ranks}
    return Manifest(FORMAT, FOREIGN, as_json(inputs), facts, {})
