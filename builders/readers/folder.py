"""The facts of a folder that decide who can read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builders.tensorrt_llm import is_checkpoint
from smoothquant.errors import UserError
from smoothquant.int8_config import dialect_of, read_int8_config
from smoothquant.outputs import is_output, load_manifest
from smoothquant.reading import read_object
from smoothquant.scheme import ACTIVATIONS, IN_FLOAT, Precision, Scheme

ONNX, TRTLLM, FLOAT = "ONNX", "TensorRT-LLM checkpoint", "float"  # forms, beside those of INT8 folders
FORMS = {  # step that made a folder that is no Hugging Face folder -> its form
    "export onnx": ONNX,
    "build onnxruntime": ONNX,
    "build openvino": ONNX,
    "export trtllm": TRTLLM,
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # keys of config.json


@dataclass(frozen=True)
class FolderFacts:
    """What decides who can read a folder.

    form: a dialect of INT8 folders, or "float", "ONNX" or "TensorRT-LLM checkpoint". model_type: of config.json.
    activations: "per-token", "per-tensor" or "float". experts: whether the model has any. window: whether its attention
    has a window that is shorter than its longest sequence.
    """

    form: str
    model_type: str
    activations: str
    experts: bool = False
    window: bool = False


def folder_facts(path: str | Path) -> FolderFacts:
    """The facts of a folder, whoever made it.

    Raises UserError if it is nothing that a server reads, or is in a form of quantization that this tool does not know.
    """
    path = Path(path)
    step = load_manifest(path).step if is_output(path) else ""
    if step in FORMS:
        return facts_of(FORMS[step], load_manifest(path).origin.scheme, read_object(path / "config.json"))
    if not (path / "config.json").exists():
        raise UserError(
            f"{path}: no config.json", expected="an export or engine of this tool, or a Hugging Face model folder"
        )
    config = read_object(path / "config.json")
    if is_checkpoint(path):
        token = "PER_TOKEN" in str(config.get("quantization"))
        return _facts(TRTLLM, ACTIVATIONS["per-token" if token else "per-tensor"], {})
    quantization = config.get("quantization_config")
    if quantization is None and dialect_of(path, None) is None:
        return facts_of(FLOAT, IN_FLOAT, config)
    found = read_int8_config(path, quantization)
    return _facts(found.dialect, found.activations, config)


def facts_of(form: str, scheme: Scheme, config: dict) -> FolderFacts:
    """The facts of a folder of this form. config: the model's config.json."""
    return _facts(form, scheme.activations, config)


def _facts(form: str, activations: Precision, config: dict) -> FolderFacts:
    experts = any(isinstance(config.get(key), int) and config[key] > 1 for key in EXPERTS)
    width, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    window = isinstance(width, int) and isinstance(longest, int) and width < longest
    window = window and config.get("use_sliding_window") is not False
    return FolderFacts(form, str(config.get("model_type", "")), activations.form, experts, window)
