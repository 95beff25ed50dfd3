"""ONNX Runtime engines: `build` makes an engine folder, `OnnxRuntimeEngine` runs it."""

from builders.onnxruntime.build import build
from builders.onnxruntime.engine import OnnxRuntimeEngine

__all__ = ["OnnxRuntimeEngine", "build"]
