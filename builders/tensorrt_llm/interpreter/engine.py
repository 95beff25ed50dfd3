"""Use a checkpoint folder, ours or another tool's, as an engine for `smoothquant validate`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from builders.engine.protocol import Engine
from builders.tensorrt_llm.format.foreign import foreign_manifest
from builders.tensorrt_llm.interpreter.interpreter import Interpreter
from smoothquant.outputs import load_manifest


class CheckpointEngine(Engine):
    """Runs the interpreter, with activations in the checkpoint's dtype.

    Raises UserError if the folder is no checkpoint or breaks the format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.manifest = foreign_manifest(Path(folder)) or load_manifest(folder)
        self.interpreter = Interpreter(folder)

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of whole sequences, float32 (batch, tokens, vocab). ids: int64 (batch, tokens)."""
        return self.interpreter.logits(ids).float()
