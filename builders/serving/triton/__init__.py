"""Serving by Triton Inference Server: `write_model` puts an engine into a model repository, `TritonEngine` talks to it.

The backends are Triton's own, tensorrt and onnxruntime: one sequence a request, no paged cache, no batching of
sequences in flight. Where that matters, use TensorRT-LLM's backend.
"""

from builders.serving.triton.accelerator import check_provider
from builders.serving.triton.client import TritonEngine
from builders.serving.triton.repository import check_repository, model_name, write_model

__all__ = ["TritonEngine", "check_provider", "check_repository", "model_name", "write_model"]
