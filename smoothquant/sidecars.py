"""The small files beside a model's weights, which exports and engines carry: tokenizer, generation settings, terms."""

from __future__ import annotations

import os
from pathlib import Path

from smoothquant import files
from smoothquant.digests import combined
from smoothquant.errors import CheckpointError
from smoothquant.reading import check_small
from smoothquant.workroom import Workroom

LICENSES = (
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "LICENSE.pdf",
    "NOTICE",
    "NOTICE.txt",
    "NOTICE.md",
    "USE_POLICY.md",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
SIDECARS = (
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    *LICENSES,
)


def sidecar(folder: Path, name: str) -> Path | None:
    """A small file of a model folder, which others copy; None if the folder has no such file.

    Raises CheckpointError for a link that leaves the folder: what it names is not the model's. (The Hub's cache links
    from snapshots/REVISION into blobs/, which belongs to the model.) UserError for a file that is not small.
    """
    path, real = folder / name, Path(os.path.realpath(folder / name))
    if not path.is_file():
        return None
    check_small(path)
    home = Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not any(real.is_relative_to(place) for place in (home, blobs)):
        raise CheckpointError(
            f"{path}: a link to {real}, outside of the model folder",
            expected="files of the model",
            do="put a copy in the place of the link, if the file belongs to the model",
        )
    return path


def copy_sidecars(folder: Path, work: Workroom, *more: str) -> None:
    """Copy the sidecars that a model folder has into an output. more: names of other small files to copy."""
    for name in (*more, *SIDECARS):
        source = sidecar(folder, name)
        if source:
            files.copy(source, work.path(name))


def digest_of_sidecars(folder: Path) -> str:
    """Identity of config.json and the sidecars that a model folder has: SHA-256, 16 hex digits."""
    found = {name: path for name in ("config.json", *SIDECARS) if (path := sidecar(folder, name))}
    return combined({name: files.sha256(path) for name, path in found.items()})
