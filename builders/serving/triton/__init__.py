"""Serve engines with Triton: `write_model` puts an engine into a model repository, `TritonEngine` calls the server.

The backends are Triton's own, tensorrt and onnxruntime. They run one sequence per request, without a paged cache and
without batching of sequences in flight. If you need these, use TensorRT-LLM's backend.
"""

from builders.serving.triton.accelerator import check_provider
from builders.serving.triton.client import TritonEngine
from builders.serving.triton.repository import check_cache, check_repository, model_name, server_options, write_model

__all__ = [
    "TritonEngine",
    "check_cache",
    "check_provider",
    "check_repository",
    "model_name",
    "server_options",
    "write_model",
]
