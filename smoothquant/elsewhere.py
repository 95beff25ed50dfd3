"""Folders that are no model folder but something near to one: what they are, and the command that leads to a model."""

from __future__ import annotations

import shlex
from pathlib import Path

from smoothquant.errors import CheckpointError

CACHES = {  # what a folder is -> the config.json of its models
    "the root of a model in the Hub's cache": "snapshots/*/config.json",
    "the Hub's cache, with all its models": "models--*/snapshots/*/config.json",
}


def refuse_other_folder(folder: Path) -> None:
    """Raise CheckpointError if the folder is of a kind that is often taken for a model folder."""
    found = _known(folder)
    if found:
        kind, do = found
        raise CheckpointError(f"{folder}: {kind}", expected="a model folder: config.json beside the weights", do=do)


def _known(folder: Path) -> tuple[str, str] | None:
    """What the folder is, and what to do; None if it may be a model folder."""
    has_config = (folder / "config.json").exists()
    has_weights = any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    if (folder / "adapter_config.json").exists() and not (has_config and has_weights):
        return "a LoRA adapter, without the model it is for", f"merge it first: {_merge(folder)}"
    if has_config:
        return None
    for kind, pattern in CACHES.items():
        snapshots = sorted(folder.glob(pattern), key=lambda path: path.parent.stat().st_mtime)
        if snapshots:
            return kind, f"give its newest snapshot: {_quoted(snapshots[-1].parent)}"
    if any(folder.glob("*.gguf")):
        return (
            "GGUF files, whose weights are rounded already",
            "get the original: hf download ORG/MODEL --local-dir DIR",
        )
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return (
            "config.json: no such file, though there are weights",
            f"get it: hf download ORG/MODEL config.json --local-dir {_quoted(folder)}",
        )
    return None


def _merge(folder: Path) -> str:
    """A command that merges an adapter into its model."""
    code = (
        "import sys; from peft import AutoPeftModelForCausalLM as A; "
        "A.from_pretrained(sys.argv[1]).merge_and_unload().save_pretrained('merged')"
    )
    return f'python -c "{code}" {_quoted(folder)}'


def _quoted(folder: Path) -> str:
    """A folder as an argument of a command that a user pastes."""
    return shlex.quote(str(folder))
