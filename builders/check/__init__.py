"""What becomes of an ONNX graph in TensorRT: `check` gives the linter's findings and a compiler's verdicts."""

from builders.check.check import Check, Compile, Verdict, check

__all__ = ["Check", "Compile", "Verdict", "check"]
