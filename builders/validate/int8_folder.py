"""Open an INT8 folder as an engine that runs beside the reference, in our own W8A8 arithmetic.

The folder is another tool's, or was converted from one, or is ours in ModelOpt's form, which no other program runs
without a GPU. Its layers are read one at a time in the one sweep over the reference's layers. So it needs no other
program, and a folder of any size takes the memory of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from builders.engine.protocol import ANYBODY, ForeignInputs
from builders.validate.recovery import Recovered, recover
from builders.validate.scheme import EngineScheme, read_scheme
from smoothquant.artifacts.manifest import FileFacts, Manifest
from smoothquant.artifacts.record import as_json
from smoothquant.artifacts.smoothing_file import SmoothingFile
from smoothquant.device import declared_dtype
from smoothquant.digests import combined, sha256
from smoothquant.errors import UserError
from smoothquant.int8_checkpoint import Int8Checkpoint
from smoothquant.int8_config import HF_QUANT_CONFIG
from smoothquant.int8_model import Int8Model
from smoothquant.model import Model
from smoothquant.outputs import FORMAT, check_content, is_output, load_manifest
from smoothquant.plan import Plan
from smoothquant.reading import read_json

RECORDED, CONVERTED = "export modelopt", "convert"  # steps of ours; the first records its smoothing
UNEXPLAINED = (
    "no smoothing of norms and linears makes its weights those of the reference (they are {distance:.0%} apart), as "
    "after a rotation: there are no errors of single linears, and those of the layers count every change of basis"
)


def is_int8_folder(folder: Path) -> bool:
    """Whether a folder is opened here: a Hugging Face folder that is quantized, and that no engine runs."""
    if is_output(folder):
        return load_manifest(folder).step in (RECORDED, CONVERTED)
    told = read_json(folder / "config.json").get("quantization_config")
    return told is not None or (folder / HF_QUANT_CONFIG).exists()


def open_int8_folder(folder: Path, model: Model, plans: Sequence[Plan] = ()) -> tuple[Manifest, EngineScheme]:
    """A folder's manifest, made from its files if another tool wrote it, and its scheme.

    model: the float model that it was made from. plans: as in `read_scheme`.
    Raises CheckpointError for a form that is not computed here as it is written and for a folder that is not whole,
    UserError for one of another architecture.
    """
    length = model.geometry.max_positions if model.choices else None
    checkpoint = Int8Checkpoint(folder)
    int8 = Int8Model(checkpoint, Model(checkpoint, model.family, length))
    _check_architecture(int8.model, model)
    if is_output(folder):
        made = load_manifest(folder)
        check_content(folder, made)
        if made.step == RECORDED:
            scheme = read_scheme(folder, plans)
            return made, replace(scheme, key=f"{scheme.key} as stored", folder=int8)
    manifest = _manifest(int8)
    return manifest, _scheme(int8, recover(model, int8), combined(manifest.contents))


def _check_architecture(found: Model, model: Model) -> None:
    """Raise UserError unless two models differ in nothing but their weights."""
    differing = {"model_type": (found.checkpoint.config.get("model_type"), model.checkpoint.config.get("model_type"))}
    differing |= {
        field.name: (getattr(found.geometry, field.name), getattr(model.geometry, field.name))
        for field in fields(found.geometry)
        if field.name != "tied_embeddings"  # a tool may store the head that was tied
    }
    for name, (theirs, ours) in differing.items():
        if theirs != ours:
            raise UserError(
                f"{found.checkpoint.folder}/config.json: {name} is {theirs}",
                expected=f"{ours}, the reference's",
                do="give the model that the folder was made from",
            )


def _manifest(int8: Int8Model) -> Manifest:
    checkpoint, geometry, scheme = int8.checkpoint, int8.model.geometry, int8.scheme
    small = [checkpoint.folder / name for name in ("config.json", HF_QUANT_CONFIG)]
    paths = [*checkpoint.files, *(path for path in small if path.exists())]
    inputs = ForeignInputs(
        str(declared_dtype(checkpoint.config, checkpoint.dtype)).removeprefix("torch."),
        geometry.vocab_size,
        geometry.hidden_size,
        geometry.layers,
        {"format": checkpoint.quantized.dialect, **scheme.words()},
    )
    facts = {path.name: FileFacts(path.stat().st_size, sha256(path)) for path in paths}
    return Manifest(FORMAT, ANYBODY, as_json(inputs), facts, {})


def _scheme(int8: Int8Model, found: Recovered, key: str) -> EngineScheme:
    plain = EngineScheme(key, int8.scheme, folder=int8, run_time=found.run_time)
    if not found.explained:
        return replace(plain, unexplained=UNEXPLAINED.format(distance=found.distance))
    return replace(plain, smoothing=SmoothingFile(found.smoothing_scale))
