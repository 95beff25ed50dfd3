"""Interruptions of the command line at every operation on files: killed, a write done by half, a loss of power.

python -m tests.crash                 every point of every scenario
python -m tests.crash --sample 20     some of each
"""

from __future__ import annotations

from importlib import import_module

MODULES = (
    "torch",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.encoder_decoder",
    "transformers.models.llama.modeling_llama",
    "compressed_tensors",
    "onnx",
    "onnxruntime",
    "recipes.cli",
    "recipes.families",
    "recipes.models",
    "recipes.pipeline",
    "recipes.trust",
    "exporters.export",
    "exporters.huggingface",
    "exporters.onnx",
    "exporters.trtllm",
    "builders.onnxruntime",
    "builders.tensorrt_llm",
    "builders.transformers",
    "builders.validate",
    "builders.validate.report",
)


def preload() -> None:
    """Import what the command line needs, so that forked processes have it at once."""
    for name in MODULES:
        import_module(name)
