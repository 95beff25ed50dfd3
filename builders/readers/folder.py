"""The facts of a folder that decide who can read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builders.tensorrt_llm import is_checkpoint
from exporters.huggingface.convert import STEP as CONVERT
from exporters.huggingface.convert import ConvertInputs
from smoothquant.errors import UserError
from smoothquant.int8_config import COMPRESSED_TENSORS, MODELOPT
from smoothquant.outputs import is_output, load_manifest
from smoothquant.reading import read_object
from smoothquant.scheme import Scheme

FORMS = {  # step that made a folder -> its form
    "export hf": "float",
    "export w8a8": "compressed-tensors",
    "export modelopt": "ModelOpt",
    "export onnx": "ONNX",
    "build onnxruntime": "ONNX",
    "export trtllm": "TensorRT-LLM checkpoint",
}
DIALECTS = {COMPRESSED_TENSORS: "compressed-tensors", MODELOPT: "ModelOpt"}  # what a conversion wrote -> its form
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # keys of config.json


@dataclass(frozen=True)
class FolderFacts:
    """What decides who can read a folder.

    form: a value of `FORMS`. model_type: of config.json. activations: "per-token", "per-tensor" or "float". experts:
    whether the model has any. window: whether its attention has a window that is shorter than its longest sequence.
    """

    form: str
    model_type: str
    activations: str
    experts: bool = False
    window: bool = False


def folder_facts(path: str | Path) -> FolderFacts:
    """The facts of a folder. Raises UserError if it is nothing that leaves us."""
    path = Path(path)
    if not is_output(path):
        what = "a TensorRT-LLM checkpoint of another tool" if is_checkpoint(path) else "no output of this tool"
        raise UserError(f"{path}: {what}", expected=f"a folder made by one of: {', '.join(FORMS)}")
    manifest = load_manifest(path)
    if manifest.step == CONVERT:
        made = manifest.inputs_as(ConvertInputs)
        return facts_of(DIALECTS[made.to], made.scheme, read_object(path / "config.json"))
    if manifest.step not in FORMS:
        raise UserError(f"{path}: made by {manifest.step!r}", expected=f"a folder made by one of: {', '.join(FORMS)}")
    return facts_of(FORMS[manifest.step], manifest.origin.scheme, read_object(path / "config.json"))


def facts_of(form: str, scheme: Scheme, config: dict) -> FolderFacts:
    """The facts of a folder of this form. config: the model's config.json."""
    experts = any(isinstance(config.get(key), int) and config[key] > 1 for key in EXPERTS)
    width, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    window = isinstance(width, int) and isinstance(longest, int) and width < longest
    window = window and config.get("use_sliding_window") is not False
    return FolderFacts(form, str(config.get("model_type", "")), scheme.activations.form, experts, window)
