"""Output folders as tests see them: what lies at their top, and manifests of folders that no command made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from smoothquant.workspace import FORMAT, MANIFEST, OURS

TOKENIZER = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}  # of the tiny models


def top(folder: Path) -> set[str]:
    """Names at the top of an output, but for our own subfolder, which must be there."""
    names = {path.name for path in folder.iterdir()}
    assert OURS in names
    return names - {OURS}


def write_manifest(folder: Path, step: str, inputs: Mapping | None = None) -> None:
    """The manifest of a folder without files."""
    path = folder / MANIFEST
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT, "step": step, "inputs": inputs or {}, "files": {}}))
