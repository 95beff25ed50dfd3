"""The small files beside the weights that every export carries: the tokenizer's, and how to generate."""

from __future__ import annotations

import shutil
from pathlib import Path

from smoothquant.checkpoint import SIDECARS
from smoothquant.model import Model


def copy_tokenizer(model: Model, folder: Path) -> None:
    """Copy tokenizer and generation settings, those that the checkpoint has, into `folder`."""
    for name in SIDECARS:
        source = model.checkpoint.folder / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
