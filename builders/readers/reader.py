"""The programs that read what leaves us, in the versions that were looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FEW_MODELS = frozenset(  # values of model_type
    ("gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "opt", "qwen2", "qwen3", "qwen3_moe")
)


@dataclass(frozen=True)
class Reader:
    """A program.

    asked: its name on the command line. title: its name for people. version: that was looked at. forms: of folders that
    it takes. instead: what to do with a folder of another form. models: the values of model_type that it has a class
    for; empty if it needs none.
    """

    asked: str
    title: str
    version: str
    forms: tuple[str, ...]
    instead: str
    models: frozenset[str] = frozenset()


READERS: Mapping[str, Reader] = {
    "vllm": Reader(
        "vllm",
        "vLLM",
        "0.32.0",
        ("compressed-tensors", "float"),
        "smoothquant export w8a8",
        FEW_MODELS | {"bloom", "falcon", "phi3"},
    ),
    "sglang": Reader(
        "sglang", "SGLang", "0.5.23", ("compressed-tensors", "float"), "smoothquant export w8a8", FEW_MODELS
    ),
    "engines": Reader(
        "tensorrt-llm", "TensorRT-LLM, engines", "1.2.1", ("TensorRT-LLM checkpoint",), "smoothquant export trtllm"
    ),
    "pytorch": Reader(
        "tensorrt-llm", "TensorRT-LLM, PyTorch backend", "1.3", ("float",), "serve the w8a8 folder with vLLM"
    ),
    "edge-llm": Reader(
        "edge-llm",
        "TensorRT Edge-LLM",
        "0.11.0",
        ("modelopt",),
        "smoothquant export modelopt",
        FEW_MODELS | {"bloom", "falcon", "phi3"},
    ),
    "transformers": Reader(
        "transformers", "transformers", "5.23.0", ("compressed-tensors", "float"), "smoothquant export w8a8"
    ),
    "onnxruntime": Reader("onnxruntime", "ONNX Runtime", "1.32.0", ("ONNX",), "smoothquant export onnx"),
    "genai": Reader("genai", "onnxruntime-genai", "0.18.0", ("ONNX",), "smoothquant build onnxruntime"),
    "openvino": Reader("openvino", "OpenVINO", "2026.4.1", ("ONNX",), "smoothquant build openvino"),
}
