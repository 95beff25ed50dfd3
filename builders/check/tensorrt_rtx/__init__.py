"""A TensorRT compiler that needs no GPU: TensorRT-RTX, a sibling of TensorRT 11 with the same parser and compiler."""

from builders.check.tensorrt_rtx.compiler import Compilation, compile_apart, compile_onnx
from builders.check.tensorrt_rtx.packages import available

__all__ = ["Compilation", "available", "compile_apart", "compile_onnx"]
