"""The small files beside the weights that every export carries: the tokenizer's, and how to generate."""

from __future__ import annotations

import shutil
from pathlib import Path

from smoothquant.model import Model

SIDECARS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def copy_tokenizer(model: Model, folder: Path) -> None:
    """Copy tokenizer and generation settings, those that the checkpoint has, into `folder`."""
    for name in SIDECARS:
        source = model.checkpoint.folder / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
