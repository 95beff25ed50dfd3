"""TensorRT-LLM checkpoints and engines. Checkpoints are checked and run here; its container builds the engines.

`check` finds the faults that the loader of TensorRT-LLM would refuse. `Interpreter` runs a checkpoint in PyTorch, and
`CheckpointEngine` runs it for `smoothquant validate`.
"""

from builders.tensorrt_llm.format.check import check
from builders.tensorrt_llm.format.checkpoint import is_checkpoint
from builders.tensorrt_llm.format.foreign import foreign_manifest
from builders.tensorrt_llm.interpreter.arithmetic import EnginePrecision
from builders.tensorrt_llm.interpreter.engine import CheckpointEngine
from builders.tensorrt_llm.interpreter.interpreter import Interpreter

__all__ = ["CheckpointEngine", "EnginePrecision", "Interpreter", "check", "foreign_manifest", "is_checkpoint"]
