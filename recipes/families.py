"""Which family a checkpoint belongs to: the built-in records, and a user's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from recipes import bloom, falcon, gemma, granite, llama, mistral, mixtral, olmo2, opt, phi, qwen, qwen_moe
from smoothquant.checkpoint import Checkpoint
from smoothquant.errors import UserError
from smoothquant.family import Family
from smoothquant.model import Model

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    mixtral.FAMILY,
    falcon.FAMILY,
    opt.FAMILY,
    bloom.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
    phi.FAMILY,
    gemma.GEMMA2,
    gemma.GEMMA3,
    granite.FAMILY,
    olmo2.FAMILY,
    qwen_moe.FAMILY,
)


def open_model(folder: str | Path, family_file: str | Path | None = None, length: int | None = None) -> Model:
    """Open a checkpoint with its family: the one in `family_file`, else the built-in one that its config names.

    length: the longest sequence that is wanted (`Model`).
    Raises CheckpointError for a folder that is no whole checkpoint, UserError for an architecture nobody declared.
    """
    checkpoint = Checkpoint(folder)
    return Model(checkpoint, load_family(family_file) if family_file else family_of(checkpoint), length)


def family_of(checkpoint: Checkpoint) -> Family:
    """The built-in family of a checkpoint, by config.json's `architectures`, or `model_type` where there is none."""
    config = checkpoint.config
    named = config.get("architectures") or []
    for family in FAMILIES:
        if set(family.architectures) & set(named) or (not named and config.get("model_type") in family.model_types):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    found = ", ".join(named) or repr(config.get("model_type"))
    raise UserError(
        f"{checkpoint.folder}/config.json: architecture {found} is not known",
        expected=f"one of {known}",
        do="declare it in a file and pass --family FILE (recipes/README.md shows how)",
    )


def load_family(path: str | Path) -> Family:
    """The record FAMILY from a Python file. The file is run: give only one that you trust."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location("user_family", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"{path}: no such family file", expected="a Python file that defines FAMILY")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        raise UserError(f"{path}: cannot be run ({type(error).__name__}: {error})", do="correct the file") from error
    family = getattr(module, "FAMILY", None)
    if not isinstance(family, Family):
        raise UserError(
            f"{path}: no FAMILY in it", expected="FAMILY = smoothquant.family.Family(...)", do="see recipes/llama.py"
        )
    return family
