"""Which family a checkpoint belongs to: the built-in records, and a user's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from recipes import bloom, falcon, gemma, granite, llama, mistral, mixtral, olmo2, opt, phi, qwen, qwen_moe
from recipes.trust import check_family
from recipes.trust.known import model_type_of, transformers_class
from smoothquant.announced import AnnouncedCheckpoint, AnnouncedModel
from smoothquant.checkpoint import Checkpoint
from smoothquant.errors import CheckpointError, UserError
from smoothquant.family import Family
from smoothquant.int8_checkpoint import Int8Checkpoint
from smoothquant.int8_model import Int8Model
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


def open_model(
    folder: str | Path,
    family_file: str | Path | None = None,
    *,
    length: int | None = None,
    trust_family: bool = False,
    again: bool = False,
) -> Model:
    """Open a checkpoint with its family: the one in `family_file`, else the built-in one that its config names.

    length: the longest sequence that is wanted (`Model`). again: read the weights for their fingerprint in any case.
    A model that is opened for the first time is compared with transformers (`recipes.trust`). trust_family: go on where
    transformers does not know the architecture. Raises CheckpointError for a folder that is no whole checkpoint and for
    a family that does not compute what transformers does, UserError for an architecture nobody declared.
    """
    return _with_family(Checkpoint(folder, again=again), family_file, length, trust_family)


def open_announced(
    folder: str | Path, family_file: str | Path | None = None, *, length: int | None = None, trust_family: bool = False
) -> Model:
    """Open a folder that holds config.json and no weights. The arguments and errors are those of `open_model`."""
    return _with_family(AnnouncedCheckpoint(folder), family_file, length, trust_family, AnnouncedModel)


def open_int8_model(
    folder: str | Path,
    family_file: str | Path | None = None,
    *,
    length: int | None = None,
    trust_family: bool = False,
    again: bool = False,
) -> Int8Model:
    """Open somebody's INT8 folder with its family. The arguments are those of `open_model`.

    Raises CheckpointError for a form that is not computed as it is written here, and what `open_model` raises.
    """
    checkpoint = Int8Checkpoint(folder, again=again)
    return Int8Model(checkpoint, _with_family(checkpoint, family_file, length, trust_family))


def _with_family(
    checkpoint: Checkpoint,
    family_file: str | Path | None,
    length: int | None,
    trusted: bool,
    kind: type[Model] = Model,
) -> Model:
    family = load_family(family_file) if family_file else family_of(checkpoint)
    model = kind(checkpoint, family, length)
    check_family(model, family, Path(family_file) if family_file else None, trusted=trusted)
    return model


def family_of(checkpoint: Checkpoint) -> Family:
    """The built-in family of a checkpoint, by config.json's `model_type`, or where nobody knows that `architectures`.

    transformers goes by the model type: an architecture that nobody knows beside a known one is passed over. Raises
    CheckpointError where both are known and mean different models.
    """
    where = f"{checkpoint.folder}/config.json"
    kind, named = checkpoint.config.get("model_type") or None, checkpoint.config.get("architectures") or []
    for architecture in named:
        meant = _model_types(architecture)
        if kind and meant and kind not in meant and _is_known(kind):
            raise CheckpointError(
                f"{where}: architecture {architecture} is of model type {meant[0]}, and model_type is {kind}",
                expected="two names of one model (transformers goes by model_type)",
                do="restore the config.json that came with the weights",
            )
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    for family in FAMILIES:
        if set(family.architectures) & set(named) and not (kind and _is_known(kind)):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    found = ", ".join(named) or "without a name"
    raise UserError(
        f"{where}: architecture {found} (model_type {kind!r}) is not known",
        expected=f"one of {known}",
        do="declare it in a file and pass --family FILE (recipes/README.md shows how)",
    )


def _model_types(architecture: str) -> tuple[str, ...]:
    """The model types that an architecture belongs to, ours and then transformers'; none if nobody knows it."""
    for family in FAMILIES:
        if architecture in family.architectures:
            return family.model_types
    found = model_type_of(architecture)
    return (found,) if found else ()


def _is_known(kind: str) -> bool:
    """Whether a model type is one of ours or of transformers'."""
    return (
        any(kind in family.model_types for family in FAMILIES) or transformers_class({"model_type": kind}) is not None
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
