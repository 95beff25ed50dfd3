"""The small files beside the weights that every export carries: the tokenizer's, and how to generate."""

from __future__ import annotations

from smoothquant.checkpoint import SIDECARS, sidecar
from smoothquant.files import copy
from smoothquant.model import Model
from smoothquant.workspace import Workspace


def copy_tokenizer(model: Model, work: Workspace) -> None:
    """Copy tokenizer and generation settings, those that the checkpoint has, into an output."""
    for name in SIDECARS:
        source = sidecar(model.checkpoint.folder, name)
        if source:
            copy(source, work.path(name))
