"""Interruptions of the command line at every operation on files: killed, a write done by half, a loss of power.

python -m tests.crash                 every point of every scenario
python -m tests.crash --sample 20     some of each
"""

from __future__ import annotations

from importlib import import_module

MODULES = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "onnx",
    "onnxruntime",
    "recipes.cli",
    "recipes.models",
    "recipes.pipeline",
    "exporters.export",
    "exporters.huggingface",
    "exporters.onnx",
    "exporters.trtllm",
    "builders.onnxruntime",
    "builders.tensorrt_llm",
    "builders.validate",
    "builders.validate.report",
)


def preload() -> None:
    """Import what the command line needs, so that forked processes have it at once."""
    for name in MODULES:
        import_module(name)
