"""What becomes of an ONNX graph in TensorRT: `check` gives the linter's findings and a compiler's verdicts."""

from builders.check.check import CheckedGraph, Compile, ProductVerdict, check

__all__ = ["CheckedGraph", "Compile", "ProductVerdict", "check"]
