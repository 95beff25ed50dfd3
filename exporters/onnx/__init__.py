"""ONNX: a decoder with KV cache in standard operators, W8A8 in Q/DQ form or float (`OnnxWriter`)."""

from exporters.onnx.writer import OnnxWriter

__all__ = ["OnnxWriter"]
