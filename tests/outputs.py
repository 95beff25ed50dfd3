"""Output folders as tests see them: what lies at their top, and manifests of folders that no command made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from smoothquant.artifacts.manifest import ModelFacts, Origin
from smoothquant.artifacts.record import as_json
from smoothquant.artifacts.seal import sealed
from smoothquant.files import sha256
from smoothquant.outputs import FORMAT, MANIFEST, OURS
from smoothquant.scheme import scheme_of
from smoothquant.settings import SmoothingSettings

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
    content = {"format": FORMAT, "step": step, "inputs": inputs or {}, "files": {}, "versions": {}}
    path.write_text(json.dumps(sealed(content)))


def agree(folder: Path, **changes: object) -> None:
    """Make the manifest agree with files that a test has changed, and with other changes of its own."""
    content = {**json.loads((folder / MANIFEST).read_text()), **changes}
    for name in content["files"]:
        path = folder / name
        if path.exists():
            content["files"][name] = {"size": path.stat().st_size, "sha256": sha256(path), "accepted": False}
    content.pop("sha256")
    (folder / MANIFEST).write_text(json.dumps(sealed(content)))


def made_from(activations: str, **more: object) -> dict:
    """Inputs of an export of a Llama with the default smoothing."""
    return as_json(Origin("llama", SmoothingSettings(), (scheme_of(activations),), **more))


def facts(max_positions: int, cache_window: int | None) -> ModelFacts:
    """Of a model that is otherwise the tiny Llama."""
    return ModelFacts(64, 2, 4, 2, 16, 288, max_positions, cache_window)
